"""What a second thread brings: our int8 layer on one thread and on more, interleaved.

python bench/threads.py [--threads 2]
"""

from __future__ import annotations

from functools import partial

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tersor
from tersor.bench.timing import interleaved, machine_name, torch_threads

SHAPES = ((384, 1536), (1536, 384), (768, 3072), (1024, 4096), (4096, 4096))  # K, N
ROWS = (1, 4, 16, 64, 256)


def call(layer: nn.Module, x: Tensor, threads: int) -> Tensor:
    torch.set_num_threads(threads)  # costs both sides the same, below a microsecond
    return layer(x)


def speedup(k: int, n: int, m: int, threads: int, rounds: int = 11) -> float:
    """Time of our int8 layer on one thread over that on `threads`."""
    layer, x = tersor.QuantLinear.from_linear(nn.Linear(k, n)), torch.randn(m, k)
    times = interleaved({str(t): partial(call, layer, x, t) for t in (1, threads)}, rounds)
    return times["1"].best / times[str(threads)].best


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--threads", type=click.IntRange(2), default=2)
def main(threads: int) -> None:
    """Ratio of times, one thread over several, for each shape and number of rows."""
    table = Table("K x N", *(f"M={m}" for m in ROWS), title=f"{machine_name()}: times faster with {threads} threads")
    with torch_threads(threads), torch.inference_mode():
        for k, n in SHAPES:
            table.add_row(f"{k} x {n}", *(f"{speedup(k, n, m, threads):.2f}" for m in ROWS))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
