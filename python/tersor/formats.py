"""Formats: what a layer stores and how it is computed. Each is a frozen dataclass, printed as the code that makes it.

A format lists its tensors once; construction, state_dict, checks and sharding are generated from that list.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import ops
from .ops.tiles import MAX_K, TILE_N, packed_shape

LAYOUT_VERSION = 1  # of the tiles and of the tag; a newer version of the package reads every older one


class TensorSpec(NamedTuple):
    """One stored tensor. Bulk integer data are frozen parameters (sharded, not resent); small float data are buffers."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parameter: bool


Stored = Mapping[str, Any]  # a module's _parameters or _buffers


@dataclass(frozen=True, repr=False)
class Format:
    """Base of all formats. Subclasses add fields and name the op that computes them."""

    tag: ClassVar[str]  # name in files and on the command line
    op: ClassVar[ops.Op]

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

    def quantize(self, rows: Tensor) -> dict[str, Tensor]:
        """Float rows [n, K] of the weight, n a multiple of 16 or the last rows -> their slice of each stored tensor."""
        raise NotImplementedError

    def dequantize(self, stored: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        """Stored tensors (or slices of whole n tiles) -> float32 [n, K]."""
        raise NotImplementedError

    def constants(self) -> dict[str, Tensor]:
        """Stored tensors that do not follow from the weight; raises ValueError where the format still lacks what they hold."""
        return {}

    def stored(self) -> Format:
        """The format as a layer keeps it: without what has become a stored tensor."""
        return self

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        """The layer: one call of self.op on its stored tensors."""
        raise NotImplementedError

    def check_sizes(self, n: int, k: int) -> None:
        """Raises ValueError where the format cannot hold an [N, K] weight."""
        if k > MAX_K:
            raise ValueError(f"{self!r}: in_features={k} is above {MAX_K}, the largest for which int32 sums are exact")

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.tag, **{name: getattr(self, name) for name in _tag_fields(type(self))}}


def _tag_fields(cls: type[Format]) -> list[str]:
    """Fields that identify a format: those that count in a comparison. The others are stored as tensors."""
    return [f.name for f in dataclasses.fields(cls) if f.compare]


