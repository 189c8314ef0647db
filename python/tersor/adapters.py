"""Adapters of peft around swapped layers, recognised by peft's own marks. peft itself is never imported."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn

from .nn import QuantLinear

_MARK = "adapter_layer_names"  # peft's BaseTunerLayer and AuxiliaryTrainingWrapper list their trainable children in it


def in_adapter(model: nn.Module, fqn: str) -> bool:
    """Whether `fqn` lies in the trainable part of an adapter: lora_A, lora_B, modules_to_save and the like."""
    module = model
    for name in fqn.split(".") if fqn else ():  # "" is the model itself
        if name in getattr(type(module), _MARK, ()):
            return True
        module = module._modules[name]  # type: ignore[assignment]
    return False


def reads_base_weight(parent: nn.Module, name: str) -> bool:
    """Whether `name` is the base layer of a DoRA adapter, whose forward takes the norm of the float weight."""
    dora = getattr(parent, "use_dora", None)
    return name == "base_layer" and isinstance(dora, dict) and any(dora.values())


def lora_linear(target: nn.Module, adapter_name: str, *, config: Any, **kwargs: Any) -> nn.Module:
    """peft's lora.Linear around a QuantLinear, for peft's table of custom layers; refuses what would need the float weight.

        config = LoraConfig(target_modules=["q_proj", "v_proj"])
        config._register_custom_module({tersor.QuantLinear: tersor.adapters.lora_linear})

    Raises ValueError for DoRA and the other variants of LoRA, and for initialisations that read the weight (PiSSA, OLoRA, ...):
    they would compute with NaN, which fused attention can swallow.
    """
    from peft.tuners.lora import Linear

    init = config.init_lora_weights
    if isinstance(init, str) and init not in _BLIND_INITS:
        raise ValueError(
            f"peft: init_lora_weights={init!r} reads the float weight, which is packed; use True or one of {_BLIND_INITS}"
        )
    layer = Linear(target, adapter_name, config=config, **kwargs)
    if layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
        raise ValueError(
            f"peft: {variant} may read the float weight, which is packed; use plain LoRA, or adapters before quantize_"
        )
    _guard(layer, kwargs.get("target_name") or "this adapter")
    return layer


_BLIND_INITS = ("gaussian", "orthogonal", "eva")


def guard_merges(model: nn.Module) -> None:
    """Lets adapters refuse to merge into a packed base layer, or to unmerge from one; frees those whose base is float again.

    peft itself would only fail in the middle: its unmerge forgets that an adapter is merged before it reaches the weight.
    """
    for fqn, module in model.named_modules():
        if hasattr(type(module), _MARK):
            _guard(module, fqn)


def _guard(adapter: nn.Module, fqn: str) -> None:
    base = adapter._modules.get("base_layer")
    while isinstance(base, nn.Module) and "base_layer" in base._modules:
        base = base._modules["base_layer"]
    for method in ("merge", "unmerge"):
        own = adapter.__dict__.get(method)
        if isinstance(base, QuantLinear) and hasattr(type(adapter), method):
            adapter.__dict__[method] = functools.partial(_refuse, method, fqn)  # pickled and copied with the model
        elif isinstance(own, functools.partial) and own.func is _refuse:
            del adapter.__dict__[method]


def _refuse(method: str, fqn: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise ValueError(
        f"peft {method}: the base layer of {fqn} is packed, its float weight is gone; call tersor.dequantize_(model), "
        f"{method}, then tersor.quantize_(model, ...) again"
    )
