"""Tensor parallelism: ColwiseParallel and RowwiseParallel of QuantLinear, for torch's parallelize_module.

    parallelize_module(model, mesh, {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()})

A layer keeps its names, its global sizes and its tag; its tensors become DTensors, so state_dict, DCP and .to() work as they do for
torch's own styles. What each rank holds of an [N, K] layer over R ranks, kt = 32 / bits:

                  column: N is split             row: K is split
    weight_packed Shard(0) [N/16/R, K/kt, 64]    Shard(1) [N/16, K/kt/R, 64]
    weight_scale  Shard(0) [N/R]                 Replicate [N]
    group_scale   Shard(0) [N/16/R, G, 32]       Shard(1) [N/16, G/R, 32]
    threshold     Replicate [K]                  (refused: its scale is a float sum over K)
    bias          Shard(0) [N/R]                 Replicate [N]
    x             Replicate [..., K]             Shard(-1) [..., K/R]
    y             Shard(-1) [..., N/R]           Replicate [..., N]

FSDP2 (fully_shard) and DDP need nothing of this file: tiles are frozen integer parameters, which FSDP2 shards by whole n tiles and
DDP does not resend. Tensor parallelism comes first where both are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from . import ops
from .formats import Format
from .nn import QuantLinear
from .ops.checks import as_rows
from .ops.linear_int8 import finish
from .ops.quantize_rows import row_absmax
from .ops.tiles import TILE_N

__all__ = ["ColwiseParallel", "RowwiseParallel"]


Stored = Mapping[str, Any]  # the stored tensors of a layer, by name, as this rank has them


def _quantize_slice(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """quantize_rows of a slice of K with the absmax of the whole row."""
    absmax = row_absmax(x).float()
    # Backends disagree on MAX with NaN (gloo keeps or drops it by rank order); inf is ordered, and poisons a row just as well.
    absmax = torch.where(torch.isfinite(absmax), absmax, torch.inf)
    dist.all_reduce(absmax, op=dist.ReduceOp.MAX, group=group)
    return ops.quantize_rows(x, absmax)


def _row_int8(x: Tensor, stored: Stored, bias: Tensor | None, group: dist.ProcessGroup, bits: int = 8) -> Tensor:
    """Layers of linear_dynamic on a slice of K: every rank quantises with the scale of the whole row and the int32 sums are added,
    so the result is that of one process bit for bit (classes I and E)."""
    return _add_sums(_quantize_slice(x, group), stored, bias, group, x.dtype, bits)


def _row_int4(x: Tensor, stored: Stored, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """Int4 on a slice of K. With groups the sum of each is exact, those of a rank are added in float32 in their order, and those of
    the ranks in the backend's (class F)."""
    if "group_scale" not in stored:
        return _row_int8(x, stored, bias, group, 4)
    q, scale, _ = _quantize_slice(x, group)
    tiles, weight_scale, group_scale = stored["weight_packed"], stored["weight_scale"], stored["group_scale"]
    n, groups = weight_scale.shape[0], group_scale.shape[1]
    relative = ops.group_scales(group_scale, n)
    total = torch.zeros((*x.shape[:-1], n), dtype=torch.float32, device=x.device)
    sizes = (q.shape[-1] // max(1, groups), tiles.shape[1] // max(1, groups))
    for g in range(groups):
        q_g, tiles_g = (t.narrow(dim, g * size, size).contiguous() for t, dim, size in zip((q, tiles), (-1, 1), sizes, strict=True))
        acc = ops.linear_acc(q_g, q_g.sum(-1, dtype=torch.int32), tiles_g, n, 4)
        total = total + acc.float() * relative[:, g]
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
    return finish(total, scale, weight_scale, bias, "none", x.dtype)


def _row_static(x: Tensor, stored: Stored, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """Int8Static on a slice of K: the scale is known, only a NaN or inf on another rank is not."""
    q, scale, row_sum = ops.quantize_static(x, stored["input_scale"])
    poisoned = scale.isnan().to(torch.int32)
    dist.all_reduce(poisoned, op=dist.ReduceOp.MAX, group=group)
    scale = torch.where(poisoned.bool(), torch.nan, scale)
    return _add_sums((q, scale, row_sum), stored, bias, group, x.dtype)


def _add_sums(
    rows: tuple[Tensor, Tensor, Tensor],
    stored: Stored,
    bias: Tensor | None,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    q, scale, row_sum = rows
    weight_scale = stored["weight_scale"]
    acc = ops.linear_acc(q, row_sum, stored["weight_packed"], weight_scale.shape[0], bits)
    dist.all_reduce(acc, op=dist.ReduceOp.SUM, group=group)
    return finish(acc, scale, weight_scale, bias, "none", dtype)


def _row_float(x: Tensor, stored: Stored, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    """Int8WeightOnly on a slice of K: float32 sums are added, in the backend's order (class F: bounded, not bit for bit)."""
    y = ops.linear_weight_only(x.float(), stored["weight_packed"], stored["weight_scale"], None)
    dist.all_reduce(y, op=dist.ReduceOp.SUM, group=group)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


Row = Callable[[Tensor, Stored, Tensor | None, dist.ProcessGroup], Tensor]

# The row-parallel forward on local tensors, by Format.tag. None: the format can be split along N alone. One that is not here (a
# sparse one: its tensors do not follow N or K) is refused by name.
SPLITTABLE: dict[str, Row | None] = {
    "int8-dynamic": _row_int8,
    "int8-static": _row_static,
    "int8-weight-only": _row_float,
    "int4": _row_int4,
    "ternary": partial(_row_int8, bits=2),
    "binary": partial(_row_int8, bits=1),
    "binary-xnor": None,
}


def _check_format(style: str, fmt: Format, axis: str) -> None:
    fit = [tag for tag, row in SPLITTABLE.items() if row is not None or axis == "N"]
    if fmt.tag in fit:
        return
    way_out = "; ColwiseParallel can split it" if fmt.tag in SPLITTABLE else ""
    raise ValueError(f"{style}: {fmt!r} cannot be split over ranks; formats that can: {', '.join(fit)}{way_out}")


def split_unit(bits: int, group_size: int | None) -> int:
    """N and K are split in whole multiples of this: no tile, k step or scale group is cut, whichever of the two a layer splits."""
    return math.lcm(TILE_N, 32 // bits, group_size or 1)


def split_size(style: str, name: str, size: int, unit: int, ranks: int) -> int:
    """The part of `size` that each rank holds; raises ValueError naming sizes, and numbers of ranks, that fit."""
    step = unit * ranks
    if size and size % step == 0:
        return size // ranks
    below = size // step * step
    sizes = ", ".join(str(fit) for fit in (below, below + step) if fit)
    fitting = [] if size % unit else [r for r in range(1, size // unit + 1) if size % (unit * r) == 0]
    numbers = f"{name}={size} fits: {', '.join(map(str, fitting))} ranks" if fitting else f"{name}={size} fits no number of ranks"
    raise ValueError(
        f"{style}: {name}={size} must be a multiple of {step} ({ranks} ranks x units of {unit}); nearest that are: {sizes}; "
        f"{numbers}"
    )


def placements(fmt: Format, n: int, k: int, axis: str) -> dict[str, Placement]:
    """Where each stored tensor and the bias go when `axis` ("N" or "K") is split: along the dimension that grows with it."""
    doubled = fmt.tensors(2 * n, k) if axis == "N" else fmt.tensors(n, 2 * k)
    found: dict[str, Placement] = {"bias": Shard(0) if axis == "N" else Replicate()}
    for spec, longer in zip(fmt.tensors(n, k), doubled, strict=True):
        grown = [dim for dim, (a, b) in enumerate(zip(spec.shape, longer.shape, strict=True)) if a != b]
        found[spec.name] = Shard(grown[0]) if grown else Replicate()
    return found


class _ParallelQuantLinear(QuantLinear):
    """A QuantLinear whose tensors are DTensors. A style assigns the class to a layer, as fully_shard does: parallelize_module
    ignores what a style returns for a submodule, so a layer can only change in place."""

    _style: _Style
    _mesh: DeviceMesh
    _axis: ClassVar[str]
    _x_placement: ClassVar[Placement]
    _x_grad_placements: ClassVar[tuple[Placement] | None]  # None: those of x
    _y_placement: ClassVar[Placement]

    def forward(self, input: Tensor) -> Tensor:
        x, style, mesh = input, self._style, self._mesh
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, (style.input_layouts,), run_check=False)
        if x.shape[-1:] != (self.in_features,):
            name = type(style).__name__
            raise ValueError(
                f"{name}: x is {list(x.shape)} over {mesh.size()} ranks ({list(x.to_local().shape)} on this one, taken as "
                f"{x.placements[0]}), expected [..., {self.in_features}]; {name}(input_layouts=...) says how x arrives"
            )
        x = x.redistribute(placements=(self._x_placement,))
        y = self._forward_local(x.to_local(grad_placements=self._x_grad_placements))
        result = DTensor.from_local(y, mesh, (self._y_placement,), run_check=False)
        result = result.redistribute(placements=(style.output_layouts,))
        return result.to_local() if style.use_local_output else result

    def _forward_local(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def dequantize(self) -> nn.Linear:
        raise ValueError("QuantLinear: this layer is split over ranks; call dequantize before parallelize_module")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, style={self._style!r}"


class _ColwiseQuantLinear(_ParallelQuantLinear):
    _axis = "N"
    _x_placement = Replicate()
    _x_grad_placements = (Partial(),)  # each rank's channels give one summand of grad_x; DTensor adds them
    _y_placement = Shard(-1)

    def _forward_local(self, x: Tensor) -> Tensor:
        parameters = {name: _local(t) for name, t in self._parameters.items()}
        buffers = {name: _local(t) for name, t in self._buffers.items()}
        return self.format.linear(x, parameters, buffers, parameters["bias"])


class _RowwiseQuantLinear(_ParallelQuantLinear):
    _axis = "K"
    _x_placement = Shard(-1)
    _x_grad_placements = None
    _y_placement = Replicate()

    def _forward_local(self, x: Tensor) -> Tensor:
        stored = {spec.name: _local(getattr(self, spec.name)) for spec in self.specs()}
        row = SPLITTABLE[self.format.tag]
        y = _RowLinear.apply(x, _local(self._parameters["bias"]), stored, row, self._mesh.get_group(), self.format.bits)
        device = x.device.type
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


def _local(t: Tensor | None) -> Tensor | None:
    return t.to_local() if isinstance(t, DTensor) else t


class _RowLinear(torch.autograd.Function):
    """The straight-through backward of ops.differentiable: y is the same on every rank, so each has all it needs for its slice of
    grad_x and for the whole of grad_bias, and nothing is sent."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        stored: Stored,
        row: Row,
        group: dist.ProcessGroup,
        bits: int,
    ) -> Tensor:
        ctx.save_for_backward(stored["weight_packed"], stored["weight_scale"], stored.get("group_scale"))
        ctx.bits = bits
        ctx.in_features = x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return row(x, stored, bias, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_packed, weight_scale, group_scale = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.input_grad(grad, weight_packed, weight_scale, ctx.in_features, group_scale, ctx.bits)
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = as_rows(grad).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None


class _Style(ParallelStyle):
    """What the two styles share: checks first, then the tensors of the layer are distributed and its forward is exchanged."""

    layer: ClassVar[type[_ParallelQuantLinear]]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or self.layer._x_placement
        self.output_layouts = output_layouts or self.layer._y_placement
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        name = type(self).__name__
        if type(module) is not QuantLinear:
            if isinstance(module, QuantLinear):
                raise TypeError(f"{name}: module is a {type(module).__name__}; a QuantLinear is split once, before fully_shard")
            raise TypeError(
                f"{name}: module is {type(module).__name__}, expected a QuantLinear; "
                f"float layers take torch.distributed.tensor.parallel.{name}"
            )
        if device_mesh.ndim != 1:
            raise ValueError(f'{name}: device_mesh has {device_mesh.ndim} dimensions, expected 1; pass one of them, as mesh["tp"]')
        fmt, n, k = module.format, module.out_features, module.in_features
        axis = self.layer._axis
        _check_format(name, fmt, axis)
        unit = split_unit(fmt.bits, getattr(fmt, "group_size", None))
        split_size(name, *(("out_features", n) if axis == "N" else ("in_features", k)), unit, device_mesh.size())

        where = placements(fmt, n, k, axis)
        for key in [spec.name for spec in module.specs()] + ([] if module.bias is None else ["bias"]):
            whole = getattr(module, key)
            part = distribute_tensor(whole.detach(), device_mesh, (where[key],), src_data_rank=self.src_data_rank)
            setattr(module, key, nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part)
        module.__class__ = self.layer
        module._style = self  # type: ignore[assignment]
        module._mesh = device_mesh  # type: ignore[assignment]
        return module

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, output_layouts={self.output_layouts}, "
            f"use_local_output={self.use_local_output})"
        )


class ColwiseParallel(_Style):
    """Splits the output channels of a QuantLinear: each rank computes its slice with the ordinary op, on all of x.

    input_layouts     how x arrives when it is no DTensor; None: Replicate()
    output_layouts    how y leaves; None: Shard(-1)
    use_local_output  y as a plain tensor, the local part, rather than a DTensor

    Nothing is sent in the forward pass but what input_layouts and output_layouts ask for; backward adds grad_x over the ranks.
    parallelize_module raises TypeError where the module is no QuantLinear, ValueError where its format cannot be split or
    out_features is no multiple of ranks x lcm(16, kt, group_size). Source: Shoeybi et al., arXiv:1909.08053, section 3.
    """

    layer = _ColwiseQuantLinear


class RowwiseParallel(_Style):
    """Splits the input channels of a QuantLinear, x with them: each rank sums over its slice of K and the sums are added.

    input_layouts     how x arrives when it is no DTensor; None: Shard(-1)
    output_layouts    how y leaves; None: Replicate()
    use_local_output  y as a plain tensor, the local part, rather than a DTensor

    Int8Dynamic, Int4(), Ternary and Binary send float32 [M] (absmax) and int32 [M, N] (sums); y equals that of one process bit for
    bit, and a NaN or inf on one rank makes its row NaN on all. Int8Static sends int32 [M] in place of the absmax. Int8WeightOnly
    and Int4 with groups send float32 [M, N]; y is within a bound (class F). BinaryXnor is refused. Backward sends nothing.
    parallelize_module raises TypeError where the module is no QuantLinear, ValueError where its format cannot be split or
    in_features is no multiple of ranks x lcm(16, kt, group_size). Source: Shoeybi et al., arXiv:1909.08053, section 3.
    """

    layer = _RowwiseQuantLinear
