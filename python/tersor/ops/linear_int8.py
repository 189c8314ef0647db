"""Linear layers on tiles of any width with int8 activations: y = act((acc * scale) * weight_scale + bias)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import int_matmul as _int_matmul
from ._register import op
from .checks import (
    FLOATS,
    as_rows,
    check_device,
    check_last_dim,
    check_linear,
    check_per_row,
    check_residual,
    check_tensors,
    check_weights,
)
from .epilogues import EPILOGUES
from .quantize_rows import check_input_scale, quantize_rows, quantize_static
from .tiles import check_tiles, to_rows


def check_q(function: str, q: Tensor, row_sum: Tensor) -> int:
    check_tensors(function, q=q, row_sum=row_sum)
    if q.dtype != torch.int8:
        raise TypeError(f"{function}: q is {q.dtype}, expected torch.int8; make it with quantize_rows")
    check_per_row(function, "row_sum", row_sum, torch.int32, q.shape[:-1])
    return check_last_dim(function, "q", q)


def check_on_rows(
    function: str,
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str,
    bits: int,
    **dtype: torch.dtype,
) -> int:
    """The shape rule of a layer on int8 rows whose result is of `dtype`, given by its argument's name; returns N."""
    k = check_q(function, q, row_sum)
    check_tensors(function, scale=scale)
    check_per_row(function, "scale", scale, torch.float32, q.shape[:-1])
    check_device(function, q, scale=scale, row_sum=row_sum, weight_packed=weight_packed, weight_scale=weight_scale, bias=bias)
    n = check_weights(function, k, weight_packed, weight_scale, bias, epilogue, bits)
    for name, value in dtype.items():
        if value not in FLOATS:
            raise TypeError(f"{function}: {name} is {value}, expected float32, bfloat16 or float16")
    return n


# Entries of the native kernel table, by the bits of a code.
GEMM = ("gemm_w8", "gemm_w4", "gemm_w2", "gemm_w1")


def _check_acc(q: Tensor, row_sum: Tensor, weight_packed: Tensor, out_features: int, bits: int = 8) -> Tensor:
    k = check_q("linear_acc", q, row_sum)
    check_tensors("linear_acc", weight_packed=weight_packed)
    if out_features < 0:
        raise ValueError(f"linear_acc: out_features is {out_features}, expected 0 or more")
    check_device("linear_acc", q, row_sum=row_sum, weight_packed=weight_packed)
    check_tiles("linear_acc", weight_packed, out_features, k, bits)
    return q.new_empty((*q.shape[:-1], out_features), dtype=torch.int32)


@op(
    "(Tensor q, Tensor row_sum, Tensor weight_packed, int out_features, int bits=8) -> Tensor",
    check=_check_acc,
    kernels=GEMM,
    rows=2,
)
def linear_acc(q: Tensor, row_sum: Tensor, weight_packed: Tensor, out_features: int, bits: int = 8) -> Tensor:
    """The int32 accumulators of a linear layer, exact: acc[m, n] = sum_k q[m, k] * w[n, k].

    q             int8  [..., K] from quantize_rows, any row stride
    row_sum       int32 [...]    sum of q over K; repairs the offset of the codes
    weight_packed uint8 [ceil(N/16), ceil(K/kt), 64] tiles, kt = 32 / bits
    out_features  N
    bits          8, 4, 2 or 1: the width of a code
    returns       int32 [..., N]; cannot wrap for K <= 132104

    Raises ValueError / TypeError where sizes or dtypes do not fit each other.
    """
    _check_acc(q, row_sum, weight_packed, out_features, bits)
    k = q.shape[-1]
    acc = _int_matmul.int_matmul(as_rows(q), to_rows(weight_packed, out_features, k, bits))
    return acc.reshape(*q.shape[:-1], out_features)


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
    residual: Tensor | None = None,
) -> Tensor:
    n = check_on_rows("linear_s8", q, scale, row_sum, weight_packed, weight_scale, bias, epilogue, bits, out_dtype=out_dtype)
    y = q.new_empty((*q.shape[:-1], n), dtype=out_dtype)
    check_residual("linear_s8", residual, y)
    return y


