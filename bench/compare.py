"""Our int8 layer against every int8 peer that is installed, over the grid of shapes: CSV, plot, and the table of the README.

python bench/compare.py [--threads 1] [--runs 3] [--quick] [--csv out.csv] [--plot out.png]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from tersor.bench.timing import cap_peers, machine_name

CAP = cap_peers()

import peers  # noqa: E402, F401  (adds the peers beyond torch)
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402

import tersor  # noqa: E402
from tersor.bench.layers import KERNEL, OURS, Bench, Row  # noqa: E402
from tersor.bench.machine import Machine, this_machine  # noqa: E402
from tersor.bench.output import plot_roofline, write_csv  # noqa: E402
from tersor.bench.peers import rivals  # noqa: E402

ROWS = (1, 4, 16, 64, 256, 1024)
SHAPES = ((384, 1536), (1536, 384), (768, 3072), (3072, 768), (1024, 4096), (4096, 4096), (4096, 11008))  # K, N
# Never the best peer wherever tried; left out unless asked for, as they take most of the time.
SLOW = ("auto-round-lib", "bitsandbytes", "torchao", "torchao-compiled")


@dataclass(frozen=True)
class Point:
    """One shape: the row of each contender, which of them is the one in question, and who may stand against it."""

    k: int
    n: int
    m: int
    rows: dict[str, Row]
    name: str = OURS
    against: tuple[str, ...] = ()  # empty: every int8 peer

    @property
    def ours(self) -> Row:
        return self.rows[self.name]

    @property
    def best_peer(self) -> Row:
        """The fastest contender that is not ours, of the same width."""
        present = [self.rows[name] for name in self.against or rivals(8) if name in self.rows]
        return min(present, key=lambda row: row.timing.best)

    @property
    def ratio(self) -> float:
        """Time of the best peer / ours."""
        return self.best_peer.timing.best / self.ours.timing.best


def measure(bench: Bench, machine: Machine, on_case: Callable[[], None] = lambda: None) -> list[Point]:
    """All points of the bench, in its order."""
    found: dict[tuple[int, int, int], dict[str, Row]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row in bench.run(machine, on_case):
            found.setdefault((row.k, row.n, row.m), {})[row.name] = row
    return [Point(*case, rows) for case, rows in found.items()]


def median_run(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """Of each shape the measurement whose ratio is in the middle; the lower one of two."""
    return [sorted(same, key=lambda p: p.ratio)[(len(runs) - 1) // 2] for same in zip(*runs, strict=True)]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


SHORT = {"quantize-dynamic": "qdyn", "onnxruntime": "ort", "openvino": "ov", "auto-round-lib": "ark"}


def short(name: str) -> str:
    for long, abbreviation in SHORT.items():
        name = name.replace(long, abbreviation)
    return name


def markdown(points: Sequence[Point]) -> str:
    """K x N by M: times the best peer (bold where it is faster), which that is, and our percent of the limit."""
    rows = sorted({p.m for p in points})
    lines = ["| K x N | " + " | ".join(f"M={m}" for m in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for k, n in dict.fromkeys((p.k, p.n) for p in points):
        cells = []
        for m in rows:
            p = next(p for p in points if (p.k, p.n, p.m) == (k, n, m))
            times = f"{p.ratio:.2f}x" if p.ratio >= 1 else f"**{p.ratio:.2f}x**"
            cells.append(f"{times} {short(p.best_peer.name)} {p.ours.of_limit:.0%}")
        lines.append(f"| {k}x{n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(points: Sequence[Point]) -> str:
    """Times the best peer: geometric mean and worst point."""
    worst = min(points, key=lambda p: p.ratio)
    return (
        f"times the best peer: geometric mean {geometric_mean([p.ratio for p in points]):.3f}, worst {worst.ratio:.3f} "
        f"({worst.k}x{worst.n}, M={worst.m}, {worst.best_peer.name})"
    )


def contenders(all_peers: bool) -> tuple[str, ...]:
    return ("fp32", *(name for name in rivals(8) if all_peers or name not in SLOW))


@click.command()
@click.option("--threads", default=1, show_default=True, help="torch.set_num_threads, and the peers' own")
@click.option("--quick", is_flag=True, help="two shapes and three row counts only")
@click.option("--slow-peers", is_flag=True, help=f"also {', '.join(SLOW)}")
@click.option("--rounds", default=7, show_default=True)
@click.option("--runs", type=click.IntRange(1), default=1, show_default=True, help="of each point the one in the middle counts")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path), help="write every figure here")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="draw the roofline here")
def main(
    threads: int, quick: bool, slow_peers: bool, rounds: int, runs: int, csv_path: Path | None, plot_path: Path | None
) -> None:
    """Time int8 layers, float32 in and out with bias, against every int8 peer, interleaved in one process."""
    bench = Bench(
        SHAPES[:2] if quick else SHAPES,
        (1, 16, 256) if quick else ROWS,
        threads=threads,
        against=contenders(slow_peers),
        rounds=rounds,
    )
    machine = this_machine()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layers", total=runs * len(bench.cases()))
        points = median_run([measure(bench, machine, lambda: progress.advance(task)) for _ in range(runs)])
    click.echo(
        f"{machine_name()}, {threads} thread(s), torch {torch.__version__}, {CAP}, kernels: {tersor.info().kernels['gemm_w8']}\n"
    )
    click.echo(markdown(points))
    click.echo(f"\n{summary(points)}")
    fp32 = [p.rows["fp32"].timing.best / p.ours.timing.best for p in points]
    click.echo(f"times fp32: geometric mean {geometric_mean(fp32):.2f}, worst {min(fp32):.2f}")
    kernel = [p.rows[KERNEL].of_limit for p in points if p.m >= 256]
    if kernel:
        click.echo(f"kernel alone at M >= 256: {geometric_mean(kernel):.1%} of the limit, worst {min(kernel):.1%}")
    for reason in bench.skipped:
        click.echo(f"skipped: {reason}")
    if warning := bench.noise.warning():
        click.echo(f"warning: {warning}")
    measured = [row for p in points for row in p.rows.values()]
    if csv_path:
        write_csv(csv_path, measured)
    if plot_path:
        plot_roofline(plot_path, measured, machine.with_threads(threads), f"{machine_name()}, {threads} thread(s)")


if __name__ == "__main__":
    main()
