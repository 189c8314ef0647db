"""A norm whose result is needed as int8 rows: residual add, layer or RMS norm and quantisation without a float tensor between."""

from __future__ import annotations

import torch
from torch import Tensor

from ._register import op
from .checks import FLOATS, check_device, check_residual, check_tensors, check_x
from .quantize_rows import empty_rows, quantize_rows

KINDS = ("layer", "rms")

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    want_sum: bool = False,
    want_y: bool = False,
) -> Outputs:
    k = check_x("norm_quantize", x)
    if kind not in KINDS:
        raise ValueError(f"norm_quantize: kind is {kind!r}, expected one of: {', '.join(KINDS)}")
    if kind == "rms" and bias is not None:
        raise ValueError("norm_quantize: bias is given, expected None for kind='rms'")
    check_device("norm_quantize", x, residual=residual, weight=weight, bias=bias)
    check_residual("norm_quantize", residual, x)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_tensors("norm_quantize", **{name: t})
            if t.dtype not in FLOATS or tuple(t.shape) != (k,):
                raise ValueError(f"norm_quantize: {name} is {t.dtype} {list(t.shape)}, expected float [{k}]")
    s, y = (x.new_empty(x.shape if want else (0,)) for want in (want_sum, want_y))
    return (*empty_rows(x), s, y)


@op(
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, str kind, bool want_sum, bool want_y) "
    "-> (Tensor q, Tensor scale, Tensor row_sum, Tensor sum, Tensor y)",
    check=_check,
    kernels=("norm_quantize_x",),
    rows=2,
    inference=True,
    out=True,
)
def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    want_sum: bool = False,
    want_y: bool = False,
) -> Outputs:
    """s = x + residual, y = norm(s), and y as int8 rows, in one pass over memory.

    x         float32 / bfloat16 / float16 [..., K], any strides
    residual  the same dtype and shape, or None: s = x. The sum is rounded to the dtype of x
    weight    float [K] or None
    bias      float [K] or None; None where kind is "rms"
    kind      "layer": y = (s - mean) / sqrt(variance + eps) * weight + bias; "rms": y = s / sqrt(mean of s^2 + eps) * weight;
              in float32, rounded to the dtype of x
    returns   (q int8 [..., K], scale float32 [...], row_sum int32 [...]) as quantize_rows(y) gives them, then s and y, in the
              dtype and shape of x where want_sum and want_y ask for them, else empty [0]

    Class F of docs/numerics.md: y within a bound of its exact value, so that q may differ by 1 where a value lies at a tie. A row
    with NaN or inf gives q = 0, scale = NaN, and touches no other. Raises ValueError / TypeError on a wrong dtype or shape, or
    K > 132104, and RuntimeError where a gradient is needed. Sources: Ba et al., arXiv:1607.06450; Zhang and Sennrich,
    arXiv:1910.07467.
    """
    _check(x, residual, weight, bias, eps, kind, want_sum, want_y)
    s = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    size = x.shape[-1:]
    w, b = (None if t is None else t.float() for t in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        if kind == "layer":
            y = torch.nn.functional.layer_norm(s.float(), size, w, b, eps)
        else:
            y = torch.nn.functional.rms_norm(s.float(), size, w, eps)
    y = y.to(x.dtype)
    return (
        *quantize_rows.reference(y),
        s.clone(memory_format=torch.contiguous_format) if want_sum else x.new_empty((0,)),
        y if want_y else x.new_empty((0,)),
    )
