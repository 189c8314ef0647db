"""Layers with gradients. register_autograd puts Python into every eager call, so the raw ops have none; these are their twins,
which calling an op takes by itself where a gradient is needed.

The backward of a quantised layer is the straight-through one (Bengio et al., arXiv:1308.3432): activations count as unquantised,
so grad_x = grad_y W with the stored weights; packed weights are frozen and get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._register import TWIN, Op, library, op
from .checks import FLOATS, as_rows, check_device, check_tensors, check_weights
from .epilogues import EPILOGUES
from .linear_int8 import linear_dynamic, linear_static
from .linear_weight_only import _BLOCK_TILES, linear_weight_only
from .tiles import MAX_K, TILE_N, to_rows
from .transforms import register_autograd, route_to_twin


def _check_input_grad(grad: Tensor, weight_packed: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    check_tensors("input_grad", grad=grad)
    if not 0 <= in_features <= MAX_K:
        raise ValueError(f"input_grad: in_features is {in_features}, expected 0 to {MAX_K}")
    n = check_weights("input_grad", in_features, weight_packed, weight_scale, None, "none")
    if grad.dtype not in FLOATS or grad.dim() == 0 or grad.shape[-1] != n:
        raise ValueError(f"input_grad: grad is {grad.dtype} {list(grad.shape)}, expected float [..., {n}]")
    check_device("input_grad", grad, weight_packed=weight_packed, weight_scale=weight_scale)
    return grad.new_empty((*grad.shape[:-1], in_features))


@op("(Tensor grad, Tensor weight_packed, Tensor weight_scale, int in_features) -> Tensor", check=_check_input_grad)
def input_grad(grad: Tensor, weight_packed: Tensor, weight_scale: Tensor, in_features: int) -> Tensor:
    """Gradient of an int8 linear layer with respect to x: grad [..., N] times the stored weights [N, K] -> [..., K].

    float32 sums, 256 channels of weights as float at a time; the result has the dtype of grad.
    """
    _check_input_grad(grad, weight_packed, weight_scale, in_features)
    n = weight_scale.shape[0]
    g = as_rows(grad).float() * weight_scale
    out = torch.zeros((g.shape[0], in_features), dtype=torch.float32, device=grad.device)
    with torch.autocast(grad.device.type, enabled=False):
        for t in range(0, weight_packed.shape[0], _BLOCK_TILES):
            begin, end = t * TILE_N, min(n, (t + _BLOCK_TILES) * TILE_N)
            out.addmm_(g[:, begin:end], to_rows(weight_packed[t : t + _BLOCK_TILES], end - begin, in_features).float())
    return out.to(grad.dtype).reshape(*grad.shape[:-1], in_features)


def _make_twin(raw: Op, doc: str, setup: Callable[..., None], backward: Callable[..., Any], autocast: bool) -> Op:
    """The differentiable twin of `raw`: same arguments, same bits."""

    def reference(*args: Any, **kwargs: Any) -> Tensor:
        return raw.raw(*args, **kwargs)

    reference.__name__ = raw.name + TWIN
    reference.__doc__ = doc
    twin = op(raw.schema, check=raw.check, kernels=raw.kernels, autocast=autocast, rows=raw.rows)(reference)
    register_autograd(twin, setup, backward, library)
    route_to_twin(raw, twin, library)
    raw.twin = twin
    return twin


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_packed, weight_scale, bias, *rest = inputs
    ctx.epilogue = rest.pop() if rest and isinstance(rest[-1], str) else "none"
    # x itself (and what quantises it) is needed only to differentiate an activation; its shape is known from grad and K.
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight_packed, weight_scale, *(() if ctx.epilogue == "none" else (x, bias, *rest)))


def _make(raw: Op, doc: str) -> Op:
    """The twin of a linear layer, with gradients for x and bias."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_packed, weight_scale, *rest = ctx.saved_tensors
        if ctx.epilogue != "none":
            # The value before the activation is computed again rather than kept, by the op that can be differentiated again.
            x, *others = rest
            before = raw(x, weight_packed, weight_scale, *others, "none").float()
            pull_back = torch.func.vjp(EPILOGUES[ctx.epilogue], before)[1]
            grad = pull_back(grad.float())[0].to(grad.dtype)
        grad_x = input_grad(grad, weight_packed, weight_scale, ctx.in_features) if ctx.wanted[0] else None
        grad_bias = None
        if ctx.wanted[3]:
            grad_bias = as_rows(grad).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, *[None] * (len(raw.arguments) - 4)

    return _make_twin(raw, doc, _setup, backward, autocast=True)


def _setup_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward_of_input_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # input_grad is linear in its grad, with the stored weights transposed: a hessian or a gradient penalty needs its gradient.
    return linear_weight_only(grad, *ctx.saved_tensors, None), None, None, None


linear_dynamic_differentiable = _make(linear_dynamic, "ops.linear_dynamic with gradients for x and bias.")
linear_static_differentiable = _make(linear_static, "ops.linear_static with gradients for x and bias.")
linear_weight_only_differentiable = _make(linear_weight_only, "ops.linear_weight_only with gradients for x and bias.")
input_grad_differentiable = _make_twin(
    input_grad, "ops.input_grad with a gradient for grad.", _setup_input_grad, _backward_of_input_grad, autocast=False
)
