"""What huge pages bring: the same int8 layer with its weights in 4 KiB pages and in 2 MiB pages, interleaved.

python bench/huge_pages.py [--threads 1]
"""

from __future__ import annotations

import copy
from functools import partial

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import tersor
from tersor.bench.timing import interleaved, machine_name, torch_threads
from tersor.nn import in_huge_pages

SHAPES = ((1024, 4096), (4096, 4096), (4096, 11008))  # K, N
ROWS = (1, 4, 16, 64, 256)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--threads", type=click.IntRange(1), default=1)
def main(threads: int) -> None:
    """Ratio of times, 4 KiB pages over 2 MiB pages, for each shape and number of rows."""
    table = Table("K x N", *(f"M={m}" for m in ROWS), title=f"{machine_name()}, {threads} thread(s): times faster with huge pages")
    with torch_threads(threads), torch.inference_mode():
        for k, n in SHAPES:
            small = tersor.QuantLinear.from_linear(nn.Linear(k, n))
            small._parameters["weight_packed"] = nn.Parameter(small.weight_packed.clone(), requires_grad=False)
            huge = copy.deepcopy(small)
            in_huge_pages(huge.weight_packed)
            cells = []
            for m in ROWS:
                x = torch.randn(m, k)
                times = interleaved({"small": partial(small, x), "huge": partial(huge, x)}, rounds=9, seconds=0.03)
                cells.append(f"{times['small'].best / times['huge'].best:.2f}")
            table.add_row(f"{k} x {n}", *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
