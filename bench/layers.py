"""Single layers against fp32 nn.Linear and torch's quantize_dynamic: the table of the README.

python bench/layers.py [--threads 1] [--csv out.csv] [--quick]
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass

import click
from timing import Timing, cap_peers, interleaved, machine, quantize_dynamic_engines, torch_quantize_dynamic

CAP = cap_peers()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

import tersor  # noqa: E402

ROWS = (1, 4, 16, 64, 256, 1024)
SHAPES = ((384, 1536), (768, 3072), (1024, 4096), (4096, 4096))  # K, N


@dataclass(frozen=True)
class Point:
    """One shape, timed: fp32, the best engine of quantize_dynamic, ours."""

    m: int
    k: int
    n: int
    fp32: Timing
    peer: Timing
    engine: str
    ours: Timing

    @property
    def gmacs(self) -> float:
        return self.m * self.k * self.n / self.ours.best / 1e9


class Layers:
    """The contenders of one (K, N), made once."""

    def __init__(self, k: int, n: int, fmt: tersor.formats.Format | None = None) -> None:
        torch.manual_seed(0)
        self.k, self.n = k, n
        self.linear = nn.Linear(k, n).eval()
        model = nn.Sequential(self.linear)
        self.peers = {engine: torch_quantize_dynamic(model, engine)[0] for engine in quantize_dynamic_engines()}
        self.ours = tersor.QuantLinear.from_linear(self.linear, fmt or tersor.Int8Dynamic())

    @torch.inference_mode()
    def time(self, m: int, rounds: int = 7) -> Point:
        x = torch.randn(m, self.k)
        contenders = {"fp32": lambda: self.linear(x), "ours": lambda: self.ours(x)}
        contenders |= {engine: (lambda layer=layer: layer(x)) for engine, layer in self.peers.items()}
        seconds = interleaved(contenders, rounds)
        engine = min(self.peers, key=lambda e: seconds[e].best)
        return Point(m, self.k, self.n, seconds["fp32"], seconds[engine], engine, seconds["ours"])


def measure(shapes: Iterable[tuple[int, int]] = SHAPES, rows: tuple[int, ...] = ROWS) -> list[Point]:
    points = []
    for k, n in shapes:
        layers = Layers(k, n)
        points += [layers.time(m) for m in rows]
    return points


@click.command()
@click.option("--threads", default=1, show_default=True, help="torch.set_num_threads")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False), help="also write every figure here")
@click.option("--quick", is_flag=True, help="two shapes and three row counts only")
def main(threads: int, csv_path: str | None, quick: bool) -> None:
    """Time int8 layers, float32 in and out with bias, against fp32 nn.Linear and torch's quantize_dynamic, interleaved."""
    torch.set_num_threads(threads)
    shapes = track(SHAPES[:2] if quick else SHAPES, "layers", console=Console(stderr=True))
    points = measure(shapes, (1, 16, 256) if quick else ROWS)
    table = Table(title=f"{machine()}, {threads} thread(s), torch {torch.__version__}, {CAP}, tersor {tersor.info().kernels}")
    for column in ("K x N", "M", "fp32 us", "quantize_dynamic", "tersor us", "tersor", "tersor / quantize_dynamic", "GMAC/s"):
        table.add_column(column, justify="right")
    for p in points:
        table.add_row(
            f"{p.k} x {p.n}",
            str(p.m),
            f"{p.fp32.best * 1e6:.1f}",
            f"{p.fp32.best / p.peer.best:.2f}x ({p.engine})",
            f"{p.ours.best * 1e6:.1f}",
            f"{p.fp32.best / p.ours.best:.2f}x",
            f"{p.peer.best / p.ours.best:.2f}x",
            f"{p.gmacs:.0f}",
        )
    Console(width=140).print(table)
    if csv_path:
        with open(csv_path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["K", "N", "M", "engine", "fp32_us", "fp32_median_us", "peer_us", "peer_median_us", "ours_us", "ours_median_us"]
            )
            for p in points:
                times = [t * 1e6 for timing in (p.fp32, p.peer, p.ours) for t in (timing.best, timing.median)]
                writer.writerow([p.k, p.n, p.m, p.engine, *(f"{t:.2f}" for t in times)])


if __name__ == "__main__":
    main()
