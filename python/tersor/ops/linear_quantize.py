"""Int8 linear layers whose result another int8 layer reads: its int8 rows, without a float tensor between."""

from __future__ import annotations

import torch
from torch import Tensor

from ._register import op
from .checks import check_linear
from .linear_int8 import GEMM, check_on_rows, linear_dynamic, linear_s8
from .quantize_rows import empty_rows, quantize_rows

Rows = tuple[Tensor, Tensor, Tensor]


def _check_dynamic(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, epilogue: str = "none", bits: int = 8
) -> Rows:
    return empty_rows(check_linear("linear_dynamic_quantize", x, weight_packed, weight_scale, bias, epilogue, bits))


@op(
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, str epilogue='none', int bits=8) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check_dynamic,
    kernels=("quantize_x", *GEMM),
    inference=True,
    out=True,
)
def linear_dynamic_quantize(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, epilogue: str = "none", bits: int = 8
) -> Rows:
    """quantize_rows(linear_dynamic(...)), bit for bit: q int8 [..., N], scale float32 [...], row_sum int32 [...].

    The float result, rounded to the dtype of x, exists for a block of rows at a time. Arguments and errors are those of
    linear_dynamic, and RuntimeError where a gradient is needed.
    """
    _check_dynamic(x, weight_packed, weight_scale, bias, epilogue, bits)
    return quantize_rows.reference(linear_dynamic.reference(x, weight_packed, weight_scale, bias, epilogue, bits))


def _check_s8(
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    out_dtype: torch.dtype = torch.float32,
    bits: int = 8,
) -> Rows:
    name = "linear_s8_quantize"
    n = check_on_rows(name, q, scale, row_sum, weight_packed, weight_scale, bias, epilogue, bits, out_dtype=out_dtype)
    return empty_rows(q.new_empty((*q.shape[:-1], n), dtype=out_dtype))


@op(
    "(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, Tensor? bias, "
    "str epilogue='none', ScalarType out_dtype=float, int bits=8) -> (Tensor, Tensor, Tensor)",
    check=_check_s8,
    kernels=("quantize_x", *GEMM),
    rows=3,
    inference=True,
    out=True,
)
def linear_s8_quantize(
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    out_dtype: torch.dtype = torch.float32,
    bits: int = 8,
) -> Rows:
    """quantize_rows(linear_s8(...)), bit for bit; `out_dtype` is what the result is rounded to before."""
    _check_s8(q, scale, row_sum, weight_packed, weight_scale, bias, epilogue, out_dtype, bits)
    return quantize_rows.reference(
        linear_s8.reference(q, scale, row_sum, weight_packed, weight_scale, bias, epilogue, out_dtype, bits)
    )
