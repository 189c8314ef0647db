"""Linear layers of Hugging Face BitNet models (transformers' BitLinear and AutoBitLinear) as packed ternary layers.

transformers itself is never imported: its layers are recognised by name.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .formats import Ternary
from .nn import QuantLinear
from .swap import settle

_MODULE = "transformers.integrations.bitnet"
_PER_BYTE = 4  # ternary values of one byte
_BLOCK_ROWS = 256  # bytes of one row block: unpacked to int8 at a time


def from_bitnet_(model: nn.Module) -> nn.Module:
    """Replaces the BitNet layers of a transformers model by QuantLinear of format Ternary("tensor"), in place, and returns it.

    BitLinear                packed weights uint8 [N/4, K], y = acc / (weight_scale * input_scale): our scale is 1 / weight_scale
    AutoBitLinear, offline   weights -1, 0, 1 as float [N, K], y = (acc * input_step + bias) * weight_scale: our scale is
                             weight_scale, our bias bias * weight_scale
    AutoBitLinear, online    float weights, quantised by the mean of abs(w) over the whole weight in every forward: once, here

    Activations are quantised per token as transformers does it, 127 / absmax, ties to even; the two differ only where a row's
    absmax is below 1e-5, to which transformers raises it. float32 results agree within a few roundings; in bfloat16 transformers
    rounds the activations before it quantises them, and we do not. A layer with an RMSNorm of its own becomes
    nn.Sequential(rms_norm, linear).

    Raises ValueError, the model untouched, where it holds no such layer or a code that is not ternary. Scheme: Ma et al.,
    arXiv:2402.17764.
    """
    if _is_bitnet(model):
        raise ValueError(
            "from_bitnet_: model is a BitNet layer itself, which cannot be replaced in place; put it in an nn.Sequential"
        )
    found = [
        (fqn, parent, name, child)
        for fqn, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is not None and _is_bitnet(child)
    ]
    if not found:
        raise ValueError(
            "from_bitnet_: model holds no BitLinear or AutoBitLinear of transformers; "
            "for float weights use quantize_(model, Ternary('tensor'))"
        )
    for fqn, _, name, layer in found:
        _check(f"{fqn}.{name}" if fqn else name, layer)
    made: dict[int, nn.Module] = {}
    for _, parent, name, layer in found:
        if id(layer) not in made:
            made[id(layer)] = _convert(layer)
        setattr(parent, name, made[id(layer)])
    settle(model)
    return model


def _is_bitnet(module: nn.Module) -> bool:
    return any(cls.__module__ == _MODULE and cls.__name__ in ("BitLinear", "AutoBitLinear") for cls in type(module).__mro__)


def _is_packed(layer: Any) -> bool:
    return bool(layer.weight.dtype == torch.uint8)


def _check(fqn: str, layer: Any) -> None:
    weight, scale = layer.weight, getattr(layer, "weight_scale", None)
    if weight.is_meta:
        raise ValueError(f"from_bitnet_: {fqn} is on meta; load its weights first")
    if isinstance(scale, Tensor) and (scale.numel() != 1 or not torch.isfinite(scale).all() or not scale.all()):
        raise ValueError(f"from_bitnet_: {fqn}.weight_scale is {scale.tolist()}, expected one number other than 0")
    n, k = layer.out_features, layer.in_features
    want = (n // _PER_BYTE, k) if _is_packed(layer) else (n, k)
    if tuple(weight.shape) != want or (_is_packed(layer) and n % _PER_BYTE):
        raise ValueError(f"from_bitnet_: {fqn}.weight is {list(weight.shape)}, expected {list(want)} for out_features={n}")
    if _is_packed(layer):
        # Code 3 of a pair of bits: both are set.
        bad = any(bool(((rows & (rows >> 1)) & 0b01010101).any()) for rows in weight.split(_BLOCK_ROWS))
    elif scale is not None:
        bad = any(bool((rows.abs().round().clamp(max=1) != rows.abs()).any()) for rows in weight.split(_BLOCK_ROWS))
    else:
        bad = not all(bool(torch.isfinite(rows).all()) for rows in weight.split(_BLOCK_ROWS))
    if bad:
        raise ValueError(f"from_bitnet_: {fqn}.weight holds values other than -1, 0 and 1 (or NaN, inf); nothing was changed")


@torch.no_grad()
def _convert(layer: Any) -> nn.Module:
    linear = _from_codes(layer) if hasattr(layer, "weight_scale") else QuantLinear.from_linear(layer, Ternary("tensor"))
    linear.train(layer.training)
    norm = getattr(layer, "rms_norm", None)
    return linear if norm is None else nn.Sequential(OrderedDict(rms_norm=norm, linear=linear))


def _from_codes(layer: Any) -> QuantLinear:
    weight, scale = layer.weight, layer.weight_scale
    packed = _is_packed(layer)
    n, k = layer.out_features, layer.in_features
    dtype = scale.dtype if packed else weight.dtype
    linear = QuantLinear(k, n, False, Ternary("tensor"), torch.device("meta"), dtype)
    values = _unpack(weight) if packed else weight.to(torch.int8)
    step = 1 / scale.double() if packed else scale.double()
    linear.weight_packed = nn.Parameter(ops.from_rows(values, 2), requires_grad=False)
    linear.weight_scale = step.float().reshape(1).repeat(n)
    bias = layer.bias
    if bias is not None:
        # A buffer in BitLinear; AutoBitLinear multiplies its bias by weight_scale too.
        linear.bias = nn.Parameter(bias.detach() if packed else bias * scale, requires_grad=bias.requires_grad)
    return linear


def _unpack(weight: Tensor) -> Tensor:
    """uint8 [N/4, K], bits 2i of row r being row r + i * N/4 plus 1 -> int8 [N, K]."""
    return torch.cat([(weight >> (2 * i) & 3).to(torch.int8) - 1 for i in range(_PER_BYTE)])
