"""A teacher's answers instead of labels: Fashion-MNIST with 1000 labels, and a ternary student.

python bench/distill_fashion_mnist.py [--seeds 3] [--short]

Teacher: 784-1024-1024-10, trained on all labels. Student: 784-256-256-10. It sees 1000 labels alone; or all images without labels,
but with what the teacher says of them, its first choice or its probabilities. Shrunk students are cut out of the teacher.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tersor.bench.timing import cap_peers, machine_name, torch_threads

if TYPE_CHECKING:
    from fashion_mnist_model import Data
    from torch import nn

LABELS, STEPS, HIDDEN, TEMPERATURE = 1000, 400, 256, 2.0
WIDTHS = (0.5, 0.25, 0.125)
TEACHER, ALONE, HARD, SOFT = (
    "teacher, all labels",
    "1000 labels alone",
    "hard answers of the teacher",
    "soft answers of the teacher",
)
TERNARY, TERNARY_SOFT = "ternary student, hard answers", "ternary student, soft answers"
SHRUNK = {width: f"shrunk to {width:g} of its width, untrained" for width in WIDTHS}
NAMES = (TEACHER, ALONE, HARD, SOFT, TERNARY, TERNARY_SOFT, *SHRUNK.values())


def run_seed(data: Data, seed: int, steps: int, on_row: Callable[[str], None] = lambda _: None) -> dict[str, float]:
    """Test accuracy in percent, by name."""
    import torch
    from fashion_mnist_model import FLOAT_DECAY, Split, accuracy, mlp, train

    import tersor
    from tersor import train as qat

    def started(name: str) -> None:
        on_row(f"seed {seed}: {name}")

    torch.manual_seed(seed)
    teacher = mlp()
    started(TEACHER)
    train(teacher, data.train, steps, seed, FLOAT_DECAY)
    found = {TEACHER: accuracy(teacher, data.test)}

    chosen = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(seed))[:LABELS]
    few = Split(data.train.images[chosen], data.train.labels[chosen])
    torch.manual_seed(seed + 100)
    begin = mlp(HIDDEN)
    started(ALONE)
    alone = copy.deepcopy(begin)
    train(alone, few, steps, seed, FLOAT_DECAY)
    found[ALONE] = accuracy(alone, data.test)

    def hard(got: Any, want: Any) -> Any:
        return torch.nn.functional.cross_entropy(got, want.argmax(-1))

    def from_teacher(model: nn.Module, loss: Any) -> nn.Module:
        return tersor.distill(model, teacher, images(data.train, steps, seed), steps=steps, loss=loss, temperature=TEMPERATURE)

    for name, loss in ((HARD, hard), (SOFT, "kl")):
        started(name)
        found[name] = accuracy(from_teacher(copy.deepcopy(begin), loss), data.test)
    config = {"_default": tersor.Ternary(), "fc3": tersor.Int8Dynamic()}
    for name, loss in ((TERNARY, hard), (TERNARY_SOFT, "kl")):
        started(name)
        model = from_teacher(qat.qat_(copy.deepcopy(begin), config), loss)
        found[name] = accuracy(qat.convert_(model), data.test)
    for width, name in SHRUNK.items():
        started(name)
        found[name] = accuracy(tersor.shrink(teacher.eval(), width=width, inputs=data.train.images[:2048]), data.test)
    return found


class images:
    """Batches of images, half of them mirrored; the same ones whenever gone through."""

    def __init__(self, data: Any, steps: int, seed: int) -> None:
        self.data, self.steps, self.seed = data, steps, seed

    def __iter__(self) -> Any:
        import torch
        from fashion_mnist_model import BATCH, SIDE

        generator = torch.Generator().manual_seed(self.seed)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(self.steps):
            if len(order) < BATCH:
                order = torch.randperm(len(self.data.labels), generator=generator)
            rows, order = order[:BATCH], order[BATCH:]
            x = self.data.images[rows]
            mirrored = x.view(-1, SIDE, SIDE).flip(2).reshape(BATCH, -1)
            yield torch.where(torch.rand(BATCH, 1, generator=generator) < 0.5, mirrored, x)


def mean(results: list[dict[str, float]], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--seeds", type=click.IntRange(1), default=3, help="Runs to average.")
@click.option("--steps", type=click.IntRange(2), default=STEPS, help="Steps of the teacher and of every student, 256 images each.")
@click.option("--short", is_flag=True, help="One seed, 20 steps: shows that it runs, not the figures.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of torch.")
def main(seeds: int, steps: int, short: bool, threads: int) -> None:
    """What a teacher's answers are worth beside labels. A few minutes a seed; images: make data."""
    cap_peers()
    import torch
    from fashion_mnist_model import load_data
    from minilm_model import MissingData

    seeds, steps = (1, 20) if short else (seeds, steps)
    try:
        data = load_data()
    except MissingData as error:
        raise click.ClickException(str(error)) from None
    with torch_threads(threads), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=seeds * len(NAMES))
        results = [run_seed(data, s, steps, lambda name: progress.update(task, description=name, advance=1)) for s in range(seeds)]
    table = Table(
        title=f"Fashion-MNIST, students of 784-256-256-10, {machine_name()}, torch {torch.__version__}",
        caption=f"{steps} steps of 256 images each; 10000 test images, mean of {seeds} seed(s)",
    )
    for column in ("", "accuracy %", "seeds"):
        table.add_column(column, justify="right" if column else "left")
    for name in NAMES:
        table.add_row(name, f"{mean(results, name):.2f}", " ".join(f"{result[name]:.2f}" for result in results))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
