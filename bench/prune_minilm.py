"""A real sentence encoder pruned at once, without training: magnitude, Wanda and SparseGPT at the same sparsity.

python bench/prune_minilm.py [--sparsity 0.5 | --pattern 2:4]

Layers are calibrated on some documents and judged by the pairs of the others: how far their embeddings move from those of the dense
model, and whether they still find each other. See minilm_model.py for the model and the texts.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from minilm import Accuracy, accuracy
from rich.console import Console
from rich.table import Table

from tersor.bench.timing import cap_peers, machine_name, torch_threads

if TYPE_CHECKING:
    from minilm_model import Texts
    from torch import nn

    from tersor.pruning_patterns import Pattern

SCORES = ("magnitude", "wanda", "sparsegpt")
DENSE = "dense"
CALIBRATION, TOKENS, BATCH = 64, 128, 16  # documents, the tokens they are cut at, rows of a call


class Score(NamedTuple):
    accuracy: Accuracy
    sparsity: float


def calibration(documents: list[str]) -> list[dict[str, Any]]:
    """Calls of the model, by length, so that little is padding."""
    import torch
    from minilm_model import load_tokenizer

    encodings = load_tokenizer().encode_batch(documents)
    ids = sorted((e.ids if len(e.ids) <= TOKENS else [*e.ids[: TOKENS - 1], e.ids[-1]] for e in encodings), key=len)
    calls = []
    for begin in range(0, len(ids), BATCH):
        rows = ids[begin : begin + BATCH]
        input_ids = torch.zeros(len(rows), len(rows[-1]), dtype=torch.int64)  # [PAD] is 0
        mask = torch.zeros_like(input_ids)
        for r, row in enumerate(rows):
            input_ids[r, : len(row)] = torch.tensor(row)
            mask[r, : len(row)] = 1
        calls.append({"input_ids": input_ids, "attention_mask": mask})
    return calls


def split(texts: Texts) -> tuple[list[str], Texts]:
    """(documents for calibration, pairs to be judged by): none is in both."""
    held_out = type(texts)(texts.queries[CALIBRATION:], texts.documents[CALIBRATION:])
    return texts.documents[:CALIBRATION], held_out


def prune(dense: nn.Module, score: str, pattern: Pattern, documents: list[str]) -> tuple[nn.Module, float]:
    """(a pruned copy, its sparsity): all linear layers of the encoder; the pooler is not part of the embedding."""
    import tersor

    model = copy.deepcopy(dense)
    calls = None if score == "magnitude" else calibration(documents)
    pruner = tersor.prune_(model, {"_default": pattern, "pooler.dense": None}, score=score, calibration=calls)
    return tersor.finalize_(model), pruner.sparsity()


def run(dense: nn.Module, texts: Texts, pattern: Pattern, console: Console | None = None) -> dict[str, Score]:
    """Of the dense model and each score."""
    from minilm_model import evaluate

    documents, held_out = split(texts)
    reference = evaluate(dense, held_out)
    found = {DENSE: Score(accuracy(reference, reference), 0.0)}
    for name in SCORES:
        if console:
            console.print(f"{name} ...", style="dim")
        model, sparsity = prune(dense, name, pattern, documents)
        found[name] = Score(accuracy(evaluate(model, held_out), reference), sparsity)
    return found


def table(scores: dict[str, Score], pattern: Pattern, pairs: int) -> Table:
    import torch

    out = Table(
        title=f"all-MiniLM-L6-v2, {pattern!r} at once, {machine_name()}, torch {torch.__version__}",
        caption=f"embeddings of {pairs} queries and documents against the dense model's; calibrated on {CALIBRATION} others",
    )
    for column in ("", "zeros", "mean cosine", "worst", "same top-1", "R@1"):
        out.add_column(column, justify="right" if column else "left")
    for name, (row, sparsity) in scores.items():
        cells = f"{row.mean_cosine:.4f}", f"{row.worst_cosine:.4f}", f"{100 * row.same_top1:.1f} %", f"{row.recall_at_1:.3f}"
        out.add_row(name, f"{sparsity:.1%}", *cells)
    return out


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--pattern", type=click.Choice(["unstructured", "2:4", "4:8"]), default="unstructured", help="Where the zeros may be."
)
@click.option("--sparsity", type=click.FloatRange(0, 1), default=0.5, help="Share of zeros, for unstructured.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of torch.")
def main(pattern: str, sparsity: float, threads: int) -> None:
    """Prune all-MiniLM-L6-v2 without training, by three scores. A minute or two."""
    cap_peers()
    import tersor

    try:
        from minilm_model import MissingData, load_model, load_texts

        texts, dense = load_texts(), load_model()
    except MissingData as error:
        raise click.ClickException(str(error)) from None
    wanted = {"2:4": tersor.NM(2, 4), "4:8": tersor.NM(4, 8)}.get(pattern, tersor.Unstructured(sparsity))
    with torch_threads(threads):
        scores = run(dense, texts, wanted, Console(stderr=True))
    Console(width=120).print(table(scores, wanted, len(texts.queries) - CALIBRATION))


if __name__ == "__main__":
    main()
