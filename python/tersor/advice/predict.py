"""The time of a linear layer within a model on this machine, from its measured limits: arithmetic, reading the weights from the
cache that still holds them, the passes over x and y, and the cost of a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..bench.machine import Limits, Machine
from ..bench.our_formats import arithmetic
from ..bench.timing import hot_and_cold
from ..formats import Format, Int4
from ..nn import HUGE_BYTES, QuantLinear

# Share of the limit of its arithmetic that a kernel reaches with one row, with 2 to 7, and with more, where it does not wait for
# weights. Fitted to `tersor bench linear` on Zen 4, layers of 384 to 3072 features; bench/target_advice.py checks the predictions.
_SHARES: dict[str, tuple[float, float, float]] = {
    "int8-dynamic": (0.80, 0.80, 0.94),
    "int8-static": (0.80, 0.80, 0.94),
    "int8-weight-only": (0.33, 0.88, 0.88),
    "int4": (0.56, 0.84, 0.90),
    "int4-g128": (0.53, 0.80, 0.88),
    "int4-g64": (0.50, 0.75, 0.84),
    "int4-g32": (0.46, 0.65, 0.78),
    "ternary": (0.65, 0.87, 0.90),
    "binary": (0.65, 0.87, 0.86),
    "binary-xnor": (0.45, 0.55, 0.72),
}
_FLOAT_ROWS = 6  # rows at which torch's float layer reaches half of its share
_FLOAT_SHARE, _FLOAT_READ = 0.85, 0.55  # of the float32 limit with many rows; of the read rate with one
_PASS_READ = 0.5  # of the L3's read rate: quantising x and storing y
_SHORT_READ = 0.9  # of the DRAM's: a weight outside of huge pages, where each page is looked up
_JOIN_S, _SPLIT_S = 3e-6, 10e-6  # waking a second thread, and the work from which it is woken (docs/performance.md)


class LayerTime(NamedTuple):
    """Seconds of one call and what they are made of: the call itself, the arithmetic, and the bytes that are read and written."""

    seconds: float
    call: float
    compute: float
    bandwidth: float

    @property
    def bound(self) -> str:
        """ "overhead", "compute" or "bandwidth": the greatest part."""
        parts = {"overhead": self.call, "compute": self.compute, "bandwidth": self.bandwidth}
        return max(parts, key=parts.__getitem__)


class CallCost(NamedTuple):
    """Seconds of a call that has next to nothing to compute."""

    float_layer: float
    packed: float


class Here(NamedTuple):
    """This machine with the threads that torch now has."""

    machine: Machine
    limits: Limits
    call: CallCost


@torch.inference_mode()
def call_cost() -> CallCost:
    """Measured now, in a few milliseconds: a call after other work, which has taken the caches of code and data."""
    linear, x = nn.Linear(16, 16), torch.randn(1, 16)
    packed, hidden = QuantLinear.from_linear(linear), torch.randn(256, 1024)

    def other_work() -> None:
        torch.softmax(nn.functional.gelu(hidden), -1)

    timings = hot_and_cold({"float": lambda: linear(x), "packed": lambda: packed(x)}, other_work, rounds=15, calls=2)
    return CallCost(timings["float"][1].median, timings["packed"][1].median)


def weight_bytes(fmt: Format | None, n: int, k: int, item: int) -> int:
    """Bytes of the stored tensors of an [N, K] layer, bias apart; None: a float weight with `item` bytes an element."""
    if fmt is None:
        return n * k * item
    return sum(spec.dtype.itemsize * torch.Size(spec.shape).numel() for spec in fmt.tensors(n, k))


def can_predict(fmt: Format) -> bool:
    """Not for sparse formats, whose time follows from their zeros."""
    return _key(fmt) in _SHARES


def _key(fmt: Format) -> str:
    return f"{fmt.tag}-g{fmt.group_size}" if isinstance(fmt, Int4) and fmt.group_size else fmt.tag


def _rows_at_the_limit(key: str, m: int) -> float:
    """How many rows take as long at the full limit as m rows take; more rows are never done sooner than fewer."""
    one, few, many = _SHARES[key]
    counts = [1 / one]
    if m > 1:
        counts.append(min(m, 7) / few)
    if m > 7:
        counts.append(m / many)
    return max(counts)


def predict(fmt: Format | None, n: int, k: int, m: int, here: Here, traffic: int, item: int = 4) -> LayerTime:
    """One call of an [N, K] layer on m rows of `item` bytes an element; None: torch's float layer.

    traffic  bytes of weights that pass between two calls of this layer, its own included: they decide which cache still holds it
    """
    machine, limits, call = here
    level, stored = machine.level(traffic), weight_bytes(fmt, n, k, item)
    read_s = stored / (limits.read[level] * 1e9 * (_SHORT_READ if level == "DRAM" and stored < HUGE_BYTES else 1.0))
    passes_s = m * (k + n) * item / (limits.read["L3"] * 1e9 * _PASS_READ)
    macs = m * n * k
    if fmt is None:
        own_call, passes_s = call.float_layer, 0.0  # the share holds what its passes cost
        read_s /= _FLOAT_READ if m == 1 else 1.0
        share = _FLOAT_SHARE * m / (m + _FLOAT_ROWS)
        compute_s = macs / (limits.f32 * 1e9 * (share if m > 1 else _FLOAT_SHARE))
    else:
        own_call = call.packed
        compute_s = n * k * _rows_at_the_limit(_key(fmt), m) / (getattr(limits, arithmetic(fmt)) * 1e9)
    # One row of a packed layer multiplies as it reads; of more rows, or a float layer, the two add up.
    overlap = fmt is not None and m == 1
    work_s = (max(compute_s, read_s) if overlap else compute_s + read_s) + passes_s
    if limits.threads > 1 and work_s * limits.threads >= _SPLIT_S:
        own_call += _JOIN_S
    return LayerTime(own_call + work_s, own_call, compute_s, read_s + passes_s)
