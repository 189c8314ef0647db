"""Measurements of bench/targets.py on int8 layers; each runs once, however many rows read it."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
import threads
import torch
from torch import Tensor, nn

import tersor
import tersor.ops as ops
from tersor import native
from tersor.bench.layers import KERNEL, OURS, Bench
from tersor.bench.machine import Machine, this_machine
from tersor.bench.timing import interleaved, torch_threads
from tersor.choice import Choice


@functools.cache
def machine() -> Machine:
    """The limits of this machine, measured in this run."""
    return this_machine(fresh=True)


@functools.cache
def layer_errors() -> float:
    """Worst relative error (Frobenius) of an int8 layer, x ~ N(0, 1), default nn.Linear init, K <= 4096."""
    worst = 0.0
    with torch.inference_mode():
        for k in (64, 384, 768, 1536, 4096):
            linear = nn.Linear(k, 1024)
            x = torch.randn(64, k)
            want = linear(x)
            got = tersor.QuantLinear.from_linear(linear)(x)
            worst = max(worst, ((got - want).norm() / want.norm()).item())
    return worst


# ---- against peers --------------------------------------------------------------------------------------------------------------


@functools.cache
def layer_points(threads: int = 1) -> list[compare.Point]:
    bench = Bench(compare.SHAPES, compare.ROWS, threads=threads, against=compare.contenders(all_peers=False))
    return compare.measure(bench, machine())


def again(p: compare.Point) -> compare.Point:
    """The same point with more rounds: a disturbance of a few ms can spoil one of 42."""
    names = tuple(name for name in p.rows if name not in (OURS, KERNEL))
    return compare.measure(Bench(((p.k, p.n),), (p.m,), threads=p.ours.threads, against=names, rounds=21), machine())[0]


def quantize_dynamic_ratio(p: compare.Point) -> float:
    engines = [row.timing.best for name, row in p.rows.items() if name.startswith("quantize-dynamic")]
    return min(engines) / p.ours.timing.best


def worst_against_quantize_dynamic(few_rows: bool) -> float:
    """Smallest quantize_dynamic / ours over the grid, at M <= 64 or above; a point that falls short is measured again."""
    worst = math.inf
    for p in layer_points():
        if (p.m <= 64) != few_rows:
            continue
        ratio = quantize_dynamic_ratio(p)
        if ratio < (1.0 if few_rows else 0.9):
            ratio = quantize_dynamic_ratio(again(p))
        worst = min(worst, ratio)
    return worst


def geometric_mean_ratio(threads: int = 1) -> float:
    return compare.geometric_mean([p.ratio for p in layer_points(threads)])


def median_of_three(figure: float, bound: float, repeat: Callable[[], float]) -> float:
    """The figure, or where it falls short of the bound the median of three."""
    return figure if figure >= bound else statistics.median((figure, repeat(), repeat()))


@functools.cache
def worst_against_all(threads: int = 1) -> float:
    """Smallest (best int8 peer / ours) over the grid; a point below 1 counts with the median of three measurements."""
    return min(median_of_three(p.ratio, 1.0, lambda p=p: again(p).ratio) for p in layer_points(threads))  # type: ignore[misc]


def peers_note(threads: int) -> str:
    return f"first measurement: {compare.summary(layer_points(threads))}"


def kernel_of_limit(worst: bool) -> float:
    """Share of the measured int8 limit at M >= 256, K and N >= 768: geometric mean over the grid, or its worst shape."""
    shares = [p.rows[KERNEL].of_limit for p in layer_points() if p.m >= 256 and min(p.k, p.n) >= 768]
    return min(shares) if worst else compare.geometric_mean(shares)


# ---- against ourselves ----------------------------------------------------------------------------------------------------------

GRID = [(k, n, m) for (k, n), m in itertools.product(compare.SHAPES, compare.ROWS)]


def near_twice(k: int, n: int, m: int) -> bool:
    """Whether two threads are to come close to twice the speed."""
    return m >= 64 and k * n >= 768 * 3072


@functools.cache
def two_threads() -> dict[tuple[int, int, int], float]:
    """Times the speed of one thread, for each point of the grid; one that falls short counts with the median of three."""
    found = {}
    with torch_threads(1), torch.inference_mode():
        for point in GRID:
            repeat = functools.partial(threads.speedup, *point, threads=2)
            found[point] = median_of_three(repeat(rounds=7), 1.8 if near_twice(*point) else 1.0, repeat)
    return found


def worst_near_twice() -> float:
    return min(figure for point, figure in two_threads().items() if near_twice(*point))


def two_threads_note() -> str:
    (k, n, m), figure = min(two_threads().items(), key=lambda item: item[1])
    return f"worst {figure:.2f} ({k}x{n}, M={m}); geometric mean {compare.geometric_mean(list(two_threads().values())):.2f}"


def static_speed(k: int, n: int, m: int, rounds: int = 21) -> float:
    """Time of Int8Dynamic / Int8Static, on the same weight: where one lies in memory moves a layer by more than they differ."""
    linear, x = nn.Linear(k, n), torch.randn(m, k)
    dynamic, static = (tersor.QuantLinear.from_linear(linear, fmt) for fmt in (tersor.Int8Dynamic(), tersor.Int8Static(4 / 127)))
    static.weight_packed = dynamic.weight_packed
    times = interleaved({"dynamic": functools.partial(dynamic, x), "static": functools.partial(static, x)}, rounds)
    return times["dynamic"].best / times["static"].best


@functools.cache
def worst_static() -> float:
    """With few rows the two are equal: the pass over x that static spares takes as long as the tensor that it is given more."""
    with torch.inference_mode():
        return min(median_of_three(static_speed(*p, rounds=9), 1.0, functools.partial(static_speed, *p)) for p in GRID)


# ---- against the machine --------------------------------------------------------------------------------------------------------


def read_loop(data: Tensor) -> Callable[[], object]:
    """Reads all of `data` where it lies, in four streams: what a kernel that does nothing else would take."""
    module = native.numpy_module()
    assert module is not None
    view = data.detach().reshape(-1).numpy()  # the same memory, and so the same pages
    return lambda: module.run_limit("read", 1, view)


def product(layer: tersor.QuantLinear, x: Tensor) -> Callable[[], object]:
    """The kernel on int8 rows, called as read_loop is: through pybind11. torch's dispatcher would count as kernel."""
    module = native.numpy_module()
    assert module is not None
    weight = (layer.weight_packed, layer.weight_scale, layer.bias)
    arrays = [t.detach().numpy() for t in (*ops.quantize_rows(x), *weight)]
    return lambda: module.linear_s8(*arrays, "none", 8, None)