@op(
    "(Tensor q, Tensor scale, Tensor row_sum, Tensor weight_packed, Tensor weight_scale, Tensor? bias, "
    "str epilogue='none', ScalarType out_dtype=float, int bits=8, Tensor? residual=None) -> Tensor",
    check=_check_s8,
    kernels=GEMM,
    rows=3,
    out=True,
)
def linear_s8(
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    out_dtype: torch.dtype = torch.float32,
    bits: int = 8,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear layer on rows that are already int8, so that several layers can share one quantisation.

    q, scale, row_sum   from quantize_rows: int8 [..., K], float32 [...], int32 [...]
    weight_packed       uint8 [ceil(N/16), ceil(K/kt), 64] tiles, kt = 32 / bits
    weight_scale        float32 [N], per output channel
    bias                float [N] or None
    epilogue            one of ops.EPILOGUES, applied to the float32 result
    bits                8, 4, 2 or 1: the width of a code
    residual            out_dtype [..., N], added after the activation, in float32; or None
    returns             out_dtype [..., N] = act(((f32(acc) * scale) * weight_scale) + bias) + residual; a row with scale NaN is NaN

    Raises ValueError / TypeError where sizes or dtypes do not fit. Scheme: Jacob et al., arXiv:1712.05877, section 2.
    """
    _check_s8(q, scale, row_sum, weight_packed, weight_scale, bias, epilogue, out_dtype, bits, residual)
    acc = linear_acc.reference(q, row_sum, weight_packed, weight_scale.shape[0], bits)
    return finish(acc, scale, weight_scale, bias, epilogue, out_dtype, residual)


def finish(
    total: Tensor,
    scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """The epilogue alone, as plain torch: act(((total * scale) * weight_scale) + bias) + residual, each step rounded to float32."""
    y = total.float() * scale.unsqueeze(-1) * weight_scale
    if bias is not None:
        y = y + bias.float()
    y = EPILOGUES[epilogue](y)
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype)


def _check_dynamic(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    bits: int = 8,
    residual: Tensor | None = None,
) -> Tensor:
    y = check_linear("linear_dynamic", x, weight_packed, weight_scale, bias, epilogue, bits)
    check_residual("linear_dynamic", residual, y)
    return y


@op(
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, str epilogue='none', int bits=8, Tensor? residual=None) "
    "-> Tensor",
    check=_check_dynamic,
    kernels=("quantize_x", *GEMM),
    autocast=True,
    out=True,
)
def linear_dynamic(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
    bits: int = 8,
    residual: Tensor | None = None,
) -> Tensor:
    """Linear layer with dynamic int8 activations in one call: quantize_rows, integer GEMM, epilogue.

    x              float32 / bfloat16 / float16 [..., K], any strides
    weight_packed  uint8 [ceil(N/16), ceil(K/kt), 64] tiles, kt = 32 / bits
    weight_scale   float32 [N]
    bias           float [N] or None
    bits           8, 4, 2 or 1: the width of a code
    residual       dtype of x, [..., N]: added after the activation, in float32; or None
    returns        dtype of x, [..., N]: the same bits as quantize_rows followed by linear_s8

    Raises ValueError / TypeError where sizes or dtypes do not fit, or K > 132104. Gradients for x, bias and residual
    (straight-through, see ops/differentiable.py) where they are asked for.
    """
    _check_dynamic(x, weight_packed, weight_scale, bias, epilogue, bits, residual)
    q, scale, row_sum = quantize_rows.reference(x)
    return linear_s8.reference(q, scale, row_sum, weight_packed, weight_scale, bias, epilogue, x.dtype, bits, residual)


def _check_static(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    check_input_scale("linear_static", input_scale)
    y = check_linear("linear_static", x, weight_packed, weight_scale, bias, epilogue, input_scale=input_scale)
    check_residual("linear_static", residual, y)
    return y


@op(
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, Tensor input_scale, str epilogue='none', "
    "Tensor? residual=None) -> Tensor",
    check=_check_static,
    kernels=("quantize_x", "gemm_w8"),
    autocast=True,
)
def linear_static(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor,
    epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Int8 linear layer whose activations have one known scale: quantize_static, integer GEMM, epilogue, in one call.

    input_scale    float32 []: one step of the quantised activations (largest |x| / 127)
    The other arguments, the result and the errors are those of ops.linear_dynamic.
    """
    _check_static(x, weight_packed, weight_scale, bias, input_scale, epilogue, residual)
    q, scale, row_sum = quantize_static.reference(x, input_scale)
    return linear_s8.reference(q, scale, row_sum, weight_packed, weight_scale, bias, epilogue, x.dtype, 8, residual)
