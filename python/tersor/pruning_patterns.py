"""Patterns of zeros, and the schedule that reaches them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ops.tiles import ceil_div


@dataclass(frozen=True, repr=False)
class Pattern:
    """Base of all patterns. A pattern cuts a weight [N, K] into units that are kept or dropped whole, in a grid [R, C].

    Scores are >= 0; a unit that is dropped already scores -1, so it is the first to be dropped again.
    """

    per_row: ClassVar[bool] = False  # every row of the grid has a number of its own to drop; rows and layers never compete

    def __init_subclass__(cls) -> None:
        cls.__repr__ = Pattern.__repr__  # type: ignore[method-assign]  # dataclass leaves one it finds alone

    def __repr__(self) -> str:
        given = ", ".join(repr(getattr(self, field.name)) for field in dataclasses.fields(self))
        return f"{type(self).__name__}({given})"

    def count(self, units: int, progress: float) -> int:
        """How many of `units` are dropped; progress in [0, 1] is how far the schedule is."""
        raise NotImplementedError

    def units(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Scores and mask [N, K] -> scores of the grid [R, C], -1 where nothing of a unit is left."""
        raise NotImplementedError

    def expand(self, grid: Tensor, n: int, k: int) -> Tensor:
        """Bool grid [R, C] -> bool [N, K]."""
        raise NotImplementedError

    def columns(self, at_least: int) -> int:
        """A number of columns, about `at_least`, that holds whole units; 1 at least."""
        raise NotImplementedError


def _check_sparsity(pattern: Unstructured | Block) -> None:
    s = pattern.sparsity
    if isinstance(s, bool) or not isinstance(s, int | float) or not 0 <= s <= 1:
        raise ValueError(f"{type(pattern).__name__}: sparsity is {s!r}, expected the share of zeros, 0 to 1")


@dataclass(frozen=True, repr=False)
class Unstructured(Pattern):
    """Zeros anywhere: round(sparsity * N * K) of them.

    sparsity  share of zeros, 0 to 1
    """

    sparsity: float

    def __post_init__(self) -> None:
        _check_sparsity(self)

    def count(self, units: int, progress: float) -> int:
        return int(self.sparsity * progress * units + 0.5)

    def units(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, scores, -1.0)

    def expand(self, grid: Tensor, n: int, k: int) -> Tensor:
        return grid

    def columns(self, at_least: int) -> int:
        return at_least


@dataclass(frozen=True, repr=False)
class Block(Pattern):
    """Blocks of zeros on a grid over the weight [out, in], by the root mean square of their scores.

    shape     (rows, columns) of a block: (16, 4) is one tile of int8. Blocks that reach over the edge count as the others do.
    sparsity  share of the blocks that are zero, 0 to 1

    Source: Gray et al., GPU kernels for block-sparse weights (2017): blocks ranked by their L2 norm.
    """

    shape: tuple[int, int]
    sparsity: float

    def __post_init__(self) -> None:
        shape = self.shape
        if not isinstance(shape, tuple | list) or len(shape) != 2 or not all(type(s) is int and s >= 1 for s in shape):
            raise ValueError(f"Block: shape is {shape!r}, expected (rows, columns), both 1 or more, such as (16, 4)")
        object.__setattr__(self, "shape", tuple(shape))
        _check_sparsity(self)

    def count(self, units: int, progress: float) -> int:
        return int(self.sparsity * progress * units + 0.5)

    def _blocks(self, t: Tensor) -> Tensor:
        """[N, K] -> [R, C, rows * columns], zeros beyond the edge."""
        (n, k), (rows, columns) = t.shape, self.shape
        t = pad(t, (0, -k % columns, 0, -n % rows))
        return t.view(t.shape[0] // rows, rows, t.shape[1] // columns, columns).transpose(1, 2).flatten(2)

    def units(self, scores: Tensor, mask: Tensor) -> Tensor:
        alive = self._blocks(mask).any(-1)
        # Squares in float64: those of weights below 1e-23 would vanish in float32, those above 1e19 overflow.
        norm = torch.linalg.vector_norm(self._blocks(torch.where(mask, scores, 0.0)), dim=-1, dtype=torch.float64)
        size = self._blocks(torch.ones_like(mask)).sum(-1)  # a block over the edge has fewer elements
        return torch.where(alive, norm / size.sqrt(), -1.0)

    def expand(self, grid: Tensor, n: int, k: int) -> Tensor:
        rows, columns = self.shape
        return grid.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]

    def columns(self, at_least: int) -> int:
        return max(1, at_least // self.shape[1]) * self.shape[1]


@dataclass(frozen=True, repr=False)
class NM(Pattern):
    """At most n non-zeros in every m neighbours along K, such as NM(2, 4). A last group of fewer than m keeps up to n as well.

    Source: Mishra et al., arXiv:2104.08378 (2:4).
    """

    n: int
    m: int
    per_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or not 0 <= self.n <= self.m or self.m < 1:
            raise ValueError(f"NM: n, m are {self.n!r}, {self.m!r}, expected n non-zeros of m, 0 <= n <= m, such as NM(2, 4)")

    def count(self, units: int, progress: float) -> int:
        return int((self.m - self.n) * progress)

    def units(self, scores: Tensor, mask: Tensor) -> Tensor:
        scores = torch.where(mask, scores, -1.0)
        return pad(scores, (0, -scores.shape[1] % self.m), value=-1.0).view(-1, self.m)

    def expand(self, grid: Tensor, n: int, k: int) -> Tensor:
        return grid.view(n, ceil_div(k, self.m) * self.m)[:, :k]

    def columns(self, at_least: int) -> int:
        return self.m


def lowest(scores: Tensor, count: int) -> Tensor:
    """bool [R, C]: exactly `count` of the lowest of each row of scores [R, C]; of equal ones, those further left."""
    if count <= 0 or scores.numel() == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, 1, keepdim=True).values
    below, ties = scores < threshold, scores == threshold
    left = count - below.sum(1, keepdim=True)
    return below | (ties & (ties.cumsum(1) <= left))


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity rises as s_t = s * (1 - (1 - (t - begin) / (end - begin))^3): fast while there is much to spare, slow at the end.

    end    the step at which the pattern is reached; what follows is fine-tuning
    begin  the step at which pruning begins
    every  masks change at begin, begin + every, ..., and at end

    A step is a call of Pruner.step(). Source: Zhu & Gupta, arXiv:1710.01878, equation 1 with s_i = 0.
    """

    end: int
    begin: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("end", "begin", "every"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"CubicSchedule: {name} is {getattr(self, name)!r}, expected a number of steps")
        if not 0 <= self.begin < self.end or self.every < 1:
            raise ValueError(
                f"CubicSchedule: begin={self.begin}, end={self.end}, every={self.every}, expected 0 <= begin < end and every >= 1"
            )

    def due(self, step: int) -> bool:
        """Whether masks change at this step."""
        return step == self.end or (self.begin < step < self.end and (step - self.begin) % self.every == 0)

    def progress(self, step: int) -> float:
        """Share of the final sparsity, 0 to 1."""
        left = 1 - (min(max(step, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return 1 - math.pow(left, 3)
