"""What a format is: the base of all, and the list of tensors that each gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import ops
from .ops.tiles import MAX_K, ceil_div


class TensorSpec(NamedTuple):
    """One stored tensor. Bulk integer data are frozen parameters (sharded, not resent); small float data are buffers.

    channels  output channels that one entry of dim 0 holds (1, or the 16 of a tile); 0: the tensor does not follow N
    varies    the shape follows from the values of the weight; `shape` is that of a weight of zeros. part() is not for formats with
              such tensors (by_rows = False)
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: bool
    channels: int
    varies: bool = False

    def part(self, whole: Tensor, begin: int, end: int) -> Tensor:
        """The part of `whole` that belongs to the output channels [begin, end), begin at the start of an n tile."""
        return whole[begin // self.channels : ceil_div(end, self.channels)] if self.channels else whole


Stored = Mapping[str, Any]  # a module's _parameters or _buffers


@dataclass(frozen=True, repr=False)
class Format:
    """Base of all formats. Subclasses add fields and name the op that computes them."""

    by_rows: ClassVar[bool] = True  # whether rows can be quantised by themselves; else quantize() takes the whole weight
    tag: ClassVar[str]  # name in files and on the command line
    op: ClassVar[ops.Op]  # what computes it
    bits: ClassVar[int]  # of a code

    def __init_subclass__(cls) -> None:
        # dataclass leaves a __repr__ it finds alone. Its own guards against recursion by thread id, which torch.compile cannot
        # trace, and torch.func.vmap(layer) asks for the repr of what it transforms.
        cls.__repr__ = Format.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        given = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        """The stored tensors of an [N, K] layer, bias apart."""
        raise NotImplementedError

    @property
    def scales_need_all_rows(self) -> bool:
        """Whether a scale depends on more than the rows it belongs to: all are then found before the first row is quantised."""
        return False

    def scales(self, weight: Tensor) -> dict[str, Tensor]:
        """Float weight [N, K] -> its scales, exactly as they are stored. Read in row blocks."""
        raise NotImplementedError

    def steps(self, scales: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """What code 1 stands for, by the stored scales: float32 [N, 1], or [N, G] where groups of k have scales of their own."""
        raise NotImplementedError

    def codes(self, rows: Tensor, steps: Tensor) -> Tensor:
        """Float rows [n, K] -> the signed int8 values that are stored, chosen with their `steps` [n, 1] or [n, G]."""
        raise NotImplementedError

    def quantize(self, rows: Tensor, scales: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Float rows [n, K] of the weight, n a multiple of 16 or the last rows -> their slice of each stored tensor.

        scales  the rows' slice of what scales() gave for the whole weight; None: from these rows
        """
        raise NotImplementedError

    def dequantize(self, stored: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """Stored tensors (or slices of whole n tiles) -> float32 [n, K]."""
        raise NotImplementedError

    def constants(self) -> dict[str, Tensor]:
        """Stored tensors that do not follow from the weight, broadcast to their shapes; raises ValueError where the format still
        lacks what they hold."""
        return {}

    def stored(self) -> Format:
        """The format as a layer keeps it: without what has become a stored tensor."""
        return self

    def dense(self) -> Format | None:
        """The format that computes the same from dense tiles, which may be the faster one; None: there is none."""
        return None

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        """The layer: one call of self.op on its stored tensors, in either form."""
        raise NotImplementedError

    def plain_tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        """The tensors of the plain form, which devices without kernels keep (plain.py)."""
        return self.tensors(n, k)

    def to_plain(self, stored: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        """Stored tensors -> their plain form."""
        return dict(stored)

    def from_plain(self, plain: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        """The inverse of to_plain."""
        return dict(plain)

    def on_device(self, stored: Mapping[str, Tensor], device: str, n: int, k: int) -> dict[str, Tensor] | None:
        """Stored tensors -> as the kernels of a device type read them, on the device they are on; None: as they are. `device` "cpu"
        is also what files hold."""
        return None

    def check_sizes(self, n: int, k: int) -> None:
        """Raises ValueError where the format cannot hold an [N, K] weight."""
        if k > MAX_K:
            raise ValueError(f"{self!r}: in_features={k} is above {MAX_K}, the largest for which int32 sums are exact")

    def check_stored(self, stored: Mapping[str, Tensor], n: int, k: int) -> None:
        """Raises ValueError where tensors of the listed dtypes, and shapes where these are fixed, do not make an [N, K] layer."""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.tag, **{name: getattr(self, name) for name in tag_fields(type(self))}}


def tag_fields(cls: type[Format]) -> list[str]:
    """Fields that identify a format: those that count in a comparison. The others are stored as tensors."""
    return [f.name for f in dataclasses.fields(cls) if f.compare]
