"""Binary activations: rows to one bit an element, and the layer of binary weights on them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import int_matmul as _int_matmul
from ._register import op
from .checks import as_rows, check_device, check_linear, check_residual, check_tensors, check_x
from .linear_int8 import finish
from .tiles import ceil_div, to_rows

WORD = 32  # k of one word
_LANES = 64  # partial sums of a row: what four 512-bit registers hold
# Element k = 4j + b of a word is bit 8b + j, as in a tile of 1-bit codes. Bit 31 is the sign of an int32.
_BIT_VALUES = [1 << (8 * (k % 4) + k // 4) for k in range(WORD)]
_BIT_VALUES[-1] -= 1 << 32


def check_threshold(function: str, threshold: Tensor, k: int) -> None:
    check_tensors(function, threshold=threshold)
    if threshold.dtype != torch.float32 or tuple(threshold.shape) != (k,):
        raise ValueError(f"{function}: threshold is {threshold.dtype} {list(threshold.shape)}, expected torch.float32 [{k}]")


def _check_binarize(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    k = check_x("binarize_rows", x)
    check_threshold("binarize_rows", threshold, k)
    check_device("binarize_rows", x, threshold=threshold)
    lead = x.shape[:-1]
    return x.new_empty((*lead, ceil_div(k, WORD)), dtype=torch.int32), x.new_empty(lead, dtype=torch.float32)


def _signs(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """(x >= threshold, scale): bool [..., K] and float32 [...]; False and NaN where a row of x holds NaN or inf."""
    xf = x.float()
    finite = torch.isfinite(xf).all(-1)
    # Each term is divided before the sum, so that no sum of finite terms leaves the float range.
    scale = _sum_in_order((xf - threshold).abs() * (1.0 / max(1, x.shape[-1])))
    return (xf >= threshold) & finite.unsqueeze(-1), torch.where(finite, scale, torch.nan)


def _sum_in_order(terms: Tensor) -> Tensor:
    """Sum over the last dim, each addition rounded, in the kernel's order: 64 sums by k mod 64, of which the four runs of 16 are
    added as (0 + 1) + (2 + 3), and the 16 in halves."""
    k = terms.shape[-1]
    blocks = torch.nn.functional.pad(terms, (0, -k % _LANES)).unflatten(-1, (ceil_div(k, _LANES), _LANES))
    lanes = terms.new_zeros((*terms.shape[:-1], _LANES))
    for i in range(blocks.shape[-2]):
        lanes = lanes + blocks[..., i, :]
    p0, p1, p2, p3 = lanes.unflatten(-1, (4, 16)).unbind(-2)
    total = (p0 + p1) + (p2 + p3)
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half:]
    return total.squeeze(-1)


@op("(Tensor x, Tensor threshold) -> (Tensor, Tensor)", check=_check_binarize, kernels=("binarize_x",))
def binarize_rows(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token binary activations: bit 1 where x >= threshold, scale = mean of abs(x - threshold).

    x          float32 / bfloat16 / float16 [..., K], any strides
    threshold  float32 [K]; x at its threshold counts as positive, so sign(0) = +1
    returns    (bits int32 [..., ceil(K/32)], scale float32 [...]); real value = (bit ? 1 : -1) * scale

    Bits lie in the order of a 1-bit tile: k = 4j + b of a word at bit 8b + j; pads are 0. scale = sum_k (abs(x - threshold) *
    f32(1/K)), in one order on every device. A row with NaN or inf gives bits 0, scale NaN, and touches no other. Raises
    ValueError / TypeError on a wrong dtype or shape. Sources: Rastegari et al., arXiv:1603.05279 (XNOR-Net); Liu et al.,
    arXiv:2003.03488 (ReActNet: thresholds).
    """
    _check_binarize(x, threshold)
    positive, scale = _signs(x, threshold)
    words = ceil_div(x.shape[-1], WORD)
    padded = torch.nn.functional.pad(positive.to(torch.int32), (0, words * WORD - x.shape[-1]))
    values = torch.tensor(_BIT_VALUES, dtype=torch.int32, device=x.device)
    bits = (padded.reshape(*x.shape[:-1], words, WORD) * values).sum(-1, dtype=torch.int32)
    return bits, scale


def _check_xnor(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    y = check_linear("linear_xnor", x, weight_packed, weight_scale, bias, epilogue, 1, threshold=threshold)
    check_threshold("linear_xnor", threshold, x.shape[-1])
    check_residual("linear_xnor", residual, y)
    return y


@op(
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor threshold, Tensor? bias, str epilogue='none', "
    "Tensor? residual=None) -> Tensor",
    check=_check_xnor,
    kernels=("binarize_x", "gemm_xnor"),
    autocast=True,
)
def linear_xnor(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Binary linear layer: signs of x times signs of w, act(((f32(acc) * scale) * weight_scale) + bias) + residual.

    x              float32 / bfloat16 / float16 [..., K], any strides; binarised as by binarize_rows
    weight_packed  uint8 [ceil(N/16), ceil(K/32), 64] tiles of 1-bit codes
    weight_scale   float32 [N]
    threshold      float32 [K]
    bias           float [N] or None
    residual       dtype of x, [..., N]: added after the activation, in float32; or None
    returns        dtype of x, [..., N]; acc = K - 2 * popcount(w xor x), exact

    Raises ValueError / TypeError where sizes or dtypes do not fit. Gradients for x and bias: straight-through where
    abs(x - threshold) <= 1, else 0. Source: Rastegari et al., arXiv:1603.05279.
    """
    _check_xnor(x, weight_packed, weight_scale, threshold, bias, epilogue, residual)
    n, k = weight_scale.shape[0], x.shape[-1]
    positive, scale = _signs(x, threshold)
    signs = positive.to(torch.int8) * 2 - 1
    acc = _int_matmul.int_matmul(as_rows(signs), to_rows(weight_packed, n, k, 1)).reshape(*x.shape[:-1], n)
    return finish(acc, scale, weight_scale, bias, epilogue, x.dtype, residual)
