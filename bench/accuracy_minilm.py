"""What each format costs a real sentence encoder: all-MiniLM-L6-v2 looks up nouns of WordNet by their definitions.

python bench/accuracy_minilm.py [--short]

Calibrated on definitions of other nouns. Each row gives R@1 as a difference to the float model with its standard error over the
queries, paired: within two of these a difference is noise, so the mean reciprocal rank and the cosine stand beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from every_format import FLOAT, times_float
from prune_minilm import calibration
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tersor.bench.timing import cap_peers, machine_name, torch_threads

if TYPE_CHECKING:
    from glosses import Ranking
    from torch import nn

QUERIES, CALIBRATION = 2200, 400
BATCHES = ((8, 128), (1, 16))  # sentences x tokens that are timed
DYNAMIC, STATIC, SPARSE = "Int8Dynamic", "Int8Static, percentile", "SparseInt8, 50 % by SparseGPT"
INT4 = {32: "Int4(32)", 128: "Int4(128)"}
GPTQ = {32: "Int4(32), GPTQ", 128: "Int4(128), GPTQ"}
DEPTHS = {f"{depth} of 6 blocks, untrained": depth for depth in (5, 4, 3)}
HALF = "half the inner width, untrained"
NAMES = (FLOAT, DYNAMIC, STATIC, *INT4.values(), *GPTQ.values(), SPARSE, *DEPTHS, HALF)


def variants(fp32: nn.Module, calls: list[Any]) -> dict[str, Callable[[], nn.Module]]:
    import tersor

    def pruned() -> nn.Module:
        model = copy.deepcopy(fp32)
        tersor.prune_(model, {"_default": tersor.Unstructured(0.5), "pooler.dense": None}, score="sparsegpt", calibration=calls)
        return tersor.quantize_(tersor.finalize_(model), tersor.SparseInt8())

    def static() -> nn.Module:
        return tersor.quantize_(copy.deepcopy(fp32), tersor.calibrate(fp32, tersor.Int8Static(), calls))

    found: dict[str, Callable[[], nn.Module]] = {
        FLOAT: lambda: fp32,
        DYNAMIC: lambda: tersor.quantize_(copy.deepcopy(fp32), tersor.Int8Dynamic()),
        STATIC: static,
        SPARSE: pruned,
        HALF: lambda: tersor.shrink(fp32, width=0.5, inputs=calls),
    }
    for name, depth in DEPTHS.items():
        found[name] = lambda depth=depth: tersor.shrink(fp32, depth=depth, inputs=calls)  # type: ignore[misc]
    for size in INT4:
        found[INT4[size]] = lambda size=size: tersor.quantize_(copy.deepcopy(fp32), tersor.Int4(size))  # type: ignore[misc]
        found[GPTQ[size]] = lambda size=size: tersor.gptq_(copy.deepcopy(fp32), tersor.Int4(size), calls)  # type: ignore[misc]
    return found


def run(
    queries: int = QUERIES, names: Iterable[str] = NAMES, on_row: Callable[[str], None] | None = None
) -> tuple[dict[str, Ranking], dict[str, int], dict[str, list[float]]]:
    """(how each ranks, its bytes, its speed at each of BATCHES as times float). FLOAT must come first. Raises MissingData."""
    import torch
    from glosses import load_glosses, ranking
    from minilm_model import Texts, evaluate, load_model, sentence_embedding

    from tersor.comparison import model_bytes

    fp32 = load_model()
    glosses = load_glosses(queries + CALIBRATION)
    texts = Texts(glosses.queries[:queries], glosses.documents[:queries])
    makers = variants(fp32, calibration(glosses.queries[queries:]))
    rankings, sizes, speeds = {}, {}, {}

    def call(model: nn.Module, shape: tuple[int, int]) -> Callable[[], object]:
        ids = torch.arange(1000, 1000 + shape[0] * shape[1]).view(shape)  # words; the values do not matter
        return partial(sentence_embedding, model, ids, torch.ones_like(ids))

    reference = None
    for name in names:
        if on_row:
            on_row(name)
        model = makers[name]()
        found = evaluate(model, texts)
        reference = reference or found
        rankings[name] = ranking(found.queries, found.documents, reference.queries)
        sizes[name] = model_bytes(model)
        speeds[name] = [times_float(call(fp32, shape), call(model, shape)) for shape in BATCHES]
    return rankings, sizes, speeds


def removed(rankings: dict[str, Ranking], size: int) -> float:
    """Share of round-to-nearest's 1 - cosine that GPTQ removes."""
    return 1 - (1 - rankings[GPTQ[size]].mean_cosine()) / (1 - rankings[INT4[size]].mean_cosine())


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--queries", type=click.IntRange(1), default=QUERIES, help="Definitions, and nouns to find them among.")
@click.option("--short", is_flag=True, help="Few queries and the main rows: shows that it runs, not the figures.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of torch.")
def main(queries: int, short: bool, threads: int) -> None:
    """Retrieval by all-MiniLM-L6-v2 in each format. Ten minutes or so."""
    cap_peers()
    import torch
    from minilm_model import MissingData

    queries, names = (200, (FLOAT, DYNAMIC, STATIC)) if short else (queries, NAMES)
    try:
        with torch_threads(threads), Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(names))
            rankings, sizes, speeds = run(queries, names, lambda name: progress.update(task, description=name, advance=1))
    except (ImportError, MissingData) as error:
        raise click.ClickException(str(error)) from None
    reference = rankings[FLOAT]
    table = Table(
        title=f"all-MiniLM-L6-v2, {queries} definitions of WordNet, {machine_name()}, torch {torch.__version__}",
        caption=f"float32: R@1 {reference.recall_at_1():.2f} %, mean reciprocal rank {reference.mean_reciprocal_rank():.4f}",
    )
    timed = [f"times float, {m} x {tokens}" for m, tokens in BATCHES]
    for column in ("", "cosine to float", "R@1, points", "MRR", "MB", *timed):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rankings.items():
        points, error = row.against(reference)
        table.add_row(
            name,
            f"{row.mean_cosine():.4f}",
            "-" if name == FLOAT else f"{points:+.2f} ± {error:.2f}",
            f"{row.mean_reciprocal_rank() - reference.mean_reciprocal_rank():+.4f}",
            f"{sizes[name] / 1e6:.1f}",
            *("-" if name == FLOAT else f"{speed:.2f}" for speed in speeds[name]),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
