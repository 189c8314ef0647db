"""From how many zeros on a pruned layer pays: random weights and really pruned ones, against dense layers, torch's CSR and scipy.

    python bench/sparse.py [--weights random] [--quick] [--csv out.csv] [--plot out.png]

Prints a table for each weight: random 4096 x 4096, feed-forward layers of MiniLM and SmolLM2 (where their packages are installed;
`make peers`), pruned by magnitude. Speed-ups are over the dense int8 layer and fp32, interleaved in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click

from tersor.bench.timing import cap_peers, machine_name

CAP = cap_peers()

import torch  # noqa: E402
from minilm_model import MissingData  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from tersor.bench.output import write_csv  # noqa: E402
from tersor.bench.sparse import SparseBench, SparseRow, markdown, plot  # noqa: E402


def _minilm() -> nn.Module:
    import minilm_model

    return minilm_model.load_model()


def _smollm() -> nn.Module:
    import smollm_model

    return smollm_model.load_model()[0]


# name -> (model, name of its layer)
REAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "minilm": (_minilm, "encoder.layer.2.intermediate.dense"),
    "smollm": (_smollm, "model.layers.10.mlp.up_proj"),
}


def weights(names: tuple[str, ...]) -> Iterator[tuple[str, Tensor | None]]:
    """Name and weight; None: random numbers."""
    for name in names:
        if name == "random":
            yield name, None
            continue
        load, fqn = REAL[name]
        try:
            layer = load().get_submodule(fqn)
        except (MissingData, ImportError) as reason:
            click.echo(f"skipped: {name}: {reason}")
            continue
        assert isinstance(layer, nn.Linear)
        yield f"{name}, {fqn}", layer.weight.detach().float()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--weights", "names", type=click.Choice(("random", *REAL)), multiple=True, default=("random", *REAL))
@click.option("--quick", is_flag=True, help="three sparsities and two row counts only")
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path), help="write every figure here")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="draw the random weight's speed-ups")
def main(names: tuple[str, ...], quick: bool, threads: int, csv_path: Path | None, plot_path: Path | None) -> None:
    """Break-even tables of sparse layers."""
    click.echo(f"{machine_name()}, {threads} thread(s), torch {torch.__version__}, {CAP}\n")
    measured: list[SparseRow] = []
    for name, weight in weights(names):
        size = (4096, 4096) if weight is None else (weight.shape[1], weight.shape[0])
        bench = SparseBench(size, threads=threads, weight=weight)
        if quick:
            bench.rows, bench.sparsities, bench.patterns = (1, 64), (0.5, 0.8, 0.9), ("unstructured", "16x4")
        rows = list(bench.run())
        click.echo(f"### {name}, {size[1]} x {size[0]}\n\n{markdown(rows)}\n")
        for reason in bench.skipped:
            click.echo(f"skipped: {reason}")
        if warning := bench.noise.warning():
            click.echo(f"warning: {warning}")
        if weight is None and plot_path:
            plot(plot_path, rows, f"{machine_name()}, random {size[1]} x {size[0]}")
        measured += rows
    if csv_path:
        write_csv(csv_path, measured)


if __name__ == "__main__":
    main()
