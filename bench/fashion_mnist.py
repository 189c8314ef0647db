"""Few bits on a real task: Fashion-MNIST, a float network, then quantisation-aware training in each format.

python bench/fashion_mnist.py [--seeds 3]
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tersor.bench.timing import Timing, cap_peers, interleaved, machine_name, torch_threads

if TYPE_CHECKING:
    from fashion_mnist_model import Data
    from torch import nn

    from tersor.formats import Format

FLOAT = "float32"
BATCHES = (1, 256)
CALIBRATION = 2048  # training images
SLICE_S = 0.05  # a contender's turn in a round


class Contender(NamedTuple):
    """config as of quantize_; drop: points below float that are promised for the mean of 3 seeds, gain: above plain conversion."""

    config: dict[str, Format | None]
    layers: str
    drop: float | None
    gain: float | None = None


def contenders(input_scales: dict[str, float]) -> dict[str, Contender]:
    """Every format by name. input_scales: of Int8Static, by layer."""
    from tersor import Binary, BinaryXnor, Int4, Int8Dynamic, Int8Static, Ternary

    int8 = Int8Dynamic()
    static = {name: Int8Static(scale) for name, scale in input_scales.items()}
    return {
        "Int8Dynamic": Contender({"_default": int8}, "all", 0.3),
        "Int8Static": Contender({**static}, "all", None),
        "Int4()": Contender({"_default": Int4(), "fc3": int8}, "last int8", None),
        # 784 is 24.5 groups of 32.
        "Int4(32)": Contender({"_default": Int4(32), "fc1": int8, "fc3": int8}, "first, last int8", 0.3),
        "Ternary": Contender({"_default": Ternary(), "fc3": int8}, "last int8", 0.7, 10),
        "Binary": Contender({"_default": Binary(), "fc3": int8}, "last int8", 1.0, 10),
        "BinaryXnor": Contender({"_default": BinaryXnor(), "fc1": int8, "fc3": int8}, "first, last int8", 1.5, 10),
    }


class Row(NamedTuple):
    accuracy: float  # percent, of the packed layers after QAT
    plain: float | None  # of the same float model, converted without QAT


class Result(NamedTuple):
    """What one seed gave: rows by name, FLOAT first, and the models that were evaluated."""

    rows: dict[str, Row]
    models: dict[str, nn.Module]


def input_scales(model: nn.Module, images: Any) -> dict[str, float]:
    """Largest |x| / 127 that each linear layer sees."""
    import torch

    seen: dict[str, float] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[name] = args[0].abs().max().item() / 127

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return seen


def run_seed(data: Data, seed: int, steps: int, only: tuple[str, ...], on_step: Callable[[str, int], None]) -> Result:
    """Trains a float model for `steps`, and from it, for `steps` more, float and every format in the same way."""
    import torch
    from fashion_mnist_model import FLOAT_DECAY, accuracy, mlp, train

    import tersor
    from tersor import train as qat

    def step(name: str, count: int = 1) -> None:
        on_step(f"seed {seed}: {name}", count)

    torch.manual_seed(seed)
    base = mlp()
    train(base, data.train, steps, seed, FLOAT_DECAY, partial(step, FLOAT))
    calibration = data.train.images[:CALIBRATION]
    chosen = {name: c for name, c in contenders(input_scales(base, calibration)).items() if not only or name in only}

    model = copy.deepcopy(base)
    train(model, data.train, steps, seed + 1000, FLOAT_DECAY, partial(step, f"{FLOAT}, as long as QAT"))
    rows, models = {FLOAT: Row(accuracy(model, data.test), None)}, {FLOAT: model}
    for name, contender in chosen.items():
        xnor = name == "BinaryXnor"
        plain = tersor.quantize_(copy.deepcopy(base), contender.config)
        model = qat.qat_(copy.deepcopy(base), contender.config)
        if xnor:  # both begin at the medians: plain conversion gets what helps it
            qat.calibrate_(plain, calibration)
            qat.calibrate_(model, calibration)
        train(model, data.train, steps, seed + 1000, 0.0, partial(step, name))
        models[name] = qat.convert_(model)
        rows[name] = Row(accuracy(models[name], data.test), accuracy(plain, data.test))
    return Result(rows, models)


def measure(models: dict[str, nn.Module], data: Data, threads: int, rounds: int) -> dict[int, dict[str, Timing]]:
    """Seconds of one call of each model, by batch."""
    import torch

    def calls(batch: int) -> dict[str, Callable[[], object]]:
        x = data.test.images[:batch]
        return {name: partial(model, x) for name, model in models.items()}

    with torch_threads(threads), torch.inference_mode():
        return {batch: interleaved(calls(batch), rounds, SLICE_S) for batch in BATCHES}


def table(results: list[Result], speed: dict[int, dict[str, Timing]], steps: int, threads: int) -> Table:
    import torch

    from tersor.comparison import model_bytes

    models = results[0].models
    sizes = {name: model_bytes(model) for name, model in models.items()}

    def mean(name: str, field: str) -> float:
        return statistics.fmean(getattr(result.rows[name], field) for result in results)

    out = Table(
        title=f"Fashion-MNIST, 784-1024-1024-10, {machine_name()}, {threads} thread(s), torch {torch.__version__}",
        caption=f"{steps} float steps, then {steps} more in the format named (float32: in float); accuracy of the packed layers on "
        f"10000 test images, mean of {len(results)} seed(s); promises hold for the mean of 3 seeds",
    )
    columns = ("", "layers", "accuracy %", "- float", "promised", "without QAT %", "kB", "smaller")
    for column in (*columns, *(f"images/s, batch {batch}" for batch in BATCHES)):
        out.add_column(column, justify="right" if column not in ("", "layers") else "left")
    known = contenders({})
    for name in models:
        contender = known.get(name)
        difference = mean(name, "accuracy") - mean(FLOAT, "accuracy")
        plain = None if contender is None else mean(name, "plain")
        cells = ["-", "-"]
        if contender is not None and contender.drop is not None:
            kept = difference >= -contender.drop and (contender.gain is None or mean(name, "accuracy") >= plain + contender.gain)
            cells[0] = f">= -{contender.drop:.1f} {'kept' if kept else 'MISSED'}"
        if plain is not None:
            cells[1] = f"{plain:.2f}"
        out.add_row(
            name,
            "all" if contender is None else contender.layers,
            f"{mean(name, 'accuracy'):.2f}",
            f"{difference:+.2f}" if contender else "-",
            *cells,
            f"{sizes[name] / 1e3:.0f}",
            f"{sizes[FLOAT] / sizes[name]:.1f}x",
            *(f"{batch / times[name].median:,.0f}" for batch, times in speed.items()),
        )
    return out


def options(steps: str, only: str) -> Callable[[Callable[..., None]], click.Command]:
    """The command line of a bench on Fashion-MNIST; `steps` and `only` are what its help says of these two."""

    def command(main: Callable[..., None]) -> click.Command:
        for option in (
            click.option("--only", multiple=True, help=only),
            click.option("--rounds", type=click.IntRange(1), default=9, help="Timed rounds; all models take turns in each."),
            click.option("--timed-threads", type=click.IntRange(1), default=1, help="Threads of torch for images/s."),
            click.option("--threads", type=click.IntRange(1), default=2, help="Threads of torch for training."),
            click.option("--steps", type=click.IntRange(2), default=400, help=steps),
            click.option("--seeds", type=click.IntRange(1), default=1, help="Runs to average; promised accuracies are means of 3."),
        ):
            main = option(main)
        return click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})(main)

    return command


def train_seeds(
    run_seed: Callable[..., Any], names: list[str], only: tuple[str, ...], seeds: int, steps: int, threads: int
) -> tuple[Data, list[Any]]:
    """(the images, what run_seed gives for each seed), with a progress bar."""
    from fashion_mnist_model import load_data
    from minilm_model import MissingData

    try:
        data = load_data()
    except MissingData as error:
        raise click.ClickException(str(error)) from None
    if unknown := set(only) - set(names):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; expected some of: {', '.join(names)}", param_hint="--only")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with torch_threads(threads), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=seeds * steps * (2 + (len(only) or len(names))))

        def on_step(description: str, advance: int) -> None:
            progress.update(task, description=description, advance=advance)

        return data, [run_seed(data, seed, steps, only, on_step) for seed in range(seeds)]


@options(
    steps="Float steps, and QAT steps, of 256 images.",
    only="A format to train, as the table names it; may be repeated. [default: all]",
)
def main(seeds: int, steps: int, threads: int, timed_threads: int, rounds: int, only: tuple[str, ...]) -> None:
    """Accuracy, bytes and images/s of a small network in every format, trained for it and merely converted.

    A few minutes a seed. Images come from Debian's dataset-fashion-mnist (make data).
    """
    cap = cap_peers()
    data, results = train_seeds(run_seed, list(contenders({})), only, seeds, steps, threads)
    speed = measure(results[0].models, data, timed_threads, rounds)
    console = Console(width=150)
    console.print(table(results, speed, steps, timed_threads))
    console.print(f"first layer of Int4(32): Int8Dynamic, since 784 is no multiple of 32; {cap}", soft_wrap=True)


if __name__ == "__main__":
    main()
