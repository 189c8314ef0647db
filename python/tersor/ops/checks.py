"""Checks shared by the shape rules. Each names the function, the argument, what came and what was wanted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .epilogues import check_epilogue
from .tiles import MAX_K, TILE_N, ceil_div, check_bits, check_tiles

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_x(function: str, x: Tensor) -> int:
    """x must be a dense float tensor [..., K] with K in the exact range; returns K."""
    check_tensors(function, x=x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{function}: x is {x.dtype}, expected float32, bfloat16 or float16")
    return check_last_dim(function, "x", x)


def check_tensors(function: str, **arguments: Tensor) -> None:
    """Each must be a dense tensor. torch itself passes a None on to the op, and anything sparse to the reference."""
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{function}: {name} is {type(t).__name__}, expected a Tensor")
        if t.is_nested:
            raise TypeError(
                f"{function}: {name} is a nested tensor, expected a dense one; pad it with torch.nested.to_padded_tensor"
            )
        if t.layout is not torch.strided:
            raise TypeError(f"{function}: {name} is {t.layout}, expected a dense tensor; call .to_dense() first")


def check_last_dim(function: str, name: str, x: Tensor) -> int:
    if x.dim() == 0:
        raise ValueError(f"{function}: {name} is 0-dimensional, expected [..., K]")
    k = x.shape[-1]
    if k > MAX_K:
        raise ValueError(f"{function}: K={k} is above {MAX_K}, the largest for which int32 sums are exact")
    return k


def as_rows(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]; unlike reshape(-1, K) also for K = 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_device(function: str, x: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{function}: {name} is on {t.device}, x on {x.device}; move the module or x so that they meet")


def check_weights(
    function: str, k: int, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, epilogue: str, bits: int = 8
) -> int:
    """The stored tensors of a layer must fit each other and K; returns N."""
    check_bits(function, bits)
    check_tensors(function, weight_packed=weight_packed, weight_scale=weight_scale)
    if bias is not None:
        check_tensors(function, bias=bias)
    n = check_weight_scale(function, weight_scale)
    tile_k = 32 // bits
    if weight_packed.dim() == 3 and k > 0 and weight_packed.shape[1] != ceil_div(k, tile_k):
        most = weight_packed.shape[1] * tile_k
        width = "" if bits == 8 else f" at bits={bits}"
        raise ValueError(
            f"{function}: x has K={k}, but weight_packed {list(weight_packed.shape)} holds K in "
            f"[{most - tile_k + 1}, {most}]{width}"
        )
    check_tiles(function, weight_packed, n, k, bits)
    check_bias(function, bias, n)
    check_epilogue(function, epilogue)
    return n


def check_weight_scale(function: str, weight_scale: Tensor) -> int:
    """One scale for each output channel; returns N."""
    if weight_scale.dtype != torch.float32 or weight_scale.dim() != 1:
        raise ValueError(f"{function}: weight_scale is {weight_scale.dtype} {list(weight_scale.shape)}, expected float32 [N]")
    return weight_scale.shape[0]


def check_bias(function: str, bias: Tensor | None, n: int) -> None:
    if bias is None:
        return
    check_tensors(function, bias=bias)
    if bias.dtype not in FLOATS or tuple(bias.shape) != (n,):
        raise ValueError(f"{function}: bias is {bias.dtype} {list(bias.shape)}, expected float [{n}]")


def check_linear(
    function: str,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str,
    bits: int = 8,
    **others: Tensor | None,
) -> Tensor:
    """The shape rule of a layer on float x [..., K]: empty [..., N] in the dtype of x. `others` must be on the device of x too."""
    k = check_x(function, x)
    check_device(function, x, weight_packed=weight_packed, weight_scale=weight_scale, bias=bias, **others)
    n = check_weights(function, k, weight_packed, weight_scale, bias, epilogue, bits)
    return x.new_empty((*x.shape[:-1], n))


def check_residual(function: str, residual: Tensor | None, y: Tensor) -> None:
    """What is added to y has its shape, dtype and device."""
    if residual is None:
        return
    check_tensors(function, residual=residual)
    if residual.dtype != y.dtype or residual.shape != y.shape:
        raise ValueError(f"{function}: residual is {residual.dtype} {list(residual.shape)}, expected {y.dtype} {list(y.shape)}")
    if residual.device != y.device:
        raise ValueError(f"{function}: residual is on {residual.device}, x on {y.device}; move both to one device")


def check_per_row(function: str, name: str, t: Tensor, dtype: torch.dtype, lead: torch.Size) -> None:
    if t.dtype != dtype or t.shape != lead:
        raise ValueError(f"{function}: {name} is {t.dtype} {list(t.shape)}, expected {dtype} {list(lead)}, one for each row")


GROUP_UNIT = 32  # the sizes of scale groups are multiples of it: whole words of codes of every width


def check_group_scale(function: str, group_scale: Tensor, n: int, k: int) -> int:
    """Scales of groups of k: bytes of float16 [ceil(N/16), G, 16]; returns the size of a group, K / G."""
    check_tensors(function, group_scale=group_scale)
    nt = ceil_div(n, TILE_N)
    as_rows = group_scale.dtype == torch.float32 and group_scale.dim() == 2 and group_scale.shape[0] == n
    if as_rows and k > 0 and group_scale.shape[1] > 0 and k % (GROUP_UNIT * group_scale.shape[1]) == 0:
        return k // group_scale.shape[1]
    if group_scale.dtype != torch.uint8 or group_scale.dim() != 3 or group_scale.shape[0] != nt or group_scale.shape[2] != 32:
        raise ValueError(
            f"{function}: group_scale is {group_scale.dtype} {list(group_scale.shape)}, expected "
            f"torch.uint8 [{nt}, G, 32], the bytes of float16 [{nt}, G, 16]"
        )
    groups = group_scale.shape[1]
    if k == groups == 0:
        return GROUP_UNIT
    if groups == 0 or k % (GROUP_UNIT * groups) or k == 0:
        units = k // GROUP_UNIT
        fit = [] if k % GROUP_UNIT else [str(g) for g in range(1, units + 1) if units % g == 0]
        named = ", ".join(fit[:12]) + (", ..." if len(fit) > 12 else "")
        raise ValueError(
            f"{function}: group_scale is {list(group_scale.shape)}, {groups} groups of K={k}; K / G must be a multiple "
            f"of {GROUP_UNIT}, G that fit: {named or 'none'}"
        )
    return k // groups
