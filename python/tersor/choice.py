"""Whether a packed layer is faster than the float one it replaces: measured on this machine, at the swap."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bench.timing import Timing, interleaved
from .calibration import Batch, watched
from .formats import Format
from .nn import QuantLinear

Rows = Mapping[int, int]  # M -> how often a forward pass calls the layer with that many rows
ROUNDS, SECONDS = 7, 0.004


class Choice:
    """Measured decisions, one for each distinct (shape, dtype, format, rows): layers of one shape share theirs."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[int, tuple[float, float]]] = {}
        self._alive: list[Tensor] = []  # so that an id stays one weight's

    def speedup(self, linear: nn.Linear, fmt: Format, rows: Rows) -> dict[int, float] | None:
        """{M: time of the float layer / time of the packed one} where the packed layer wins over `rows` in all, else None.

        Both are called as the model will call them, with the threads torch now has.
        """
        times = self.times(linear, fmt, tuple(sorted(rows)))
        float_time = sum(times[m][0] * count for m, count in rows.items())
        packed_time = sum(times[m][1] * count for m, count in rows.items())
        return {m: round(a / b, 2) for m, (a, b) in times.items()} if packed_time < float_time else None

    def best(self, linear: nn.Linear, fmt: Format, rows: Rows) -> tuple[Format, dict[int, float]] | None:
        """`fmt`, or the dense format that it can be exchanged for, whichever is faster over `rows`, with its speedup; None: neither
        is faster than the float layer."""
        found = [(f, s) for f in (fmt, fmt.dense()) if f is not None and (s := self.speedup(linear, f, rows)) is not None]
        return min(found, key=lambda f: self._total(linear, f[0], rows), default=None)

    def _total(self, linear: nn.Linear, fmt: Format, rows: Rows) -> float:
        times = self.times(linear, fmt, tuple(sorted(rows)))
        return sum(times[m][1] * count for m, count in rows.items())

    def times(self, linear: nn.Linear, fmt: Format, rows: tuple[int, ...]) -> dict[int, tuple[float, float]]:
        """{M: (seconds of the float layer, seconds of the packed one)}."""
        key: tuple[Any, ...] = (
            tuple(linear.weight.shape),
            linear.weight.dtype,
            linear.bias is None,
            fmt,
            rows,
            torch.get_num_threads(),
        )
        if not fmt.by_rows:  # the time of a sparse layer follows from its zeros
            key = (*key, id(linear.weight))
            self._alive.append(linear.weight)
        if key not in self._known:
            packed = QuantLinear.from_linear(linear, fmt)
            self._known[key] = {m: _measure(linear, packed, m) for m in rows}
        return self._known[key]


def _measure(linear: nn.Linear, packed: QuantLinear, m: int) -> tuple[float, float]:
    before, after = race(linear, packed, m)
    return before.best, after.best


@torch.inference_mode()
def race(layer: nn.Linear | QuantLinear, other: nn.Linear | QuantLinear, m: int) -> tuple[Timing, Timing]:
    """Times of two layers of one shape on the same m rows, interleaved."""
    x = torch.randn(m, layer.in_features, device=layer.weight.device).to(layer.weight.dtype)
    timings = interleaved({"layer": lambda: layer(x), "other": lambda: other(x)}, ROUNDS, SECONDS)
    return timings["layer"], timings["other"]


def row_counts(model: nn.Module, layers: Sequence[nn.Linear], only_if_faster: Any) -> dict[int, Rows]:
    """What `only_if_faster` says of each layer, by its id: M values for all, or example inputs that the model is run on once.

    Raises ValueError / TypeError, naming the argument, on anything else.
    """
    if isinstance(only_if_faster, int) and not isinstance(only_if_faster, bool):
        only_if_faster = (only_if_faster,)
    if isinstance(only_if_faster, Sequence) and only_if_faster and all(type(m) is int for m in only_if_faster):
        if min(only_if_faster) < 1:
            raise ValueError(f"quantize_: only_if_faster holds {min(only_if_faster)}, expected numbers of rows, 1 or more")
        rows = dict.fromkeys(only_if_faster, 1)
        return {id(layer): rows for layer in layers}
    if isinstance(only_if_faster, Tensor):
        only_if_faster = (only_if_faster,)
    if not isinstance(only_if_faster, tuple | Mapping) or not only_if_faster:
        raise TypeError(
            f"quantize_: only_if_faster is {type(only_if_faster).__name__}, expected numbers of rows (1, or (1, 64)), or example "
            "inputs of the model: a tensor, a tuple of arguments or a dict of them"
        )
    batch: Batch = ((), dict(only_if_faster)) if isinstance(only_if_faster, Mapping) else (only_if_faster, {})
    with torch.no_grad():
        return rows_of_calls(model, layers, [batch])


def rows_of_calls(model: nn.Module, layers: Iterable[nn.Module], inputs: Iterable[Batch]) -> dict[int, Rows]:
    """How often one pass over `inputs` calls each layer with how many rows, by the layer's id."""
    layers = list({id(layer): layer for layer in layers}.values())
    counts: dict[int, dict[int, int]] = {id(layer): {} for layer in layers}

    def count(layer: nn.Module, x: Tensor) -> None:
        m = math.prod(x.shape[:-1])
        if m:
            counts[id(layer)][m] = counts[id(layer)].get(m, 0) + 1

    with watched(layers, count):
        for args, kwargs in inputs:
            model(*args, **kwargs)
    return dict(counts)