@functools.cache
def read_shares() -> dict[str, tuple[float, float]]:
    """At M = 1, for each shape whose weights are beyond L2: time to read the weights / time of (the kernel, the whole layer in
    torch)."""
    found = {}
    for k, n in compare.SHAPES:
        if k * n <= machine().caches["L2"]:
            continue
        layer, x = tersor.QuantLinear.from_linear(nn.Linear(k, n)), torch.randn(1, k)
        contenders = {"kernel": product(layer, x), "layer": functools.partial(layer, x), "read": read_loop(layer.weight_packed)}
        with torch.inference_mode():
            times = interleaved(contenders, rounds=15)
        found[f"{k}x{n}"] = (times["read"].best / times["kernel"].best, times["read"].best / times["layer"].best)
    return found


def read_note() -> str:
    return "kernel, whole layer: " + "; ".join(f"{shape} {a:.2f}, {b:.2f}" for shape, (a, b) in read_shares().items())


@functools.cache
def avx2_rows() -> list[dict[str, Any]]:
    """What bench/avx2.py measures, in a process of its own: the instruction set is chosen when the libraries are loaded."""
    command = [sys.executable, str(Path(__file__).parent / "avx2.py"), "--json"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    if found["isa"] != "avx2":
        raise RuntimeError(f"bench/avx2.py ran on {found['isa']}, expected avx2")
    return found["rows"]


def avx2_times_fp32(largest_m: int = compare.ROWS[-1]) -> list[float]:
    return [row["times_fp32"] for row in avx2_rows() if row["format"] == "int8" and row["M"] <= largest_m]


def avx2_kernel_of_limit() -> float:
    return min(row["of_limit"] for row in avx2_rows() if row["format"] == "kernel" and row["M"] >= 256)


# ---- single questions -----------------------------------------------------------------------------------------------------------


@functools.cache
def bfloat16_points() -> list[tuple[float, float]]:
    """(bfloat16 / float32 time of our layer, torch's own bfloat16 layer / ours), interleaved, at shapes that are not all call."""
    found = []
    for (k, n), m in itertools.product(((768, 3072), (1024, 4096), (4096, 4096)), (1, 16, 256)):
        linear, x = nn.Linear(k, n), torch.randn(m, k)
        ours, theirs, half = tersor.QuantLinear.from_linear(linear), copy.deepcopy(linear).bfloat16(), x.bfloat16()
        contenders = {
            "f32": functools.partial(ours, x),
            "bf16": functools.partial(ours, half),
            "peer": functools.partial(theirs, half),
        }
        with torch.inference_mode():
            t = interleaved(contenders, rounds=11)
        found.append((t["bf16"].best / t["f32"].best, t["peer"].best / t["bf16"].best))
    return found


@functools.cache
def wrong_choices() -> float:
    """How much slower the layer that only_if_faster chose is than the other, at worst, over 50 random shapes."""
    rng = random.Random(0)
    choice, worst = Choice(), 1.0
    for _ in range(50):
        k, n, m = (round(2 ** rng.uniform(0, top)) for top in (11, 11, 8))
        linear = nn.Linear(k, n)
        picked_packed = choice.speedup(linear, tersor.Int8Dynamic(), {m: 1}) is not None
        packed, x = tersor.QuantLinear.from_linear(linear), torch.randn(m, k)
        with torch.inference_mode():
            times = interleaved({"float": lambda: linear(x), "packed": lambda: packed(x)}, rounds=9, seconds=0.01)  # noqa: B023
        picked, other = (times["packed"], times["float"]) if picked_packed else (times["float"], times["packed"])
        worst = max(worst, picked.best / other.best)
    return worst


@functools.cache
def odd_sizes() -> float:
    """Time of a layer of odd sizes over that of the sizes rounded up (N to 16, K to 64, M to 8), at worst."""
    worst = 0.0
    for m, k, n in (
        (1, 383, 1535),
        (3, 1000, 1000),
        (7, 769, 3071),
        (13, 500, 77),
        (63, 1023, 4095),
        (65, 400, 900),
        (255, 767, 767),
    ):
        up = [-(-value // unit) * unit for value, unit in ((m, 8), (k, 64), (n, 16))]
        layers = [(torch.randn(a, b), tersor.QuantLinear.from_linear(nn.Linear(b, c))) for a, b, c in ((m, k, n), up)]
        with torch.inference_mode():
            times = interleaved({str(i): functools.partial(layer, x) for i, (x, layer) in enumerate(layers)}, rounds=11)
        worst = max(worst, times["0"].best / times["1"].best)
    return worst


def small_call_us(mode: Callable[[], object]) -> float:
    """Microseconds of one module call of a 16x16 layer at M = 1."""
    layer = tersor.QuantLinear.from_linear(nn.Linear(16, 16))
    x = torch.randn(1, 16)
    with mode():  # type: ignore[attr-defined]
        return interleaved({"call": lambda: layer(x)}, rounds=21, seconds=0.02)["call"].best * 1e6


@functools.cache
def weight_only(m: int) -> float:
    """fp32 / Int8WeightOnly at 4096x4096."""
    linear = nn.Linear(4096, 4096)
    layer = tersor.QuantLinear.from_linear(linear, tersor.Int8WeightOnly())
    x = torch.randn(m, 4096)
    with torch.inference_mode():
        seconds = interleaved({"fp32": lambda: linear(x), "ours": lambda: layer(x)}, rounds=11, seconds=0.05)
    return seconds["fp32"].best / seconds["ours"].best
