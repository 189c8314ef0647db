"""A real sentence encoder, three ways: float32, torch's quantize_dynamic, and Tersor Int8Dynamic, in one process.

Speed of the whole model, bytes it holds, and how far its embeddings move; see minilm_model.py for the model and the texts.
torch is imported inside functions: cap_peers() must come first, also in scripts that import this one.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tersor.bench.timing import PEER_CAP, Timing, cap_peers, interleaved, machine_name, torch_threads

if TYPE_CHECKING:
    from minilm_model import Embeddings, Texts
    from torch import nn

SHAPES = ((1, 128), (8, 128), (1, 16))  # batch, tokens
SLICE_S = 0.08  # a contender's turn in a round: long against a scheduler tick, short against a change of the CPU's frequency
SIMULATION_BOUND = 0.0005  # how far Tersor's mean cosine may lie from the simulation's

FP32 = "fp32"
TORCH = "torch quantize_dynamic"
TORCH_CHANNEL = "torch, per channel"
TERSOR = "Tersor Int8Dynamic"
SIMULATION = "simulation (torch)"


class Accuracy(NamedTuple):
    """Against fp32: cosine over queries and documents, share of queries with the same best document, share with the right one."""

    mean_cosine: float
    worst_cosine: float
    same_top1: float
    recall_at_1: float


def measure_speed(
    models: dict[str, nn.Module],
    batch: int,
    tokens: int,
    rounds: int,
    threads: int,
    on_round: Callable[[], None] | None = None,
    slice_s: float = SLICE_S,
) -> dict[str, Timing]:
    """Seconds of one call of each model, `batch` sentences of `tokens` real tokens to embeddings, interleaved."""
    import torch
    from minilm_model import sentence_embedding, token_rows

    ids = token_rows(batch, tokens)
    mask = torch.ones_like(ids)
    calls = {name: partial(sentence_embedding, model, ids, mask) for name, model in models.items()}
    with torch_threads(threads), torch.inference_mode():
        return interleaved(calls, rounds, slice_s, on_round)


def best_torch_engine(model: nn.Module, threads: int) -> tuple[str, dict[str, float]]:
    """(engine, seconds of each: geometric mean over SHAPES of the best of a few calls)."""
    from tersor.bench.peers import quantize_dynamic_engines, torch_quantize_dynamic

    models = {engine: torch_quantize_dynamic(model, engine) for engine in quantize_dynamic_engines()}
    runs = [measure_speed(models, batch, tokens, rounds=4, threads=threads, slice_s=0.05) for batch, tokens in SHAPES]
    seconds = {engine: math.exp(statistics.fmean(math.log(run[engine][0]) for run in runs)) for engine in models}
    return min(seconds, key=seconds.__getitem__), seconds


def tersor_quantized(model: nn.Module) -> nn.Module:
    """A copy of model with every nn.Linear in Tersor's Int8Dynamic."""
    import tersor

    return tersor.quantize_(copy.deepcopy(model), tersor.Int8Dynamic())


def tersor_variant() -> str:
    """The instruction set that serves the int8 kernel."""
    import tersor

    return tersor.info().kernels.get("gemm_w8", "none: plain torch reference, slow")


def accuracy(got: Embeddings, reference: Embeddings) -> Accuracy:
    """Compares embeddings of one contender with those of fp32; both rank all documents for every query."""
    import torch

    cosine = torch.cat([(g.double() * r.double()).sum(1) for g, r in zip(got, reference, strict=True)])
    best = (got.queries @ got.documents.T).argmax(1)
    same = best == (reference.queries @ reference.documents.T).argmax(1)
    found = best == torch.arange(len(best))
    return Accuracy(cosine.mean().item(), cosine.min().item(), same.double().mean().item(), found.double().mean().item())


def speed_table(speed: dict[str, dict[str, Timing]], threads: int, rounds: int) -> Table:
    plural = "" if threads == 1 else "s"
    spread = max(median / best for run in speed.values() for best, median in run.values())
    table = Table(
        title=f"Whole model, sentences/s, {threads} thread{plural}",
        caption=f"median of {rounds} interleaved rounds; medians are within {100 * (spread - 1):.0f} % of the best",
    )
    table.add_column("")
    for shape in speed:
        table.add_column(shape, justify="right")
    for name in next(iter(speed.values())):
        cells = []
        for shape, run in speed.items():
            median, fp32 = run[name][1], run[FP32][1]
            cells.append(f"{int(shape.split()[0]) / median:7.1f}  {fp32 / median:.2f}x")
        table.add_row(name, *cells, style="bold" if name == TERSOR else "")
    return table


