"""Measurements of bench/targets.py on sparse layers; each runs once, however many rows read it."""

from __future__ import annotations

import functools

import torch
from torch import nn

from tersor import QuantLinear
from tersor.bench.sparse import (
    CSR,
    CSR_LINEAR,
    DENSE,
    FLOAT,
    FP32,
    INT8,
    SCIPY,
    SparseBench,
    SparseRow,
    chosen,
    pruned,
    with_weight,
)
from tersor.bench.timing import interleaved, torch_threads
from tersor.formats import Int8Dynamic, SparseInt8

HIGH = (0.8, 0.9, 0.95)
WRONG = 1.05  # time over the fastest from which a choice was the wrong one


@functools.cache
def points(k: int = 4096) -> dict[tuple[str, float, int, str], SparseRow]:
    """(pattern, sparsity, M, contender) -> row of a random layer K x 4096."""
    bench = SparseBench((k, 4096), (1, 64, 256), ("unstructured", "16x4"), HIGH, others=(), rounds=7)
    return {(r.pattern, r.sparsity, r.m, r.name): r for r in bench.run()}


@functools.cache
def beside_others(k: int) -> dict[tuple[int, str], SparseRow]:
    """(M, contender) -> row at 90 %, unstructured, with those that are not ours: they take most of the time."""
    return {(r.m, r.name): r for r in SparseBench((k, 4096), (64, 256), ("unstructured",), (0.9,), rounds=3).run()}


def one_row(against: str) -> float:
    """Unstructured SparseInt8 at M = 1, hot: times `against`, worst of three sparsities."""
    rows = [points()["unstructured", s, 1, INT8] for s in HIGH]
    return min(r.times_int8 if against == DENSE else r.times_fp32 for r in rows)


def one_row_note() -> str:
    rows = [(s, points()["unstructured", s, 1, INT8], points()["unstructured", s, 1, DENSE]) for s in HIGH]
    return ", ".join(
        f"{s:.0%}: hot {r.timing.best * 1e6:.0f} us of {d.timing.best * 1e6:.0f}, cold {r.cold.best * 1e6:.0f} of "
        f"{d.cold.best * 1e6:.0f}"
        for s, r, d in rows
        if r.cold and d.cold
    )


def stored_share() -> float:
    return points()["unstructured", 0.9, 1, INT8].of_dense


@functools.cache
def empty_layer_s() -> float:
    """Seconds of a layer of the same size at M = 1 that has nothing but zeros: call, quantisation, epilogue."""
    linear = nn.Linear(4096, 4096)
    nn.init.zeros_(linear.weight)
    layer, x = QuantLinear.from_linear(linear, SparseInt8()), torch.randn(1, 4096)
    with torch.inference_mode(), torch_threads(1):
        return interleaved({"empty": lambda: layer(x)})["empty"].best


def block_time_over_density(sparsity: float) -> float:
    """At M = 1, hot: time over (density x time of dense int8)."""
    return 1 / points()["16x4", sparsity, 1, INT8].times_int8 / (1 - sparsity)


def empty_over_density(sparsity: float) -> float:
    """The same figure if what is not zero took its share of dense int8's time, on top of the empty layer."""
    return 1 + empty_layer_s() / ((1 - sparsity) * points()["16x4", sparsity, 1, DENSE].timing.best)


def block_note(sparsity: float) -> str:
    us = {name: points()["16x4", sparsity, 1, name].timing.best * 1e6 for name in (INT8, DENSE)}
    return (
        f"{us[INT8]:.0f} us of {us[DENSE]:.0f}; a layer of zeros alone takes {empty_layer_s() * 1e6:.1f} us, which with the share "
        f"of what is not zero makes {empty_over_density(sparsity):.2f}"
    )


def block_rows(sparsity: float) -> float:
    return points()["16x4", sparsity, 64, INT8].times_int8


def float_times_fp32(k: int, m: int, sparsity: float) -> float:
    return points(k)["unstructured", sparsity, m, FLOAT].times_fp32


def float_note(k: int, m: int, sparsity: float) -> str:
    us = {name: points(k)["unstructured", sparsity, m, name].timing.best * 1e6 for name in (FLOAT, FP32)}
    return f"{us[FLOAT]:.0f} us, fp32 {us[FP32]:.0f} us"


def float_times_best_other() -> float:
    """At 90 %, worst of M = 64, 256 and K = 1024, 4096: time of the best of torch's CSR and scipy / ours."""
    worst = float("inf")
    for k in (1024, 4096):
        for m in (64, 256):
            at = {name: beside_others(k).get((m, name)) for name in (FLOAT, CSR, CSR_LINEAR, SCIPY)}
            ours = at.pop(FLOAT)
            assert ours is not None
            worst = min(worst, min(r.timing.best for r in at.values() if r) / ours.timing.best)
    return worst


def float_times_int8() -> float:
    """SparseFloat at 95 %, M = 64: times dense int8, the worse of K = 1024 and 4096."""
    return min(points(k)["unstructured", 0.95, 64, FLOAT].times_int8 for k in (1024, 4096))


def time_over_fastest(layer: nn.Linear, packed: list[QuantLinear], m: int, rounds: int = 5) -> tuple[float, str]:
    """At M rows: time of what only_if_faster made of the layer / of the fastest of it and the packed ones; both by name."""
    x = torch.randn(m, layer.in_features)
    layers = {"None": layer, **{repr(q.format): q for q in packed}}
    times = interleaved({name: functools.partial(q, x) for name, q in layers.items()}, rounds, 0.01)
    picked, fastest = repr(chosen(layer, SparseInt8(), m)), min(times, key=lambda name: times[name].best)
    return times[picked].best / times[fastest].best, f"{picked} for {fastest}"


@functools.cache
def choices() -> dict[tuple[str, float, int], tuple[float, str]]:
    """time_over_fastest of each (pattern, zeros, M) of the break-even table; beyond 1.05 the median of three counts."""
    bench, found = SparseBench(), {}
    linear = nn.Linear(*bench.size)
    with torch.no_grad(), torch_threads(1):
        for pattern, sparsity in bench.cases():
            layer = with_weight(linear, pruned(linear.weight, pattern, sparsity))
            packed = [QuantLinear.from_linear(layer, fmt) for fmt in (SparseInt8(), Int8Dynamic())]
            for m in bench.rows:
                got = time_over_fastest(layer, packed, m)
                if got[0] > WRONG:
                    got = sorted([got, *(time_over_fastest(layer, packed, m, 15) for _ in range(2))])[1]
                found[pattern, sparsity, m] = got
    return found


def wrong_choices() -> float:
    return max(ratio for ratio, _ in choices().values())


def choices_note() -> str:
    (pattern, sparsity, m), (ratio, names) = max(choices().items(), key=lambda item: item[1][0])
    return f"{len(choices())} points; worst {ratio:.3f}, {names}: {pattern} {sparsity:.0%}, M = {m}"
