"""A sentence encoder of 1 M parameters that learns from MiniLM's 23 M: which noun of WordNet does a definition mean?

python bench/distill_minilm.py [--seeds 3] [--short]

Student: embeddings of the 8000 commonest tokens, their mean, two linear layers. It trains on pairs of definitions and nouns, by
the contrastive loss alone (every other noun of the batch is wrong), or with MiniLM's embeddings of the same texts beside; then with
ternary linear layers. Judged on the nouns of bench/accuracy_minilm.py, which training does not see.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from accuracy_minilm import CALIBRATION, QUERIES
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tersor.bench.timing import cap_peers, machine_name, torch_threads

if TYPE_CHECKING:
    from torch import Tensor, nn

PAIRS, VOCABULARY, WIDTH, HIDDEN, EMBEDDING, TOKENS = 12000, 8000, 96, 384, 384, 32
BATCH, STEPS, RATE, SHARPNESS, WEIGHT = 256, 1000, 2e-3, 20.0, 0.3  # WEIGHT: of the contrastive loss beside the teacher's
ALONE, DISTILLED = "contrastive", "contrastive and distilled"
TERNARY, TERNARY_DISTILLED = "ternary, contrastive", "ternary, contrastive and distilled"
NAMES = (ALONE, DISTILLED, TERNARY, TERNARY_DISTILLED)


class Score(NamedTuple):
    recall_at_1: float
    mean_reciprocal_rank: float


class Task(NamedTuple):
    """Token ids of the student, int64 [pairs, TOKENS], 0: none; the teacher's unit vectors of the training texts."""

    queries: Tensor
    documents: Tensor
    taught_queries: Tensor
    taught_documents: Tensor
    test_queries: Tensor
    test_documents: Tensor


def load_task(pairs: int = PAIRS) -> Task:
    """Raises MissingData."""
    import torch
    from glosses import load_glosses
    from minilm_model import embed, load_model, load_tokenizer

    texts = load_glosses(QUERIES + CALIBRATION + pairs)
    test, rest = slice(0, QUERIES), slice(QUERIES + CALIBRATION, None)
    model, tokenizer = load_model(), load_tokenizer()
    ids = [[e.ids[1:-1] for e in tokenizer.encode_batch(part)] for part in (texts.queries, texts.documents)]
    counts = torch.bincount(
        torch.tensor([i for part in ids for row in part[rest] for i in row]), minlength=tokenizer.get_vocab_size()
    )
    known = torch.zeros(len(counts), dtype=torch.int64)  # 0: none, 1: any rare token
    common = counts.argsort(descending=True, stable=True)[: VOCABULARY - 2]
    known[:] = 1
    known[common] = torch.arange(2, len(common) + 2)

    def rows(part: list[list[int]]) -> Tensor:
        out = torch.zeros(len(part), TOKENS, dtype=torch.int64)
        for r, row in enumerate(part):
            cut = known[torch.tensor(row[:TOKENS])]
            out[r, : len(cut)] = cut
        return out

    queries, documents = map(rows, ids)
    taught = embed(model, texts.queries[rest], 32), embed(model, texts.documents[rest], 32)
    return Task(queries[rest], documents[rest], *taught, queries[test], documents[test])


def student() -> nn.Module:
    import torch
    from torch import nn

    class Student(nn.Module):
        """ids int64 [M, TOKENS] -> unit vectors f32 [M, EMBEDDING]; `at` is for a teacher that looks up what it knows."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
            self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, EMBEDDING)

        def forward(self, ids: Tensor, at: Tensor | None = None) -> Tensor:
            mask = (ids > 0).unsqueeze(-1).float()
            mean = (self.embedding(ids) * mask).sum(1) / mask.sum(1).clamp(min=1)
            return torch.nn.functional.normalize(self.fc2(torch.nn.functional.gelu(self.fc1(mean))), dim=1)

    return Student()


class Batches:
    """Pairs ((ids of BATCH queries then their documents, row numbers), None)."""

    def __init__(self, task: Task, steps: int, seed: int) -> None:
        self.task, self.steps, self.seed = task, steps, seed

    def __iter__(self) -> Any:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            at = torch.randint(len(self.task.queries), (BATCH,), generator=generator)
            yield (torch.cat([self.task.queries[at], self.task.documents[at]]), at), None


def similarities(vectors: Tensor) -> Tensor:
    """Log-odds of each document being that of each query, and the other way round, f32 [2 BATCH, BATCH]."""
    import torch

    queries, documents = vectors.chunk(2)
    scores = SHARPNESS * queries @ documents.T
    return torch.cat([scores, scores.T])


def contrastive(vectors: Tensor, _: Any) -> Tensor:
    import torch

    scores = similarities(vectors)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device) % scores.shape[1])


def taught(vectors: Tensor, teacher: Tensor) -> Tensor:
    """Towards the teacher's vectors, and its similarities."""
    from tersor.distillation import cosine, kl

    return 10 * cosine(vectors, teacher, 1.0) + kl(similarities(vectors), similarities(teacher), 1.0)


