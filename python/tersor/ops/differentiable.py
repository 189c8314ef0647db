"""Layers with gradients. register_autograd puts Python into every eager call, so the raw ops have none; these are their twins,
which calling an op takes by itself where a gradient is needed.

The backward of a quantised layer is the straight-through one (Bengio et al., arXiv:1308.3432): activations count as unquantised,
so grad_x = grad_y W with the stored weights; packed weights are frozen and get no gradient. Binary activations are passed within 1
of their threshold, times the scale of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import int_matmul as _int_matmul
from ._register import TWIN, Op, library, op
from .checks import FLOATS, as_rows, check_device, check_group_scale, check_tensors, check_weights
from .epilogues import pull_back
from .linear_grouped import BITS as GROUPED_BITS
from .linear_grouped import group_scales, linear_grouped
from .linear_int8 import linear_dynamic, linear_static
from .linear_sparse import linear_sparse
from .linear_sparse_float import linear_sparse_float, sparse_float_rows
from .linear_weight_only import _BLOCK_TILES, linear_weight_only
from .sparse_storage import sparse_rows
from .tiles import MAX_K, blocks_of_rows, to_rows
from .transforms import register_autograd, route_to_twin
from .xnor import binarize_rows, linear_xnor


def _check_input_grad(
    grad: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    in_features: int,
    group_scale: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    check_tensors("input_grad", grad=grad)
    if not 0 <= in_features <= MAX_K:
        raise ValueError(f"input_grad: in_features is {in_features}, expected 0 to {MAX_K}")
    n = check_weights("input_grad", in_features, weight_packed, weight_scale, None, "none", bits)
    if group_scale is not None:
        check_group_scale("input_grad", group_scale, n, in_features)
    if grad.dtype not in FLOATS or grad.dim() == 0 or grad.shape[-1] != n:
        raise ValueError(f"input_grad: grad is {grad.dtype} {list(grad.shape)}, expected float [..., {n}]")
    check_device("input_grad", grad, weight_packed=weight_packed, weight_scale=weight_scale, group_scale=group_scale)
    return grad.new_empty((*grad.shape[:-1], in_features))


@op(
    "(Tensor grad, Tensor weight_packed, Tensor weight_scale, int in_features, Tensor? group_scale=None, int bits=8) -> Tensor",
    check=_check_input_grad,
)
def input_grad(
    grad: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    in_features: int,
    group_scale: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """Gradient of a packed linear layer with respect to x: grad [..., N] times the stored weights [N, K] -> [..., K].

    float32 sums, 256 channels of weights as float at a time; the result has the dtype of grad. group_scale as in
    ops.linear_grouped, None where a channel has one scale.
    """
    _check_input_grad(grad, weight_packed, weight_scale, in_features, group_scale, bits)
    n = weight_scale.shape[0]
    g = as_rows(grad).float() * weight_scale
    out = torch.zeros((g.shape[0], in_features), dtype=torch.float32, device=grad.device)
    scales = None if group_scale is None or in_features == 0 else group_scales(group_scale, n)
    for begin, end, rows in blocks_of_rows(weight_packed, n, in_features, _BLOCK_TILES, bits):
        relative = _relative(rows, None if scales is None else scales[begin:end])
        out = _int_matmul.float_matmul(g[:, begin:end], relative.t(), out)
    return out.to(grad.dtype).reshape(*grad.shape[:-1], in_features)


def relative_rows(weight_packed: Tensor, n: int, k: int, group_scale: Tensor | None, bits: int) -> Tensor:
    """The stored weights, float32 [N, K], before weight_scale."""
    return _relative(to_rows(weight_packed, n, k, bits), None if group_scale is None or k == 0 else group_scales(group_scale, n))


def _relative(rows: Tensor, scales: Tensor | None) -> Tensor:
    """int8 values [N, K] times their scales [N, G], as float32."""
    if scales is None:
        return rows.float()
    n, groups = scales.shape
    return (rows.float().reshape(n, groups, -1) * scales.unsqueeze(-1)).reshape(rows.shape)


def _make_twin(raw: Op, doc: str, setup: Callable[..., None], backward: Callable[..., Any], autocast: bool) -> Op:
    """The differentiable twin of `raw`: same arguments, same bits."""

    def reference(*args: Any, **kwargs: Any) -> Tensor:
        return raw.raw(*args, **kwargs)

    reference.__name__ = raw.name + TWIN
    reference.__doc__ = doc
    twin = op(raw.schema, check=raw.check, kernels=raw.kernels, autocast=autocast, rows=raw.rows)(reference)
    register_autograd(twin, setup, backward, library)
    twin.setup_context, twin.backward = setup, backward
    route_to_twin(raw, twin, library)
    raw.twin = twin
    return twin


def _dense_input_grad(grad: Tensor, kept: dict[str, Tensor], in_features: int, bits: int) -> Tensor:
    return input_grad(grad, kept["weight_packed"], kept["weight_scale"], in_features, kept.get("group_scale"), bits)


def _make(
    raw: Op, doc: str, grad_of_x: Callable[..., Tensor] = _dense_input_grad, keep_x: tuple[str, ...] = (), bits: int = 8
) -> Op:
    """The twin of a linear layer, with gradients for x, bias and residual.

    grad_of_x  (grad, the kept tensors by name, K, bits) -> the gradient of x
    keep_x     what grad_of_x needs beside the stored weight
    bits       of a code, where the op has no such argument, and the default
    """
    # x and the stored tensors come first, then the epilogue, then plain numbers
    names = raw.arguments[: raw.arguments.index("epilogue")]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        given = dict(zip(raw.arguments, inputs, strict=False))
        ctx.epilogue, ctx.bits = given.get("epilogue", "none"), given.get("bits", bits)
        ctx.in_features = given["x"].shape[-1]
        ctx.bias_dtype = None if given["bias"] is None else given["bias"].dtype
        # x itself (and what quantises it) is needed only to differentiate an activation or a sign; its shape follows from grad, K.
        keep = names
        if ctx.epilogue == "none":
            keep = tuple(name for name in names if name in (*_STORED, *keep_x))
        ctx.kept = keep
        ctx.save_for_backward(*(given[name] for name in keep))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = dict(zip(ctx.kept, ctx.saved_tensors, strict=True))
        grads: dict[str, Tensor] = {}
        if "residual" in [name for name, wanted in zip(raw.arguments, ctx.wanted, strict=False) if wanted]:
            grads["residual"] = grad
        if ctx.epilogue != "none":
            # The value before the activation is computed again rather than kept, by the op that can be differentiated again.
            width = (ctx.bits,) if "bits" in raw.arguments else ()
            before = raw(*(kept[name] for name in names), "none", *width).float()
            grad = pull_back(ctx.epilogue, before, grad.float()).to(grad.dtype)
        if ctx.wanted[0]:
            grads["x"] = grad_of_x(grad, kept, ctx.in_features, ctx.bits)
        if ctx.wanted[names.index("bias")]:
            grads["bias"] = as_rows(grad).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return tuple(grads.get(name) for name in raw.arguments)

    return _make_twin(raw, doc, setup, backward, autocast=True)


_STORED = ("weight_packed", "weight_scale", "group_scale", "weight_index", "weight_offset", "weight_sum")


def _sparse_input_grad(grad: Tensor, kept: dict[str, Tensor], in_features: int, bits: int) -> Tensor:
    """grad [..., N] times the stored weights, float32 sums. Plain torch, so that it can be differentiated again."""
    stored = (kept["weight_packed"], kept["weight_index"], kept["weight_offset"])
    g = as_rows(grad).float()
    if "weight_scale" in kept:
        g = g * kept["weight_scale"]
        rows = sparse_rows(*stored, kept["weight_scale"].shape[0], in_features)
    else:
        rows = sparse_float_rows(*stored, in_features)
    return _int_matmul.float_matmul(g, rows.t()).to(grad.dtype).reshape(*grad.shape[:-1], in_features)


def _through_signs(grad: Tensor, kept: dict[str, Tensor], in_features: int, bits: int) -> Tensor:
    """The straight-through gradient of scale * sign(x - threshold): the scale where abs(x - threshold) <= 1, else 0
    (Hubara et al., arXiv:1602.02830)."""
    # Comparison first: a product with 0 would keep an inf or NaN of a grad that is to vanish.
    grad = _dense_input_grad(grad, kept, in_features, bits)
    x, threshold = kept["x"].detach(), kept["threshold"]
    near = (x.float() - threshold).abs() <= 1
    return torch.where(near, grad.float() * binarize_rows.raw(x, threshold)[1].unsqueeze(-1), 0.0).to(grad.dtype)


def _setup_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = {"group_scale": None, "bits": 8} | dict(zip(input_grad.arguments, inputs, strict=False))
    ctx.in_features, ctx.bits = given["in_features"], given["bits"]
    ctx.save_for_backward(given["weight_packed"], given["weight_scale"], given["group_scale"])


def _backward_of_input_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # input_grad is linear in its grad, with the stored weights transposed: a hessian or a gradient penalty needs its gradient.
    weight_packed, weight_scale, group_scale = ctx.saved_tensors
    if ctx.bits == 8:
        out = linear_weight_only(grad, weight_packed, weight_scale, None)
    else:
        with torch.autocast(grad.device.type, enabled=False):
            rows = relative_rows(weight_packed, weight_scale.shape[0], ctx.in_features, group_scale, ctx.bits)
            out = (torch.nn.functional.linear(grad.float(), rows) * weight_scale).to(grad.dtype)
    return out, *[None] * 5


linear_dynamic_differentiable = _make(linear_dynamic, "ops.linear_dynamic with gradients for x, bias and residual.")
linear_static_differentiable = _make(linear_static, "ops.linear_static with gradients for x, bias and residual.")
linear_grouped_differentiable = _make(
    linear_grouped, "ops.linear_grouped with gradients for x, bias and residual.", bits=GROUPED_BITS
)
linear_xnor_differentiable = _make(
    linear_xnor, "ops.linear_xnor with gradients for x, bias and residual.", _through_signs, ("x", "threshold"), bits=1
)
linear_sparse_differentiable = _make(linear_sparse, "ops.linear_sparse with gradients for x and bias.", _sparse_input_grad)
linear_sparse_float_differentiable = _make(
    linear_sparse_float, "ops.linear_sparse_float with gradients for x and bias.", _sparse_input_grad
)
linear_weight_only_differentiable = _make(linear_weight_only, "ops.linear_weight_only with gradients for x and bias.")
input_grad_differentiable = _make_twin(
    input_grad, "ops.input_grad with a gradient for grad.", _setup_input_grad, _backward_of_input_grad, autocast=False
)
