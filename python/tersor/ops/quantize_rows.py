"""Rows of activations to int8, one scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ._register import op
from .checks import check_device, check_per_row, check_tensors, check_x

TINY_ABSMAX = 2.0**-100  # below it a row is zero: 127 / absmax would leave the float range
_INV_127 = torch.tensor(1.0, dtype=torch.float32).div(127.0).item()


def scale_of(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, inv) of the formula for float32 absmax: both 0 below 2**-100, scale NaN where absmax is not finite."""
    zero = torch.zeros_like(absmax)
    usable = torch.isfinite(absmax) & (absmax >= TINY_ABSMAX)
    scale = torch.where(usable, absmax * _INV_127, zero)
    # torch.div of two tensors: "127.0 / absmax" would be 127 * reciprocal(absmax), which rounds twice
    inv = torch.where(usable, torch.div(torch.full_like(absmax, 127.0), absmax), zero)
    return torch.where(torch.isfinite(absmax), scale, torch.nan), inv


def row_absmax(x: Tensor) -> Tensor:
    """max |x| over the last dimension; 0 where it is empty; not finite where a row holds NaN or inf."""
    return x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, row_sum) of x, their values unset."""
    lead = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(lead, dtype=torch.float32),
        x.new_empty(lead, dtype=torch.int32),
    )


def _check(x: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    check_x("quantize_rows", x)
    check_device("quantize_rows", x, absmax=absmax)
    if absmax is not None:
        check_tensors("quantize_rows", absmax=absmax)
        check_per_row("quantize_rows", "absmax", absmax, torch.float32, x.shape[:-1])
    return empty_rows(x)


@op("(Tensor x, Tensor? absmax=None) -> (Tensor, Tensor, Tensor)", check=_check, kernels=("quantize_x",), rows=2, out=True)
def quantize_rows(x: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token symmetric int8: q = rint(clamp(x * 127/absmax, -127, 127)), scale = absmax * (1/127f), ties to even.

    x        float32 / bfloat16 / float16 [..., K], any strides
    absmax   float32 [...] taken in place of each row's own (values beyond it saturate), or None
    returns  (q int8 [..., K], scale float32 [...], row_sum int32 [...]); real value = q * scale, row_sum = sum of q

    A row with absmax < 2**-100 gives q = 0, scale = 0; a row with NaN or inf gives q = 0, scale = NaN, and touches no other.
    Raises ValueError / TypeError on a wrong dtype or shape, or K > 132104. Scheme: Dettmers et al., arXiv:2208.07339, section 2
    (row-wise absmax quantisation).
    """
    _check(x, absmax)
    xf = x.float()
    own = row_absmax(xf)
    # A NaN or inf in the row decides, whatever absmax says.
    given = own if absmax is None else torch.where(torch.isfinite(own), absmax.abs(), torch.nan)
    scale, inv = scale_of(given)
    finite = torch.isfinite(given).unsqueeze(-1)
    scaled = torch.where(finite, xf, 0.0) * inv.unsqueeze(-1)
    q = torch.round(torch.clamp(scaled, -127.0, 127.0)).to(torch.int8).contiguous()
    return q, scale, q.sum(-1, dtype=torch.int32)


def check_input_scale(function: str, input_scale: Tensor) -> None:
    check_tensors(function, input_scale=input_scale)
    if input_scale.dtype != torch.float32 or input_scale.dim() != 0:
        raise ValueError(f"{function}: input_scale is {input_scale.dtype} {list(input_scale.shape)}, expected float32 []")


def _check_static(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_x("quantize_static", x)
    check_input_scale("quantize_static", input_scale)
    check_device("quantize_static", x, input_scale=input_scale)
    return empty_rows(x)


@op("(Tensor x, Tensor input_scale) -> (Tensor, Tensor, Tensor)", check=_check_static, kernels=("quantize_x",))
def quantize_static(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric int8 by one known scale: q = rint(clamp(x * (1/s), -127, 127)), ties to even, without looking for the absmax.

    x            float32 / bfloat16 / float16 [..., K], any strides
    input_scale  float32 []: s = |input_scale|, one step of q; |x| beyond 127 steps saturates. Below 2**-100 q = 0, scale = 0
    returns      as quantize_rows; scale is s for every row, NaN (and q = 0) for a row with NaN or inf, or all where s is

    Raises ValueError / TypeError on a wrong dtype or shape, or K > 132104.
    """
    _check_static(x, input_scale)
    s = input_scale.abs()
    usable = torch.isfinite(s) & (s >= TINY_ABSMAX)
    inv = torch.where(usable, torch.div(torch.ones_like(s), s), 0.0)
    xf = x.float()
    finite = torch.isfinite(xf).all(-1)
    scaled = torch.where(finite.unsqueeze(-1), xf, 0.0) * inv
    q = torch.round(torch.clamp(scaled, -127.0, 127.0)).to(torch.int8).contiguous()
    known = torch.where(usable, s, torch.where(torch.isfinite(s), 0.0, torch.nan))
    scale = torch.where(finite, known, torch.nan)
    return q, scale, q.sum(-1, dtype=torch.int32)