def accuracy_table(rows: dict[str, Accuracy], sizes: dict[str, int], pairs: int) -> Table:
    table = Table(title=f"Size, and embeddings of {pairs} queries and {pairs} documents against fp32")
    for column in ("", "MB", "mean cosine", "worst", "same top-1", "R@1"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        size = f"{sizes[name] / 1e6:.1f}" if name in sizes else "-"
        cells = f"{row.mean_cosine:.5f}", f"{row.worst_cosine:.4f}", f"{100 * row.same_top1:.1f} %", f"{row.recall_at_1:.3f}"
        table.add_row(name, size, *cells, style="bold" if name == TERSOR else "")
    return table


class Report(NamedTuple):
    """All figures of a run; speed is shape -> contender -> seconds of one call."""

    facts: dict[str, Any]
    engine_s: dict[str, float]
    speed: dict[str, dict[str, Timing]]
    sizes: dict[str, int]
    scores: dict[str, Accuracy]

    def to_json(self) -> str:
        speed = {
            shape: {name: {"min": best, "median": median} for name, (best, median) in run.items()}
            for shape, run in self.speed.items()
        }
        accuracies = {name: row._asdict() for name, row in self.scores.items()}
        figures = {"engine_s": self.engine_s, "speed_s": speed, "bytes": self.sizes, "accuracy": accuracies}
        return json.dumps({**self.facts, **figures}, indent=2) + "\n"


def run(fp32: nn.Module, texts: Texts, threads: int, rounds: int, simulate: bool, per_channel: bool, progress: Progress) -> Report:
    """Quantises, times, embeds; every stage advances the one task of the progress bar."""
    import torch
    from minilm_model import evaluate, simulate_int8_

    import tersor
    from tersor.comparison import model_bytes

    task = progress.add_task("", total=1 + len(SHAPES) * rounds + 3 + per_channel + simulate)

    def step(description: str, advance: int = 1) -> None:
        progress.update(task, description=description, advance=advance, refresh=True)

    step("choosing torch's engine", 0)
    engine, engine_s = best_torch_engine(fp32, threads)
    step("quantising")
    from tersor.bench.peers import torch_quantize_dynamic

    models = {FP32: fp32, TORCH: torch_quantize_dynamic(fp32, engine)}
    if per_channel:
        models[TORCH_CHANNEL] = torch_quantize_dynamic(fp32, engine, per_channel=True)
    models[TERSOR] = tersor_quantized(fp32)
    sizes = {name: model_bytes(model) for name, model in models.items()}

    speed = {}
    for batch, tokens in SHAPES:
        shape = f"{batch} x {tokens} tokens"
        step(shape, 0)
        speed[shape] = measure_speed(models, batch, tokens, rounds, threads, on_round=partial(step, shape))

    if simulate:
        models[SIMULATION] = simulate_int8_(copy.deepcopy(fp32))
    scores: dict[str, Accuracy] = {}
    with torch_threads(threads):  # on all cores a busy neighbour would make every parallel region wait
        for name, model in models.items():
            step(f"embedding: {name}", 0)
            embeddings = evaluate(model, texts)
            if name == FP32:
                reference = embeddings
            scores[name] = accuracy(embeddings, reference)
            step(f"embedding: {name}")

    facts = {
        "cpu": machine_name(),
        "torch": torch.__version__,
        "tersor": tersor.__version__,
        "tersor_variant": tersor_variant(),
        "threads": threads,
        "rounds": rounds,
        "pairs": len(texts.queries),
        "engine": engine,
    }
    return Report(facts, engine_s, speed, sizes, scores)


def print_report(report: Report, console: Console) -> None:
    facts, scores = report.facts, report.scores
    console.print(speed_table(report.speed, facts["threads"], facts["rounds"]))
    console.print(accuracy_table(scores, report.sizes, facts["pairs"]))
    engines = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in report.engine_s.items())
    console.print(
        f"quantize_dynamic ran on {facts['engine']}, its fastest engine here (geometric mean of the shapes, ms: {engines})",
        soft_wrap=True,
    )
    if SIMULATION in scores:
        difference = scores[TERSOR].mean_cosine - scores[SIMULATION].mean_cosine
        verdict = "within" if abs(difference) <= SIMULATION_BOUND else "NOT within"
        console.print(f"Tersor's mean cosine minus the simulation's: {difference:+.6f}, {verdict} {SIMULATION_BOUND}")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of torch, timed or not.")
@click.option(
    "--rounds", type=click.IntRange(1), default=25, help="Timed rounds for each shape; all contenders take turns in each."
)
@click.option("--limit", type=click.IntRange(2), show_default="all 341", help="Documents used for accuracy: the first LIMIT.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT", help="Write all figures to OUT."
)
@click.option("--simulate", is_flag=True, help="Add the same int8 format simulated by plain torch in float64: accuracy only.")
@click.option("--per-channel", is_flag=True, help="Add quantize_dynamic with per-channel weights (per_channel_dynamic_qconfig).")
@click.option("--unrestricted", is_flag=True, help=f"Do not hold oneDNN at {PEER_CAP} where the CPU has AMX or AVX512-BF16.")
def main(
    threads: int, rounds: int, limit: int | None, json_path: Path | None, simulate: bool, per_channel: bool, unrestricted: bool
) -> None:
    """Compare fp32, torch's quantize_dynamic and Tersor Int8Dynamic on all-MiniLM-L6-v2.

    Whole-model speed at 1 x 128, 8 x 128 and 1 x 16 (batch x tokens), size in memory, and how well the embeddings of news
    documents keep their direction and find each other. One to two minutes.
    """
    onednn = cap_peers(unrestricted)
    try:
        import torch
        from minilm_model import MissingData, load_model, load_texts

        variant = tersor_variant()
        texts, fp32 = load_texts(limit), load_model()
    except ImportError as error:
        raise click.ClickException(f"{error}; `make dev` installs this repository and what its benches need") from None
    except MissingData as error:
        raise click.ClickException(str(error)) from None

    console = Console()
    versions = f"torch {torch.__version__}, threads: {threads}, Tersor kernels: {variant}"
    console.print(f"{machine_name()}; {versions}\n{onednn}", soft_wrap=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # No refresh from a second thread: it would run inside the timed calls.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        report = run(fp32, texts, threads, rounds, simulate, per_channel, progress)
    report.facts["onednn"] = onednn
    print_report(report, console)
    if json_path:
        json_path.write_text(report.to_json())


if __name__ == "__main__":
    main()
