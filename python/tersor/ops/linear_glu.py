"""Gated linear units (SwiGLU, GeGLU): gate and up projection as one GEMM, act(gate) * up before anything is stored, as floats or
as the int8 rows that the down projection reads.

The weight is one of 2F channels, n tiles of gate and up in turn, so that both halves of a product meet in one block:

    weight_packed [ 2F/16 ][ Kt ][ 64 ]      tile 2i: channels 16i .. 16i+15 of gate, tile 2i+1: the same of up

and so are weight_scale and bias, in runs of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._register import op
from .checks import check_linear
from .epilogues import EPILOGUES
from .linear_int8 import GEMM, check_on_rows, finish, linear_acc
from .quantize_rows import empty_rows, quantize_rows
from .tiles import TILE_N

Rows = tuple[Tensor, Tensor, Tensor]


def interleave_glu(gate: Tensor, up: Tensor) -> Tensor:
    """Tiles [F/16, Kt, 64], or weight_scale or bias [F], of two layers in the order linear_glu takes: in turn, 16 channels each."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"interleave_glu: gate is {gate.dtype} {list(gate.shape)}, up is {up.dtype} {list(up.shape)}, expected the same of both"
        )
    if gate.dim() == 1:
        if gate.shape[0] % TILE_N:
            raise ValueError(f"interleave_glu: gate has {gate.shape[0]} channels, expected a multiple of {TILE_N}")
        return torch.stack((gate.reshape(-1, TILE_N), up.reshape(-1, TILE_N)), 1).reshape(-1)
    return torch.stack((gate, up), 1).flatten(0, 1)


def _features(function: str, channels: int) -> int:
    """F of a layer of 2F channels."""
    if channels % (2 * TILE_N):
        raise ValueError(
            f"{function}: weight_scale has {channels} channels, expected a multiple of {2 * TILE_N}: gate and up in turn, "
            f"{TILE_N} of each (ops.interleave_glu)"
        )
    return channels // 2


def _check_float(
    function: str,
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    bits: int,
) -> Tensor:
    y = check_linear(function, x, weight_packed, weight_scale, bias, activation, bits)
    return x.new_empty((*x.shape[:-1], _features(function, y.shape[-1])))


def _check_s8_rows(
    function: str,
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    bits: int,
) -> Tensor:
    channels = check_on_rows(function, q, scale, row_sum, weight_packed, weight_scale, bias, activation, bits, dtype=dtype)
    return q.new_empty((*q.shape[:-1], _features(function, channels)), dtype=dtype)


def _product(
    rows: Rows,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    bits: int,
) -> Tensor:
    q, scale, row_sum = rows
    acc = linear_acc.reference(q, row_sum, weight_packed, weight_scale.shape[0], bits)
    both = finish(acc, scale, weight_scale, bias, "none", torch.float32)
    lead, f = q.shape[:-1], weight_scale.shape[0] // 2
    gate, up = both.reshape(*lead, f // TILE_N, 2, TILE_N).unbind(-2)
    return (EPILOGUES[activation](gate) * up).reshape(*lead, f).to(dtype)


_STORED = "Tensor weight_packed, Tensor weight_scale, Tensor? bias, str activation"


def _check_glu(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, bits: int = 8
) -> Tensor:
    return _check_float("linear_glu", x, weight_packed, weight_scale, bias, activation, bits)


@op(
    f"(Tensor x, {_STORED}, int bits=8) -> Tensor",
    check=_check_glu,
    kernels=("quantize_x", *GEMM, "glu"),
    autocast=True,
    inference=True,
    out=True,
)
def linear_glu(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, bits: int = 8
) -> Tensor:
    """Gated linear unit with dynamic int8 activations in one call: y = act(gate(x)) * up(x).

    x              float32 / bfloat16 / float16 [..., K], any strides; quantised as by quantize_rows
    weight_packed  uint8 [2F/16, ceil(K/kt), 64] tiles, kt = 32 / bits, gate and up in turn (ops.interleave_glu)
    weight_scale   float32 [2F], in the same order; F is a multiple of 16
    bias           float [2F], in the same order, or None
    activation     one of ops.EPILOGUES: silu makes it SwiGLU, gelu and gelu_tanh GeGLU
    bits           8, 4, 2 or 1: the width of a code
    returns        dtype of x, [..., F]; gate, up and their product are float32 and rounded once

    Raises ValueError / TypeError where sizes or dtypes do not fit, RuntimeError where a gradient is needed. Source: Shazeer,
    arXiv:2002.05202.
    """
    _check_glu(x, weight_packed, weight_scale, bias, activation, bits)
    return _product(quantize_rows.reference(x), weight_packed, weight_scale, bias, activation, x.dtype, bits)


def _check_glu_s8(
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    return _check_s8_rows("linear_glu_s8", q, scale, row_sum, weight_packed, weight_scale, bias, activation, dtype, bits)


@op(
    f"(Tensor q, Tensor scale, Tensor row_sum, {_STORED}, ScalarType dtype, int bits=8) -> Tensor",
    check=_check_glu_s8,
    kernels=(*GEMM, "glu"),
    rows=3,
    inference=True,
    out=True,
)
def linear_glu_s8(
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    bits: int = 8,
) -> Tensor:
    """linear_glu on int8 rows (q, scale, row_sum) from quantize_rows or norm_quantize; returns `dtype` [..., F]."""
    _check_glu_s8(q, scale, row_sum, weight_packed, weight_scale, bias, activation, dtype, bits)
    return _product((q, scale, row_sum), weight_packed, weight_scale, bias, activation, dtype, bits)


def _check_glu_quantize(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, bits: int = 8
) -> Rows:
    return empty_rows(_check_float("linear_glu_quantize", x, weight_packed, weight_scale, bias, activation, bits))


@op(
    f"(Tensor x, {_STORED}, int bits=8) -> (Tensor, Tensor, Tensor)",
    check=_check_glu_quantize,
    kernels=("quantize_x", *GEMM, "glu"),
    inference=True,
    out=True,
)
def linear_glu_quantize(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, activation: str, bits: int = 8
) -> Rows:
    """quantize_rows(linear_glu(...)) without a float tensor between: q int8 [..., F], scale float32 [...], row_sum int32 [...]."""
    _check_glu_quantize(x, weight_packed, weight_scale, bias, activation, bits)
    rows = quantize_rows.reference(x)
    return quantize_rows.reference(_product(rows, weight_packed, weight_scale, bias, activation, x.dtype, bits))


def _check_glu_s8_quantize(
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    bits: int = 8,
) -> Rows:
    return empty_rows(
        _check_s8_rows("linear_glu_s8_quantize", q, scale, row_sum, weight_packed, weight_scale, bias, activation, dtype, bits)
    )


@op(
    f"(Tensor q, Tensor scale, Tensor row_sum, {_STORED}, ScalarType dtype, int bits=8) -> (Tensor, Tensor, Tensor)",
    check=_check_glu_s8_quantize,
    kernels=("quantize_x", *GEMM, "glu"),
    rows=3,
    inference=True,
    out=True,
)
def linear_glu_s8_quantize(
    q: Tensor,
    scale: Tensor,
    row_sum: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    bits: int = 8,
) -> Rows:
    """quantize_rows(linear_glu_s8(...)) without the float tensor between; `dtype` is what the product is rounded to before."""
    _check_glu_s8_quantize(q, scale, row_sum, weight_packed, weight_scale, bias, activation, dtype, bits)
    return quantize_rows.reference(_product((q, scale, row_sum), weight_packed, weight_scale, bias, activation, dtype, bits))
