"""Observers: from the activations that a layer is given to the one scale that Int8Static rounds them with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# A value counts in the bin of its upper 16 bits as float32: sign, exponent and 7 bits of mantissa, so a bin is 0.4 to 0.8 % wide,
# no range has to be known beforehand, and the memory does not grow with the data.
_SHIFT, _BINS = 16, 1 << 15
CODES = 127  # on either side of 0


class Magnitudes:
    """How often each magnitude of x was seen, in _BINS bins, and what single rows looked like."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.rows = torch.zeros(_BINS, dtype=torch.int64)  # of the absmax of each row
        self.largest = 0.0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float().abs()
        if not rows.numel():
            return
        absmax = rows.amax(1)
        largest = absmax.max().item()
        self.largest = max(self.largest, largest) if math.isfinite(largest) else math.inf  # NaN compares with nothing
        self.counts += _histogram(rows)
        self.rows += _histogram(absmax)

    def quantile(self, percent: float, counts: Tensor | None = None) -> float:
        """The largest value of the bin below which, it included, `percent` of all |x| lie; no more than was seen."""
        counts = self.counts if counts is None else counts
        wanted = percent / 100 * counts.sum().item()
        at = int(torch.searchsorted(counts.cumsum(0).double(), wanted).clamp(max=_BINS - 1))
        return min(_edges(torch.tensor([at + 1])).item(), self.largest)

    def typical_row(self) -> float:
        """The median of the rows' absmax."""
        return self.quantile(50, self.rows)

    def squared_error(self, scales: Tensor) -> Tensor:
        """Sum of squared errors of x rounded and clipped by each of `scales` [S], float64 [S]: by rounding x**2 below half a step,
        step**2 / 12 above (Bennett 1948), and by clipping (|x| - 127 step)**2."""
        used = self.counts.nonzero().squeeze(1)
        values, counts = _edges(used, 0.5).double(), self.counts[used].double()
        steps = scales.double().unsqueeze(1)
        rounding = torch.where(values < steps / 2, values.square(), steps.square() / 12)
        clipping = (values - CODES * steps).clamp(min=0).square()
        return ((rounding + clipping) * counts).sum(1)

    def relative_error(self, scale: float) -> float:
        """squared_error over the sum of x**2."""
        used = self.counts.nonzero().squeeze(1)
        total = (_edges(used, 0.5).double().square() * self.counts[used]).sum()
        return (self.squared_error(torch.tensor([scale])) / total.clamp(min=1e-300)).item()


def _histogram(magnitudes: Tensor) -> Tensor:
    bins = (magnitudes.contiguous().view(torch.int32) >> _SHIFT).flatten()
    return torch.bincount(bins, minlength=_BINS).cpu()


def _edges(bins: Tensor, offset: float = 0.0) -> Tensor:
    """The magnitude at which a bin begins, or the point `offset` of the way through it."""
    return ((bins << _SHIFT) + int(offset * (1 << _SHIFT))).to(torch.int32).view(torch.float32)


@dataclass(frozen=True)
class Observer:
    """Base of all observers."""

    tag: ClassVar[str]

    def scale(self, seen: Magnitudes) -> float:
        """The step for what was seen, not all of it zero."""
        raise NotImplementedError


@dataclass(frozen=True)
class MinMax(Observer):
    """The largest |x| / 127: nothing that was seen saturates."""

    tag: ClassVar[str] = "minmax"

    def scale(self, seen: Magnitudes) -> float:
        return seen.largest / CODES


@dataclass(frozen=True)
class Percentile(Observer):
    """The |x| below which `percent` of all values lie, / 127; what is larger saturates."""

    tag: ClassVar[str] = "percentile"
    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"Percentile: percent is {self.percent!r}, expected a number above 0, at most 100")

    def scale(self, seen: Magnitudes) -> float:
        return (seen.quantile(self.percent) or seen.largest) / CODES


@dataclass(frozen=True)
class MeanSquaredError(Observer):
    """The step with the least squared error of x, among largest |x| / 127 times 1, 63/64, ... 1/64."""

    tag: ClassVar[str] = "mse"

    def scale(self, seen: Magnitudes) -> float:
        steps = seen.largest / CODES * torch.arange(64, 0, -1) / 64
        return steps[seen.squared_error(steps).argmin()].item()


OBSERVERS: dict[str, type[Observer]] = {cls.tag: cls for cls in (MinMax, Percentile, MeanSquaredError)}


def as_observer(observer: str | Observer, function: str) -> Observer:
    """An observer, or the one of that name with its defaults."""
    if isinstance(observer, Observer):
        return observer
    if observer not in OBSERVERS:
        names = ", ".join(map(repr, OBSERVERS))
        raise ValueError(f"{function}: observer is {observer!r}, expected one of {names}, or an object such as Percentile(99.9)")
    return OBSERVERS[observer]()
