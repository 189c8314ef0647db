"""Measurements of bench/targets.py on layers of 4, 2 and 1 bits; each runs once, however many rows read it."""

from __future__ import annotations

import functools

import compare
import compare_few_bits
import torch
from target_int8 import avx2_rows, machine, read_loop
from torch import nn

import tersor
from tersor.bench.layers import stored_bytes
from tersor.bench.our_formats import arithmetic, our_formats
from tersor.bench.timing import Timing, hot_and_cold, interleaved

INT8 = "int8-dynamic"
# At M = 1, 4096 x 4096, weights hot: times the speed of int8
TIMES_INT8 = {"int4": 1.9, "int4-g128": 1.75, "int4-g32": 1.5, "ternary": 3.7, "binary": 5.0, "binary-xnor": 10.0}
# At M = 256: share of the limit, int8 or popcount
OF_LIMIT = {"int4": 0.75, "int4-g128": 0.60, "int4-g32": 0.42, "ternary": 0.78, "binary": 0.78, "binary-xnor": 0.78}
SIZE = 4096  # of the layer at M = 1
SQUARES = (1024, 2048, 4096)  # of the layers at M = 256
OF_POSSIBLE = 0.8  # of what the limits allow, where they do not allow what is asked


@functools.cache
def layers(size: int) -> dict[str, tersor.QuantLinear]:
    linear = nn.Linear(size, size)
    formats = our_formats()
    return {name: tersor.QuantLinear.from_linear(linear, formats[name]) for name in (INT8, *TIMES_INT8)}


# ---- one row, hot and cold ------------------------------------------------------------------------------------------------------


@functools.cache
def one_row() -> dict[str, tuple[Timing, Timing]]:
    """(hot, cold) of each layer and, as "read NAME", of a loop that reads its packed weight."""
    x = torch.randn(1, SIZE)
    contenders = {name: functools.partial(layer, x) for name, layer in layers(SIZE).items()}
    contenders |= {f"read {name}": read_loop(layers(SIZE)[name].weight_packed) for name in (INT8, "int4")}
    evict = read_loop(torch.ones(max(4 * machine().caches["L3"], 64 << 20), dtype=torch.uint8))
    with torch.inference_mode():
        return hot_and_cold(contenders, evict, rounds=15)


def times_int8(name: str, cold: bool = False) -> float:
    found = one_row()
    return found[INT8][cold].best / found[name][cold].best


def least_time(name: str) -> float:
    """Seconds that this machine's limits leave for the layer at M = 1, hot: its arithmetic, or reading what it stores."""
    layer, limits = layers(SIZE)[name], machine().limits[0]
    stored = stored_bytes(layer)
    arithmetic_s = SIZE * SIZE / (getattr(limits, arithmetic(layer.format)) * 1e9)
    return max(arithmetic_s, stored / (limits.read[machine().level(stored)] * 1e9))


def possible(name: str) -> float:
    """Times our int8 at most, by the limits of this run and our int8 as it ran."""
    return one_row()[INT8][0].best / least_time(name)


def times_int8_bound(name: str) -> float:
    """What is asked; where the machine's limits are below it, 0.8 of those."""
    asked = TIMES_INT8[name]
    return asked if asked <= possible(name) else OF_POSSIBLE * possible(name)


def times_int8_note(name: str) -> str:
    hot, cold = (timing.best * 1e6 for timing in one_row()[name])
    text = f"hot {hot:.0f} us, cold {cold:.0f} us; cold it is {times_int8(name, cold=True):.2f} times int8"
    if TIMES_INT8[name] > possible(name):
        layer = layers(SIZE)[name]
        limit = "popcount" if arithmetic(layer.format) == "popcount" else "int8"
        text += (
            f". Asked: {TIMES_INT8[name]:g}, but int8 runs so near the limits of this CPU ({limit} rate, reads) that no more than "
            f"{possible(name):.2f} is possible: promised is {OF_POSSIBLE:g} of that"
        )
    return text


def read_share(name: str) -> float:
    """Time to read the packed weight where it lies / time of the layer, hot."""
    found = one_row()
    return found[f"read {name}"][0].best / found[name][0].best


def read_note(name: str) -> str:
    found = one_row()
    gbytes = layers(SIZE)[name].weight_packed.numel() / 1e9
    return f"{gbytes / found[name][0].best:.0f} of {gbytes / found[f'read {name}'][0].best:.0f} GB/s"


# ---- many rows ------------------------------------------------------------------------------------------------------------------


@functools.cache
def many_rows() -> dict[str, list[float]]:
    """Share of the limit of its arithmetic at M = 256, whole layer, for each size."""
    found: dict[str, list[float]] = {name: [] for name in OF_LIMIT}
    rows, limits = 256, machine().limits[0]
    for size in SQUARES:
        x = torch.randn(rows, size)
        contenders = {name: functools.partial(layers(size)[name], x) for name in OF_LIMIT}
        with torch.inference_mode():
            times = interleaved(contenders, rounds=9, seconds=0.05)
        for name, timing in times.items():
            limit = getattr(limits, arithmetic(layers(size)[name].format))
            found[name].append(rows * size * size / timing.best / 1e9 / limit)
    return found


def many_rows_note(name: str) -> str:
    return ", ".join(f"{size}: {share:.2f}" for size, share in zip(SQUARES, many_rows()[name], strict=True))


# ---- against others -------------------------------------------------------------------------------------------------------------


@functools.cache
def peer_points(width: str) -> dict[str, list[compare.Point]]:
    return compare_few_bits.measure(compare_few_bits.bench_of(width, rounds=5), width, machine())


def times_peer(width: str, name: str) -> float:
    """Geometric mean over the grid; NaN, which holds nothing, where no peer is installed."""
    points = peer_points(width).get(name)
    return compare.geometric_mean([p.ratio for p in points]) if points else float("nan")


def times_peer_note(width: str, name: str) -> str:
    points = peer_points(width).get(name)
    return compare.summary(points) if points else "no peer of this width is installed"


def avx2_times_fp32(name: str) -> float:
    """At M = 1, worst of the shapes with K*N >= 768*3072, everyone held at AVX2."""
    return min(row["times_fp32"] for row in avx2_rows() if row["format"] == name and row["M"] == 1)
