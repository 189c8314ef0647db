"""Layers as a model calls them: one after the other, together larger than the caches, so that every weight comes from memory.

python bench/many_layers.py [--k 576 --n 1536] [--m 1,2,4] [--threads 1]
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from tersor.bench.timing import cap_peers, interleaved, keep_freed_memory, machine_name, torch_threads

cap_peers()

import torch  # noqa: E402
from target_int8 import read_loop  # noqa: E402
from torch import nn  # noqa: E402

import tersor  # noqa: E402
from tersor.bench.layers import stored_bytes  # noqa: E402
from tersor.bench.machine import this_machine  # noqa: E402
from tersor.bench.our_formats import our_formats  # noqa: E402

FORMATS = ("int8-dynamic", "int4", "int4-g32", "ternary", "binary", "binary-xnor")
CACHES = 2  # times the last level, at least


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


class Layers(NamedTuple):
    count: int
    size: int  # bytes of one
    passes: dict[str, Callable[[], None]]  # over all of them: "read", and one for each number of rows


def layers_of(name: str, k: int, n: int, rows: list[int]) -> Layers:
    """In a format of ours, or in fp32."""
    linear = nn.Linear(k, n)
    first = linear if name == "fp32" else tersor.QuantLinear.from_linear(linear, our_formats()[name])
    size = 4 * k * n if name == "fp32" else stored_bytes(first)
    count = -(-CACHES * this_machine().caches["L3"] // size)
    layers = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    passes = {} if name == "fp32" else {"read": in_turn([read_loop(layer.weight_packed) for layer in layers])}
    for m in rows:
        x = torch.randn(m, k)
        passes[str(m)] = in_turn([partial(layer, x) for layer in layers])
    return Layers(count, size, passes)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--k", type=click.IntRange(32), default=576)
@click.option("--n", type=click.IntRange(1), default=1536)
@click.option("--m", default="1,2,4", help="Rows.")
@click.option("--threads", type=click.IntRange(1), default=1)
def main(k: int, n: int, m: str, threads: int) -> None:
    """Microseconds a layer, and times fp32, where the weights of each call come from memory; beside it a loop that reads them."""
    keep_freed_memory()
    rows = [int(part) for part in m.split(",")]
    title = f"{k} x {n}, {machine_name()}, {threads} thread(s): us a layer (times fp32)"
    table = Table("", "layers", "kB", "read loop", *(f"M = {r}" for r in rows), title=title)
    with torch_threads(threads), torch.inference_mode():
        found = {name: layers_of(name, k, n, rows) for name in ("fp32", *FORMATS) if name != "int4-g32" or k % 32 == 0}
        calls = {(name, what): run for name, layers in found.items() for what, run in layers.passes.items()}
        timings = interleaved({" ".join(key): run for key, run in calls.items()}, rounds=7, seconds=0.05)
    us = {(name, what): timings[f"{name} {what}"].best / found[name].count * 1e6 for name, what in calls}
    for name, layers in found.items():
        read = f"{us[name, 'read']:.1f}" if "read" in layers.passes else ""
        cells = (f"{us[name, str(r)]:.1f} ({us['fp32', str(r)] / us[name, str(r)]:.1f})" for r in rows)
        table.add_row(name, str(layers.count), f"{layers.size / 1e3:,.0f}", read, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
