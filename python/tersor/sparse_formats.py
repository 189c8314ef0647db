"""Formats of pruned weights: they look at the zeros of a weight and store the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import ops
from .format_base import Format, Stored, TensorSpec
from .ops import sparse_storage
from .ops.linear_sparse_float import MAX_K as MAX_FLOAT_K
from .ops.linear_sparse_float import FloatParts, check_float_structure, linear_float, pack_sparse_float, sparse_float_rows
from .ops.tiles import TILE_N, ceil_div
from .weights import row_blocks


@dataclass(frozen=True)
class SparseInt8(Format):
    """Int8Dynamic of a pruned weight, equal to it bit for bit, with the zeros left out.

    What is stored follows from where the zeros are (ops/sparse_storage.py): the 16 x 4 tiles that hold anything (blocks), windows
    of positions and values (unstructured, 60 % zeros and more), or a mask for each tile beside its non-zeros (in between). A weight
    with two values in every four k (NM(2, 4)) is stored for sparse tensor cores while it is on a GPU; files never hold that.
    """

    tag: ClassVar[str] = "sparse-int8"
    op: ClassVar[ops.Op] = ops.linear_sparse
    bits: ClassVar[int] = 8
    by_rows: ClassVar[bool] = False

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        nt = ceil_div(n, TILE_N)
        return (
            TensorSpec("weight_packed", torch.uint8, (0, sparse_storage.TILE_BYTES), True, TILE_N, varies=True),
            TensorSpec("weight_index", torch.uint8, (0, 2), True, TILE_N, varies=True),
            TensorSpec("weight_offset", torch.int64, (nt + 1,), True, TILE_N),
            TensorSpec("weight_sum", torch.int32, (nt, TILE_N), True, TILE_N),
            TensorSpec("weight_scale", torch.float32, (n,), False, 1),
        )

    def scales(self, weight: Tensor) -> dict[str, Tensor]:
        return {
            "weight_scale": torch.cat([ops.quantize_rows(weight[b:e])[1] for b, e in row_blocks(*weight.shape)] or [weight[:, 0]])
        }

    def steps(self, scales: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        return scales["weight_scale"].unsqueeze(1)

    def codes(self, rows: Tensor, steps: Tensor) -> Tensor:
        return ops.quantize_rows(rows)[0]

    def quantize(self, rows: Tensor, scales: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        n, k = rows.shape
        values = torch.empty((n, k), dtype=torch.int8, device=rows.device)
        scale = torch.empty(n, dtype=torch.float32, device=rows.device)
        for begin, end in row_blocks(n, k):
            values[begin:end], scale[begin:end], _ = ops.quantize_rows(rows[begin:end])
        return {**sparse_storage.pack_sparse(values)._asdict(), "weight_scale": scale}

    def dequantize(self, stored: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        return _values(stored, n, k) * stored["weight_scale"].unsqueeze(1)

    def plain_tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return self.dense().plain_tensors(n, k)

    def to_plain(self, stored: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        return {"weight_packed": _values(stored, n, k), "weight_scale": stored["weight_scale"]}

    def from_plain(self, plain: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        return {**sparse_storage.pack_sparse(plain["weight_packed"])._asdict(), "weight_scale": plain["weight_scale"]}

    def dense(self) -> Format:
        from .formats import Int8Dynamic  # which imports this module

        return Int8Dynamic()

    def on_device(self, stored: Mapping[str, Tensor], device: str, n: int, k: int) -> dict[str, Tensor] | None:
        parts = sparse_storage.Parts(*(stored[name] for name in sparse_storage.Parts._fields))
        pairs = sparse_storage.storage_of(parts.weight_packed, parts.weight_index) == "pairs"
        if pairs == (device == "cuda"):
            return None
        if device == "cuda" and not sparse_storage.holds_24(parts):
            return None
        packed = sparse_storage.pack_sparse(sparse_storage.sparse_rows(*parts[:3], n, k), "pairs" if device == "cuda" else None)
        return {**stored, **packed._asdict()}

    def check_stored(self, stored: Mapping[str, Tensor], n: int, k: int) -> None:
        parts = sparse_storage.Parts(*(stored[name] for name in sparse_storage.Parts._fields))
        sparse_storage.check_structure(repr(self), parts, n, k)

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        if "weight_index" not in parameters:  # the plain form
            return self.dense().linear(x, parameters, buffers, bias)
        return self.op(
            x,
            parameters["weight_packed"],
            parameters["weight_index"],
            parameters["weight_offset"],
            parameters["weight_sum"],
            buffers["weight_scale"],
            bias,
        )


@dataclass(frozen=True)
class SparseFloat(Format):
    """A pruned float weight as it is: the non-zeros of each channel, float32, and their places. Computes in float32.

    Values are held as their bytes, so that no cast of the model touches them. A device without kernels keeps the dense weight: a
    NaN or inf in x reaches every channel there, on a CPU those that have a weight for it.
    """

    tag: ClassVar[str] = "sparse-float"
    op: ClassVar[ops.Op] = ops.linear_sparse_float
    bits: ClassVar[int] = 32
    by_rows: ClassVar[bool] = False

    def check_sizes(self, n: int, k: int) -> None:
        super().check_sizes(n, k)
        if k > MAX_FLOAT_K:
            raise ValueError(f"{self!r}: in_features={k} is above {MAX_FLOAT_K}, what its two bytes of index reach")

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight_packed", torch.uint8, (0, 4), True, 1, varies=True),
            TensorSpec("weight_index", torch.uint8, (0, 2), True, 1, varies=True),
            TensorSpec("weight_offset", torch.int64, (n + 1,), True, 1),
        )

    def scales(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def quantize(self, rows: Tensor, scales: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return pack_sparse_float(rows)._asdict()

    def dequantize(self, stored: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        if "weight_index" not in stored:  # the plain form
            return stored["weight_packed"]
        return sparse_float_rows(stored["weight_packed"], stored["weight_index"], stored["weight_offset"], k)

    def plain_tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("weight_packed", torch.float32, (n, k), True, 1),)

    def to_plain(self, stored: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        return {"weight_packed": self.dequantize(stored, n, k)}

    def from_plain(self, plain: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        return self.quantize(plain["weight_packed"])

    def check_stored(self, stored: Mapping[str, Tensor], n: int, k: int) -> None:
        check_float_structure(repr(self), FloatParts(*(stored[name] for name in FloatParts._fields)), n, k)

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        if "weight_index" not in parameters:  # the plain form
            return linear_float(x, parameters["weight_packed"], bias)
        return self.op(x, parameters["weight_packed"], parameters["weight_index"], parameters["weight_offset"], bias)


def _values(stored: Mapping[str, Tensor], n: int, k: int) -> Tensor:
    """int8 [N, K] of a SparseInt8 layer in either form."""
    if "weight_index" not in stored:
        return stored["weight_packed"]
    return sparse_storage.sparse_rows(stored["weight_packed"], stored["weight_index"], stored["weight_offset"], n, k)
