"""Images: Fashion-MNIST by an MLP or a vision transformer, in every format.

python bench/vision.py mlp
python bench/vision.py vit      6 blocks of width 192 on patches of 7 x 7; more than an hour on two cores
python bench/vision.py vit --short

Each network is trained in float; formats that need training go on from it for a third as many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from every_format import FLOAT, NAMES, Example, models, table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tersor.bench.timing import cap_peers, torch_threads

if TYPE_CHECKING:
    from fashion_mnist_model import Data
    from torch import nn

# float steps; what shrink cuts for the student; the layers kept at int8: the last, and the MLP's first (784 is 24.5 groups of 32)
NETWORKS: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "mlp": (900, {"width": 0.5}, ("fc1", "fc3")),
    "vit": (2400, {"depth": 3}, ("vit.classifier",)),
}
TEMPERATURE, CALIBRATION = 2.0, 16


def prepare(name: str, data: Data, steps: int, on_step: Callable[[str], None]) -> Example:
    """The network, trained."""
    import torch
    from distill_fashion_mnist import images
    from fashion_mnist_model import FLOAT_DECAY, mlp, train, vit

    import tersor

    torch.manual_seed(0)
    base = {"mlp": mlp, "vit": vit}[name]()
    train(base, data.train, steps, 0, FLOAT_DECAY, lambda: on_step(FLOAT))
    _, shrink, kept = NETWORKS[name]

    def further(model: nn.Module, count: int, callback: Callable[[], Any]) -> None:
        def step() -> None:
            callback()
            on_step("")

        train(model, data.train, count, 1, 0.0, step)

    def distill(student: nn.Module, count: int) -> nn.Module:
        return tersor.distill(
            student,
            base,
            images(data.train, count, 2),
            steps=count,
            loss="kl",
            temperature=TEMPERATURE,
            callbacks=[lambda _: on_step("")],
        )

    seen = list(images(data.train, CALIBRATION, 3))
    return Example(base, further, distill, shrink, seen, steps // 3, tersor.Int4(32), kept)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("network", type=click.Choice(list(NETWORKS)))
@click.option("--steps", type=click.IntRange(8), help="Of 256 images for float; a third as many for a format. [default: 900, 2400]")
@click.option("--short", is_flag=True, help="10 steps: shows that it runs, not the figures.")
@click.option("--threads", type=click.IntRange(1), default=2, help="Threads of torch for training.")
@click.option("--timed-threads", type=click.IntRange(1), default=1, help="Threads of torch for images/s.")
@click.option("--rounds", type=click.IntRange(1), default=9, help="Timed rounds; all models take turns in each.")
def main(network: str, steps: int | None, short: bool, threads: int, timed_threads: int, rounds: int) -> None:
    """Fashion-MNIST by NETWORK in every format: accuracy, bytes, images a second. Images: make data."""
    cap_peers()
    from fashion_mnist_model import accuracy, load_data
    from minilm_model import MissingData

    steps = 10 if short else steps or NETWORKS[network][0]
    try:
        data = load_data()
    except MissingData as error:
        raise click.ClickException(str(error)) from None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with torch_threads(threads), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=steps + 3 * (steps // 3) + len(NAMES))

        def on_step(name: str) -> None:
            progress.update(bar, advance=1, **({"description": name} if name else {}))

        found = models(prepare(network, data, steps, on_step), on_step)
        figures = {name: accuracy(model, data.test) for name, model in found.items()}
    with torch_threads(timed_threads):
        title = f"Fashion-MNIST, {network}, {steps} float steps"
        Console(width=130).print(table(title, "accuracy %", "images", figures, found, (data.test.images,), rounds))


if __name__ == "__main__":
    main()
