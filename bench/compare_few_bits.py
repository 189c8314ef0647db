"""Our layers of 4, 2 and 1 bits against every installed peer of the same width, over the grid of compare.py: tables and CSV.

python bench/compare_few_bits.py [--threads 1] [--quick] [--only int4] [--csv out.csv]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import compare  # before torch: holds oneDNN
import peers_few_bits  # noqa: F401  (adds the peers)
import torch
from rich.console import Console
from rich.progress import Progress

from tersor.bench.layers import OURS, Bench
from tersor.bench.machine import Machine, this_machine
from tersor.bench.our_formats import our_formats
from tersor.bench.output import write_csv
from tersor.bench.peers import rivals
from tersor.bench.timing import machine_name


class Duel(NamedTuple):
    """A format of ours and the peers it stands against: those whose weights take as many bits; of groups, of the same group."""

    format: str
    bits: int
    group: int | None


# One run for each width. Int4() meets every int4 peer: onnxruntime has none with a scale per channel.
DUELS: dict[str, tuple[Duel, ...]] = {
    "int4": (Duel("int4", 4, None), Duel("int4-g128", 4, 128), Duel("int4-g32", 4, 32)),
    "2-bit": (Duel("ternary", 2, None),),
    "binary": (Duel("binary-xnor", 1, None),),
}


Shapes = tuple[tuple[int, int], ...]


def bench_of(width: str, shapes: Shapes = compare.SHAPES, rows: tuple[int, ...] = compare.ROWS, **options: Any) -> Bench:
    """fp32, every format and every peer of one width, in turn; `options` as Bench has them."""
    first, *others = DUELS[width]
    against = ("fp32", *(f"tersor-{duel.format}" for duel in others), *rivals(first.bits))
    return Bench(shapes, rows, our_formats()[first.format], against=against, **options)


def measure(
    bench: Bench, width: str, machine: Machine, on_case: Callable[[], None] = lambda: None
) -> dict[str, list[compare.Point]]:
    """Points of each format; those without a peer are left out."""
    points = compare.measure(bench, machine, on_case)
    found = {}
    for i, duel in enumerate(DUELS[width]):
        against = rivals(duel.bits, duel.group)
        ours = OURS if i == 0 else f"tersor-{duel.format}"
        mine = [dataclasses.replace(p, name=ours, against=against) for p in points if any(name in p.rows for name in against)]
        if mine:
            found[duel.format] = mine
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--quick", is_flag=True, help="two shapes and three row counts only")
@click.option("--only", type=click.Choice(list(DUELS)), help="one width only")
@click.option("--rounds", type=click.IntRange(3), default=7)
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path), help="write every figure here")
def main(threads: int, quick: bool, only: str | None, rounds: int, csv_path: Path | None) -> None:
    """Time layers of few bits, float32 in and out with bias, against peers of the same width, interleaved in one process."""
    shapes, rows = (compare.SHAPES[:2], (1, 16, 256)) if quick else (compare.SHAPES, compare.ROWS)
    machine = this_machine()
    benches = {width: bench_of(width, shapes, rows, threads=threads, rounds=rounds) for width in DUELS if only in (None, width)}
    measured = []
    click.echo(f"{machine_name()}, {machine.isa}, {threads} thread(s), torch {torch.__version__}, {compare.CAP}\n")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layers", total=sum(len(bench.cases()) for bench in benches.values()))
        for width, bench in benches.items():
            found = measure(bench, width, machine, lambda: progress.advance(task))
            for name, points in found.items():
                click.echo(f"### {name}\n\n{compare.markdown(points)}\n\n{compare.summary(points)}\n")
            if found:
                measured += [row for p in next(iter(found.values())) for row in p.rows.values()]
            else:
                click.echo(f"### {width}: no peer is installed\n")
            for reason in bench.skipped:
                click.echo(f"skipped: {reason}")
            if warning := bench.noise.warning():
                click.echo(f"warning: {warning}")
    if csv_path and measured:
        write_csv(csv_path, measured)


if __name__ == "__main__":
    main()
