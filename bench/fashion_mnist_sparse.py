"""Pruning on a real task: Fashion-MNIST, a dense network, then pruned gradually and fine-tuned in each pattern.

python bench/fashion_mnist_sparse.py [--seeds 3]
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from fashion_mnist import BATCHES, measure, options, train_seeds
from rich.console import Console
from rich.table import Table

from tersor.bench.timing import Timing, cap_peers, machine_name

if TYPE_CHECKING:
    from fashion_mnist_model import Data
    from torch import nn

    from tersor.pruning_patterns import Pattern

DENSE, FLOAT = "dense", "dense, float32"
UNSTRUCTURED, BLOCK, TWO_OF_FOUR = "unstructured 90 %", "block 16x4 80 %", "2:4"
DROPS = {UNSTRUCTURED: 1.5, BLOCK: 1.0}  # points below dense that are promised for the mean of 3 seeds
RAMP, EVERY = 0.2, 5  # share of the steps in which sparsity rises, steps from mask to mask


def patterns() -> dict[str, Pattern]:
    """By name. fc3, the 10 classes, stays dense."""
    import tersor

    return {UNSTRUCTURED: tersor.Unstructured(0.9), BLOCK: tersor.Block((16, 4), 0.8), TWO_OF_FOUR: tersor.NM(2, 4)}


class Result(NamedTuple):
    """What one seed gave, by name, DENSE first: percent of the float models, share of zeros in fc1 and fc2, the models."""

    accuracies: dict[str, float]
    sparsities: dict[str, float]
    models: dict[str, nn.Module]


def run_seed(data: Data, seed: int, steps: int, only: tuple[str, ...], on_step: Callable[[str, int], None]) -> Result:
    """Trains a dense model for `steps`, and from it, for `steps` more, dense and every pattern in the same way."""
    import torch
    from fashion_mnist_model import FLOAT_DECAY, accuracy, mlp, train

    import tersor

    torch.manual_seed(seed)
    base = mlp()
    train(base, data.train, steps, seed, FLOAT_DECAY, partial(on_step, f"seed {seed}: {DENSE}", 1))
    result = Result({}, {}, {})
    for name, pattern in {DENSE: None, **patterns()}.items():
        if only and name not in (DENSE, *only):
            continue
        model = copy.deepcopy(base)
        schedule = tersor.CubicSchedule(end=max(1, int(RAMP * steps)), every=EVERY)
        pruner = tersor.prune_(model, {"_default": pattern, "fc3": None}, schedule=schedule) if pattern else None

        def step(pruner: tersor.Pruner | None = pruner, name: str = name) -> None:
            if pruner:
                pruner.step()
            on_step(f"seed {seed}: {name}", 1)

        train(model, data.train, steps, seed + 1000, FLOAT_DECAY, step)
        result.models[name] = tersor.finalize_(model) if pruner else model
        result.accuracies[name] = accuracy(model, data.test)
        result.sparsities[name] = pruner.sparsity() if pruner else 0.0
    return result


def packed(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The models as they are timed: dense in float and in int8, pruned in sparse int8."""
    import tersor

    found = {FLOAT: models[DENSE]}
    for name, model in models.items():
        config = {"_default": tersor.Int8Dynamic() if name == DENSE else tersor.SparseInt8(), "fc3": tersor.Int8Dynamic()}
        found[name] = tersor.quantize_(copy.deepcopy(model), config)
    return found


def table(
    results: list[Result], models: dict[str, nn.Module], speed: dict[int, dict[str, Timing]], steps: int, data: Data
) -> Table:
    import torch
    from fashion_mnist_model import accuracy

    from tersor.comparison import model_bytes

    def mean(name: str) -> float:
        return statistics.fmean(result.accuracies[name] for result in results)

    out = Table(
        title=f"Fashion-MNIST, 784-1024-1024-10, {machine_name()}, torch {torch.__version__}",
        caption=f"{steps} dense steps, then {steps} more, sparsity of fc1 and fc2 rising in the first {RAMP:.0%} of them; accuracy "
        f"of the float models on 10000 test images, mean of {len(results)} seed(s), promises hold for 3; what follows is of seed 0",
    )
    columns = ("", "layers", "zeros", "accuracy %", "- dense", "promised", "as packed %", "kB")
    for column in (*columns, *(f"images/s, batch {batch}" for batch in BATCHES)):
        out.add_column(column, justify="left" if column in ("", "layers") else "right")
    for name, model in models.items():
        trained = DENSE if name == FLOAT else name
        drop = mean(trained) - mean(DENSE)
        promised = f">= -{DROPS[name]:.1f} {'kept' if drop >= -DROPS[name] else 'MISSED'}" if name in DROPS else "-"
        out.add_row(
            name,
            "float32" if name == FLOAT else repr(model.fc1.format),
            f"{results[0].sparsities[trained]:.0%}",
            f"{mean(trained):.2f}",
            "-" if trained == DENSE else f"{drop:+.2f}",
            promised,
            f"{accuracy(model, data.test):.2f}",
            f"{model_bytes(model) / 1e3:.0f}",
            *(f"{batch / times[name].median:,.0f}" for batch, times in speed.items()),
        )
    return out


@options(
    steps="Dense steps, and as many pruned ones, of 256 images.",
    only="A pattern to train, as the table names it; may be repeated. [default: all]",
)
def main(seeds: int, steps: int, threads: int, timed_threads: int, rounds: int, only: tuple[str, ...]) -> None:
    """Accuracy, bytes and images/s of a small network, dense and pruned.

    A few minutes a seed. Images come from Debian's dataset-fashion-mnist (make data).
    """
    cap = cap_peers()
    data, results = train_seeds(run_seed, list(patterns()), only, seeds, steps, threads)
    models = packed(results[0].models)
    speed = measure(models, data, timed_threads, rounds)
    console = Console(width=150)
    console.print(table(results, models, speed, steps, data))
    console.print(f"fc3 stays dense; {cap}", soft_wrap=True)


if __name__ == "__main__":
    main()