def score(model: nn.Module, task: Task) -> Score:
    import torch
    from glosses import ranking

    model.eval()
    with torch.inference_mode():
        found = ranking(model(task.test_queries), model(task.test_documents))
    return Score(found.recall_at_1(), found.mean_reciprocal_rank())


def run_seed(task: Task, seed: int, steps: int, on_row: Callable[[str], None] = lambda _: None) -> dict[str, Score]:
    import torch

    import tersor
    from tersor import train as qat

    def teacher(ids: Tensor, at: Tensor) -> Tensor:
        return torch.cat([task.taught_queries[at], task.taught_documents[at]])

    found = {}
    for name in NAMES:
        on_row(f"seed {seed}: {name}")
        torch.manual_seed(seed)
        model = student()
        if name in (TERNARY, TERNARY_DISTILLED):
            qat.qat_(model, tersor.Ternary())
        optimizer = torch.optim.Adam(model.parameters(), RATE)

        def decay(step: Any) -> None:
            step.optimizer.param_groups[0]["lr"] = RATE * (1 - step.step / steps)

        tersor.distill(
            model,
            teacher,
            Batches(task, steps, seed),
            steps=steps,
            loss=taught,
            target_loss=contrastive,
            target_weight=WEIGHT if name in (DISTILLED, TERNARY_DISTILLED) else 1.0,
            optimizer=optimizer,
            callbacks=[decay],
        )
        if name in (TERNARY, TERNARY_DISTILLED):
            qat.convert_(model)
        found[name] = score(model, task)
    return found


def mean(results: list[dict[str, Score]], name: str) -> Score:
    return Score(*(statistics.fmean(values) for values in zip(*(result[name] for result in results), strict=True)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seeds", type=click.IntRange(1), default=3, help="Runs to average.")
@click.option("--steps", type=click.IntRange(2), default=STEPS, help=f"Of {BATCH} pairs each.")
@click.option("--short", is_flag=True, help="One seed, few pairs and steps: shows that it runs, not the figures.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of torch.")
def main(seeds: int, steps: int, short: bool, threads: int) -> None:
    """Students of 1 M parameters, with and without MiniLM as their teacher. Ten minutes or so, most of them MiniLM's."""
    cap_peers()
    import torch
    from minilm_model import MissingData

    seeds, steps, pairs = (1, 20, 300) if short else (seeds, steps, PAIRS)
    try:
        with torch_threads(threads), Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("the teacher reads", total=seeds * len(NAMES) + 1)
            task = load_task(pairs)
            results = [
                run_seed(task, s, steps, lambda name: progress.update(bar, description=name, advance=1)) for s in range(seeds)
            ]
    except MissingData as error:
        raise click.ClickException(str(error)) from None
    size = sum(p.numel() for p in student().parameters())
    table = Table(
        title=f"Students of {size / 1e6:.2f} M parameters, {QUERIES} definitions, {machine_name()}, torch {torch.__version__}",
        caption=f"{steps} steps of {BATCH} pairs; mean of {seeds} seed(s)",
    )
    for column in ("", "R@1 %", "MRR", "R@1 of each seed"):
        table.add_column(column, justify="right" if column else "left")
    for name in NAMES:
        row = mean(results, name)
        each = " ".join(f"{result[name].recall_at_1:.2f}" for result in results)
        table.add_row(name, f"{row.recall_at_1:.2f}", f"{row.mean_reciprocal_rank:.4f}", each)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