@dataclass(frozen=True)
class _Int8(Format):
    """8-bit tiles, one scale per output channel, symmetric: w = (code - 128) * weight_scale."""

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight_packed", torch.uint8, packed_shape(n, k), True),
            TensorSpec("weight_scale", torch.float32, (n,), False),
        )

    def quantize(self, rows: Tensor) -> dict[str, Tensor]:
        q, scale, _ = ops.quantize_rows(rows)  # the formula of the activations, per channel
        return {"weight_packed": ops.from_rows(q), "weight_scale": scale}

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        return self.op(x, parameters["weight_packed"], buffers["weight_scale"], bias)

    def dequantize(self, stored: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        return ops.to_rows(stored["weight_packed"], n, k).float() * stored["weight_scale"].unsqueeze(1)


@dataclass(frozen=True)
class Int8Dynamic(_Int8):
    """Int8 weights per channel, activations quantised per token at run time, exact int32 sums. The default choice."""

    tag: ClassVar[str] = "int8-dynamic"
    op: ClassVar[ops.Op] = ops.linear_dynamic


@dataclass(frozen=True)
class Int8Static(_Int8):
    """Int8 weights per channel, activations quantised by one scale that is known beforehand: no pass over x to find its absmax.

    input_scale  one step of the quantised activations: the largest |x| the layer is to see, divided by 127; larger values saturate.
                 Needed to make a layer; then it is the layer's buffer `input_scale`, float32 [], which may be set later.
    """

    tag: ClassVar[str] = "int8-static"
    op: ClassVar[ops.Op] = ops.linear_static
    input_scale: float | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        s = self.input_scale
        if s is not None and not (isinstance(s, int | float) and 0 < s < math.inf):
            raise ValueError(f"Int8Static: input_scale is {s!r}, expected a positive number (largest |x| / 127)")

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return (*super().tensors(n, k), TensorSpec("input_scale", torch.float32, (), False))

    def constants(self) -> dict[str, Tensor]:
        if self.input_scale is None:
            raise ValueError(
                "Int8Static: input_scale is missing; give the largest |x| the layer is to see, divided by 127, for each layer: "
                '{"fc1": Int8Static(0.02), ...}'
            )
        return {"input_scale": torch.tensor(self.input_scale, dtype=torch.float32, device="cpu")}

    def stored(self) -> Format:
        return Int8Static()

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        return self.op(x, parameters["weight_packed"], buffers["weight_scale"], bias, buffers["input_scale"])


@dataclass(frozen=True)
class Int8WeightOnly(_Int8):
    """Int8 weights per channel, float activations and sums: the accuracy of float activations, faster where M is small."""

    tag: ClassVar[str] = "int8-weight-only"
    op: ClassVar[ops.Op] = ops.linear_weight_only


FORMATS: dict[str, type[Format]] = {cls.tag: cls for cls in (Int8Dynamic, Int8Static, Int8WeightOnly)}

# quantize_weights(num_bits, activations) -> format
BY_BITS: dict[tuple[int, str | None], type[Format]] = {(8, "int8"): Int8Dynamic, (8, None): Int8WeightOnly}


def format_from_dict(data: Any) -> Format:
    """The inverse of Format.to_dict; raises ValueError on anything else than a known format with its own fields."""
    name = data.get("name") if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format is {name!r}, expected one of: {', '.join(FORMATS)}")
    cls = FORMATS[name]
    given = {key: value for key, value in data.items() if key != "name"}
    known = set(_tag_fields(cls))
    if not given.keys() <= known:
        raise ValueError(f"format {name!r} has unknown fields: {', '.join(sorted(given.keys() - known))}")
    return cls(**given)


_MAX_TAG_BYTES = 4096


class Tag(NamedTuple):
    """What identifies a stored layer. speedup: {M: times the float layer} as measured at the swap, a remark; None: not measured."""

    format: Format
    n: int
    k: int
    speedup: dict[int, float] | None = None


def encode_tag(tag: Tag) -> Tensor:
    """As a uint8 tensor of JSON (a tensor, so that safetensors and weights_only carry it)."""
    data = {"layout": LAYOUT_VERSION, "format": tag.format.to_dict(), "out_features": tag.n, "in_features": tag.k}
    if tag.speedup:
        data["speedup"] = {str(m): ratio for m, ratio in tag.speedup.items()}
    return torch.tensor(list(json.dumps(data, sort_keys=True).encode()), dtype=torch.uint8, device="cpu")


def decode_tag(state: Any, where: str) -> Tag:
    """The inverse of encode_tag; raises ValueError naming `where` on anything malformed or newer than this package."""
    plain = isinstance(state, Tensor) and not state.is_nested and state.layout is torch.strided and not state.is_meta
    if not plain or state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError(f"{where}: the layer's tag must be a 1-d uint8 tensor of JSON, got {_describe(state)}")
    if state.numel() > _MAX_TAG_BYTES:
        raise ValueError(f"{where}: the layer's tag has {state.numel()} bytes, expected at most {_MAX_TAG_BYTES}")
    try:
        tag = json.loads(bytes(state.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the layer's tag is not JSON ({error})") from None
    if not isinstance(tag, dict) or type(tag.get("layout")) is not int:
        raise ValueError(f"{where}: the layer's tag has no layout version")
    if not 1 <= tag["layout"] <= LAYOUT_VERSION:
        raise ValueError(
            f"{where}: layout version {tag['layout']}, this package reads 1 to {LAYOUT_VERSION}; a newer tersor wrote it"
        )
    n, k = tag.get("out_features"), tag.get("in_features")
    if type(n) is not int or type(k) is not int or not (0 <= n < 2**40 and 0 <= k < 2**40):
        raise ValueError(f"{where}: the layer's tag says out_features={n!r}, in_features={k!r}, expected sizes")
    try:
        return Tag(format_from_dict(tag.get("format")), n, k, _speedup(tag.get("speedup")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _speedup(remark: Any) -> dict[int, float] | None:
    """None where there is no remark, or none that makes sense: it changes nothing about the layer."""
    if not isinstance(remark, dict):
        return None
    try:
        return {int(m): float(ratio) for m, ratio in remark.items()}
    except (TypeError, ValueError):
        return None


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor) or value.is_nested:
        return "a nested tensor" if isinstance(value, Tensor) else type(value).__name__
    kind = "" if value.layout is torch.strided else f"{value.layout} "
    return f"{kind}{value.dtype} {list(value.shape)}{' on meta' if value.is_meta else ''}"


# Rows of the weight quantised at a time: below this many elements, 1 MiB of float32. Larger ones are no faster, and those of
# 16 MiB left 50 MiB behind in the heap (tests/memory_worker.py).
_BLOCK_ELEMENTS = 1 << 18


def row_blocks(n: int, k: int) -> list[tuple[int, int]]:
    """[begin, end) of blocks of whole n tiles."""
    step = max(TILE_N, _BLOCK_ELEMENTS // max(k, 1) // TILE_N * TILE_N)
    return [(begin, min(n, begin + step)) for begin in range(0, n, step)]
