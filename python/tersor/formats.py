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
from .format_base import Format, Stored, TensorSpec, tag_fields
from .ops.tiles import CODES, TILE_N, ceil_div, packed_shape
from .sparse_formats import SparseFloat, SparseInt8
from .weights import grouped, least_squares_steps, mean_abs, mean_abs_of_all, nearest, row_blocks, without_tiny

LAYOUT_VERSION = 1  # of the tiles and of the tag; a newer version of the package reads every older one


@dataclass(frozen=True)
class _Tiles(Format):
    """Tiles of codes and one scale per output channel: w = value * weight_scale."""

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec("weight_packed", torch.uint8, packed_shape(n, k, self.bits), True, TILE_N),
            TensorSpec("weight_scale", torch.float32, (n,), False, 1),
        )

    def steps(self, scales: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        return scales["weight_scale"].unsqueeze(1)

    def scales(self, weight: Tensor) -> dict[str, Tensor]:
        blocks = [self._scales_of(weight[begin:end]) for begin, end in row_blocks(*weight.shape)] or [self._scales_of(weight)]
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    def _scales_of(self, rows: Tensor) -> dict[str, Tensor]:
        """scales() of some rows, n a multiple of 16 or the last ones."""
        raise NotImplementedError

    def quantize(self, rows: Tensor, scales: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        known = self._scales_of(rows) if scales is None else dict(scales)
        return {"weight_packed": ops.from_rows(self.codes(rows, self.steps(known, *rows.shape)), self.bits), **known}

    def dequantize(self, stored: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        steps = self.steps(stored, n, k)
        values = ops.to_rows(stored["weight_packed"], n, k, self.bits)
        return (grouped(values, steps.shape[1]) * steps.unsqueeze(-1)).reshape(n, k)

    def plain_tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        rows = TensorSpec("weight_packed", torch.int8, (n, k), True, 1)
        return (rows, *(spec for spec in self.tensors(n, k) if spec.name != rows.name))

    def to_plain(self, stored: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        return {**stored, "weight_packed": ops.to_rows(stored["weight_packed"], n, k, self.bits)}

    def from_plain(self, plain: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        return {**plain, "weight_packed": ops.from_rows(plain["weight_packed"], self.bits)}

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        return self.op(x, parameters["weight_packed"], buffers["weight_scale"], bias, "none", self.bits)


@dataclass(frozen=True)
class _Int8(_Tiles):
    """8-bit tiles, one scale per output channel, symmetric: w = (code - 128) * weight_scale."""

    bits: ClassVar[int] = 8

    def _scales_of(self, rows: Tensor) -> dict[str, Tensor]:
        return {"weight_scale": ops.quantize_rows(rows)[1]}

    def codes(self, rows: Tensor, steps: Tensor) -> Tensor:
        return ops.quantize_rows(rows)[0]  # the formula of the activations: of a row's absmax, from which the step follows too

    def quantize(self, rows: Tensor, scales: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        q, scale, _ = ops.quantize_rows(rows)
        return {"weight_packed": ops.from_rows(q), "weight_scale": scale}

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        return self.op(x, parameters["weight_packed"], buffers["weight_scale"], bias)


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
        return (*super().tensors(n, k), TensorSpec("input_scale", torch.float32, (), False, 0))

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


GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Int4(_Tiles):
    """Int4 weights, symmetric (-8..7), int8 activations quantised per token at run time, exact int32 sums.

    group_size  None: one scale per output channel; 128, 64 or 32: one for each group of so many k, float16 times the channel's

    A step is chosen among absmax / 7 * (1, 15/16 ... 8/16): the one with the least squared error of the weights.
    """

    tag: ClassVar[str] = "int4"
    op: ClassVar[ops.Op] = ops.linear_dynamic
    bits: ClassVar[int] = 4
    group_size: int | None = None

    def __post_init__(self) -> None:
        size = self.group_size
        if size is not None and (type(size) is not int or size not in GROUP_SIZES):
            raise ValueError(f"Int4: group_size is {size!r}, expected None or one of: {', '.join(map(str, GROUP_SIZES))}")
        if size is not None:
            object.__setattr__(self, "op", ops.linear_grouped)

    def check_sizes(self, n: int, k: int) -> None:
        super().check_sizes(n, k)
        if self.group_size is not None and k % self.group_size:
            fit = ", ".join(str(size) for size in GROUP_SIZES if k % size == 0)
            raise ValueError(
                f"{self!r}: group_size {self.group_size} must divide in_features={k}; "
                + (f"those that do: {fit}" if fit else "no group size does, use Int4()")
            )

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        if self.group_size is None:
            return super().tensors(n, k)
        shape = (ceil_div(n, TILE_N), k // self.group_size, 2 * TILE_N)
        return (*super().tensors(n, k), TensorSpec("group_scale", torch.uint8, shape, True, TILE_N))

    def plain_tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        if self.group_size is None:
            return super().plain_tensors(n, k)
        group_scale = TensorSpec("group_scale", torch.float32, (n, k // self.group_size), True, 1)
        return (*(spec for spec in super().plain_tensors(n, k) if spec.name != group_scale.name), group_scale)

    def to_plain(self, stored: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        plain = super().to_plain(stored, n, k)
        return plain if self.group_size is None else {**plain, "group_scale": ops.group_scales(stored["group_scale"], n)}

    def from_plain(self, plain: Mapping[str, Tensor], n: int, k: int) -> dict[str, Tensor]:
        stored = super().from_plain(plain, n, k)
        return stored if self.group_size is None else {**stored, "group_scale": ops.group_scale_bytes(plain["group_scale"])}

    def steps(self, scales: Mapping[str, Tensor], n: int, k: int) -> Tensor:
        steps = super().steps(scales, n, k)
        return steps if self.group_size is None else steps * ops.group_scales(scales["group_scale"], n)

    def _scales_of(self, rows: Tensor) -> dict[str, Tensor]:
        if self.group_size is None:
            return self.scales_of(least_squares_steps(rows, 1))
        return self.scales_of(least_squares_steps(rows, rows.shape[1] // self.group_size))

    def scales_of(self, steps: Tensor) -> dict[str, Tensor]:
        """float32 steps [n, 1] or [n, G], found by whatever means -> the scales that store them, rounded as stored."""
        if self.group_size is None:
            return {"weight_scale": without_tiny(steps).squeeze(1)}
        largest = steps.amax(1) if steps.shape[1] else steps.new_zeros(steps.shape[0])
        relative = steps / torch.where(largest > 0, largest, 1.0).unsqueeze(1)
        return {"weight_scale": largest, "group_scale": ops.group_scale_bytes(relative)}

    def codes(self, rows: Tensor, steps: Tensor) -> Tensor:
        *_, lowest, highest = CODES[self.bits]
        values = nearest(grouped(rows, steps.shape[1]), without_tiny(steps).unsqueeze(-1), lowest, highest)
        return values.to(torch.int8).reshape(rows.shape)

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        tiles, scale = parameters["weight_packed"], buffers["weight_scale"]
        if self.group_size is None:
            return ops.linear_dynamic(x, tiles, scale, bias, "none", 4)
        return ops.linear_grouped(x, tiles, scale, parameters["group_scale"], bias)


@dataclass(frozen=True)
class Ternary(_Tiles):
    """Weights -1, 0, 1 times a scale, the mean of abs(w); int8 activations per token. For weights trained for it (BitNet b1.58).

    granularity  "channel": a scale for each output channel; "tensor": one for the whole weight, as BitNet has it

    Source: Ma et al., arXiv:2402.17764.
    """

    tag: ClassVar[str] = "ternary"
    op: ClassVar[ops.Op] = ops.linear_dynamic
    bits: ClassVar[int] = 2
    granularity: str = "channel"

    def __post_init__(self) -> None:
        if self.granularity not in ("channel", "tensor"):
            raise ValueError(f"Ternary: granularity is {self.granularity!r}, expected 'channel' or 'tensor'")

    @property
    def scales_need_all_rows(self) -> bool:
        return self.granularity == "tensor"

    def scales(self, weight: Tensor) -> dict[str, Tensor]:
        if not self.scales_need_all_rows:
            return super().scales(weight)
        return {"weight_scale": mean_abs_of_all(weight).repeat(weight.shape[0])}

    def _scales_of(self, rows: Tensor) -> dict[str, Tensor]:
        return self.scales(rows) if self.scales_need_all_rows else {"weight_scale": mean_abs(rows)}

    def codes(self, rows: Tensor, steps: Tensor) -> Tensor:
        return nearest(rows.float(), without_tiny(steps), -1, 1).to(torch.int8)


@dataclass(frozen=True)
class Binary(_Tiles):
    """Weights -1 and 1 (0 counts as positive) times the mean of abs(w) per output channel; int8 activations per token. For weights
    trained for it. Source: Rastegari et al., arXiv:1603.05279."""

    tag: ClassVar[str] = "binary"
    op: ClassVar[ops.Op] = ops.linear_dynamic
    bits: ClassVar[int] = 1

    def _scales_of(self, rows: Tensor) -> dict[str, Tensor]:
        return {"weight_scale": mean_abs(rows)}

    def codes(self, rows: Tensor, steps: Tensor) -> Tensor:
        return (rows >= 0).to(torch.int8) * 2 - 1


@dataclass(frozen=True)
class BinaryXnor(Binary):
    """Weights as in Binary, activations binary too: the sign of x - threshold times the mean of abs(x - threshold) over the row.

    The threshold of each input feature is the layer's buffer `threshold`, float32 [K]: zeros at a conversion, and may be set later.
    For models trained for it. Sources: Rastegari et al., arXiv:1603.05279 (XNOR-Net); Liu et al., arXiv:2003.03488 (thresholds).
    """

    tag: ClassVar[str] = "binary-xnor"
    op: ClassVar[ops.Op] = ops.linear_xnor

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return (*super().tensors(n, k), TensorSpec("threshold", torch.float32, (k,), False, 0))

    def constants(self) -> dict[str, Tensor]:
        return {"threshold": torch.zeros((), device="cpu")}

    def linear(self, x: Tensor, parameters: Stored, buffers: Stored, bias: Tensor | None) -> Tensor:
        return self.op(x, parameters["weight_packed"], buffers["weight_scale"], buffers["threshold"], bias)


FORMATS: dict[str, type[Format]] = {
    cls.tag: cls for cls in (Int8Dynamic, Int8Static, Int8WeightOnly, Int4, Ternary, Binary, BinaryXnor, SparseInt8, SparseFloat)
}

# quantize_weights(num_bits, activations) -> format
BY_BITS: dict[tuple[int, str | None], type[Format]] = {
    (8, "int8"): Int8Dynamic,
    (8, None): Int8WeightOnly,
    (4, "int8"): Int4,
    (2, "int8"): Ternary,
    (1, "int8"): Binary,
    (1, "binary"): BinaryXnor,
}


def format_from_dict(data: Any) -> Format:
    """The inverse of Format.to_dict; raises ValueError on anything else than a known format with its own fields."""
    name = data.get("name") if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format is {name!r}, expected one of: {', '.join(FORMATS)}")
    cls = FORMATS[name]
    given = {key: value for key, value in data.items() if key != "name"}
    known = set(tag_fields(cls))
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
