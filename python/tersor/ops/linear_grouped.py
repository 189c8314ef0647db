"""Linear layer on 4-bit tiles whose weight has one scale for each group of k, beside that of the channel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import int_matmul as _int_matmul
from ._register import op
from .checks import as_rows, check_group_scale, check_linear, check_residual
from .linear_int8 import finish
from .quantize_rows import quantize_rows
from .tiles import TILE_N, ceil_div, to_rows

BITS = 4


def group_scales(group_scale: Tensor, n: int) -> Tensor:
    """Stored bytes uint8 [ceil(N/16), G, 32] -> float32 [N, G]; these, where a device without kernels keeps them, as they are."""
    if group_scale.dtype == torch.float32:
        return group_scale
    # A copy, which is small, begins at a multiple of 2 bytes wherever the bytes lay.
    halves = group_scale.clone(memory_format=torch.contiguous_format).view(torch.float16)
    nt, groups, _ = halves.shape
    return halves.permute(0, 2, 1).reshape(nt * TILE_N, groups)[:n].float()


def group_scale_bytes(scales: Tensor) -> Tensor:
    """float [N, G] -> stored bytes uint8 [ceil(N/16), G, 32] of its float16 values; channels that do not exist get 0."""
    n, groups = scales.shape
    nt = ceil_div(n, TILE_N)
    padded = torch.nn.functional.pad(scales.to(torch.float16), (0, 0, 0, nt * TILE_N - n))
    return padded.reshape(nt, TILE_N, groups).permute(0, 2, 1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _check(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    y = check_linear("linear_grouped", x, weight_packed, weight_scale, bias, epilogue, BITS, group_scale=group_scale)
    check_group_scale("linear_grouped", group_scale, y.shape[-1], x.shape[-1])
    check_residual("linear_grouped", residual, y)
    return y


@op(
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor group_scale, Tensor? bias, str epilogue='none', "
    "Tensor? residual=None) -> Tensor",
    check=_check,
    kernels=("quantize_x", "gemm_w4_grouped"),
    autocast=True,
)
def linear_grouped(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    group_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Int4 linear layer with group scales and dynamic int8 activations.

        y[m, n] = act(((sum over g of f32(acc_g[m, n]) * group_scale[n, g]) * scale[m]) * weight_scale[n] + bias[n])

    x              float32 / bfloat16 / float16 [..., K], any strides; quantised as by quantize_rows, one scale a row
    weight_packed  uint8 [ceil(N/16), ceil(K/8), 64] tiles of codes w + 8
    weight_scale   float32 [N]
    group_scale    uint8 [ceil(N/16), G, 32]: bytes of float16 [ceil(N/16), G, 16], times the channel's; K / G is a multiple of 32
    bias           float [N] or None
    residual       dtype of x, [..., N]: added after the activation, in float32; or None
    returns        dtype of x, [..., N]

    acc_g is the exact int32 sum over a group; the float32 sum over groups ascends (class F of docs/numerics.md). Raises
    ValueError / TypeError where sizes or dtypes do not fit.
    """
    _check(x, weight_packed, weight_scale, group_scale, bias, epilogue, residual)
    n, k = weight_scale.shape[0], x.shape[-1]
    q, scale, _ = quantize_rows.reference(x)
    total = sum_of_groups(as_rows(q), to_rows(weight_packed, n, k, BITS), group_scales(group_scale, n))
    return finish(total.reshape(*x.shape[:-1], n), scale, weight_scale, bias, epilogue, x.dtype, residual)


def sum_of_groups(q: Tensor, w: Tensor, scales: Tensor) -> Tensor:
    """sum over g of f32(acc_g) * scales[n, g]: q int8 [M, K], w int8 [N, K], scales float32 [N, G] -> float32 [M, N]."""
    total = torch.zeros((q.shape[0], w.shape[0]), dtype=torch.float32, device=q.device)
    size = q.shape[1] // max(1, scales.shape[1])
    for g in range(scales.shape[1]):
        at = slice(g * size, (g + 1) * size)
        total = total + _int_matmul.int_matmul(q[:, at], w[:, at]).float() * scales[:, g]
    return total
