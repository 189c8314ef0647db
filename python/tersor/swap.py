"""Swapping the layers of a model: plan everything, validate everything, then replace one module after the other."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .formats import BY_BITS, Format, Int8Dynamic
from .nn import QuantLinear, has_values

logger = logging.getLogger("tersor")

Config = Format | Mapping[str, "Format | None"]
Filter = Callable[[nn.Module, str], bool]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Place:
    """One place of the model that holds a layer to swap. The layer itself is not held: its weight must be free to go."""

    fqn: str
    parent: nn.Module
    name: str
    format: Format


def quantize_(
    model: nn.Module,
    config: Config,
    filter_fn: Filter | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> nn.Module:
    """Replaces the nn.Linear layers of `model` by QuantLinear, in place, and returns it.

    config     a format, or a dict {fqn | "re:<regex>" (fullmatch) | "_default": format or None}; exact names win over patterns
               (in order), patterns over _default; None leaves a layer as it is. A key that matches nothing is an error.
    filter_fn  filter_fn(module, fqn) -> bool chooses among the nn.Linear layers, instead of the default rules: no layer whose
               weight is tied to a module that stays (one warning names it), none with hooks. A dict key that names a layer
               exactly also overrides the rules.
    device     where each new layer goes, right after it is made; None: where the old one was
    progress   a progress bar on stderr

    Everything is validated before the first layer is touched: a ValueError leaves the model as it was. Peak memory stays within
    the float model plus one layer's blocks, and falls as layers are replaced. A root nn.Linear cannot be replaced in place.
    """
    _check_root(model)
    rules = _Rules(config)
    places = _plan(model, rules, filter_fn)
    for place in places:
        linear = getattr(place.parent, place.name)
        place.format.check_sizes(linear.out_features, linear.in_features)
        weight = linear.weight.detach()
        if has_values(weight) and not torch.isfinite(weight).all():
            raise ValueError(f"quantize_: {place.fqn}.weight holds NaN or inf; nothing was changed")
    _swap_all(places, device, progress)
    disable_fast_paths(model)
    return model


def dequantize_(model: nn.Module) -> nn.Module:
    """Replaces every QuantLinear of `model` by a float nn.Linear with the weight it stands for, in place, and returns it."""
    if isinstance(model, QuantLinear):
        raise ValueError("dequantize_: model is a QuantLinear itself, which cannot be replaced in place; use model.dequantize()")
    made: dict[int, nn.Linear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantLinear):
                if id(child) not in made:
                    made[id(child)] = child.dequantize()
                setattr(parent, name, made[id(child)])
    return model


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Iterable[Any] | Mapping[Any, Any] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: Mapping[Any, Any] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """torch.ao.quantization.quantize_dynamic's call with our layers inside; works without torch.ao.

    qconfig_spec  None: every nn.Linear; a set of types and submodule names; or a dict {type or name: qconfig or None}, None
                  meaning "leave alone". A name covers the submodules below it. Types other than nn.Linear stay float, with a
                  warning.
    dtype         torch.qint8 only
    mapping       must be None
    """
    if dtype != torch.qint8:
        raise ValueError(f"quantize_dynamic: dtype is {dtype}, expected torch.qint8; for half-precision use model.to(dtype)")
    if mapping is not None:
        raise ValueError("quantize_dynamic: mapping is not supported; the only replacement is nn.Linear -> QuantLinear")
    if isinstance(qconfig_spec, Mapping):
        spec = {key: value is not None for key, value in qconfig_spec.items()}
    else:
        spec = dict.fromkeys(qconfig_spec or (nn.Linear,), True)
    _check_dynamic_spec(model, spec)

    def chosen(_module: nn.Module, fqn: str) -> bool:
        # torch.ao's rule: a type decides for its modules, a name for its submodule and, until another name, what lies below.
        inherited = False
        parts = fqn.split(".") if fqn else []
        for depth in range(len(parts) + 1):
            prefix = ".".join(parts[:depth])
            inherited = spec.get(type(model.get_submodule(prefix)), inherited)
            inherited = spec.get(prefix, inherited)
        return inherited

    if type(model) is nn.Linear:
        if inplace:
            _check_root(model)
        return QuantLinear.from_linear(copy.deepcopy(model), Int8Dynamic()) if chosen(model, "") else copy.deepcopy(model)
    return quantize_(model if inplace else copy.deepcopy(model), Int8Dynamic(), chosen)


def quantize_weights(net: nn.Module, num_bits: int = 8, activations: str | None = "int8") -> nn.Module:
    """quantize_ by the number of bits of a weight, in place.

    num_bits 8 with activations "int8" (Int8Dynamic) or None (Int8WeightOnly); any other pair is a ValueError that lists them.
    """
    pair = (num_bits, activations)
    if type(num_bits) is not int or pair not in BY_BITS:
        pairs = ", ".join(f"({bits}, {act!r})" for bits, act in BY_BITS)
        raise ValueError(f"quantize_weights: (num_bits, activations) is ({num_bits!r}, {activations!r}), expected one of: {pairs}")
    return quantize_(net, BY_BITS[pair]())


class _Rules:
    """The config as a function of the layer's name: exact keys, then patterns in order, then the default."""

    def __init__(self, config: Config) -> None:
        entries = {"_default": config} if isinstance(config, Format) else config
        if not isinstance(entries, Mapping):
            raise TypeError(f"quantize_: config is {config!r}, expected a format such as tersor.Int8Dynamic(), or a dict of them")
        self.exact: dict[str, Format | None] = {}
        self.patterns: list[tuple[str, re.Pattern[str], Format | None]] = []
        self.default: Format | None = None
        self.unused: set[str] = set()
        for key, fmt in entries.items():
            if not isinstance(key, str):
                raise TypeError(f"quantize_: config key {key!r} is not a string")
            if fmt is not None and not isinstance(fmt, Format):
                raise TypeError(f"quantize_: config[{key!r}] is {fmt!r}, expected a format such as tersor.Int8Dynamic(), or None")
            if key == "_default":
                self.default = fmt
                continue
            self.unused.add(key)
            if key.startswith("re:"):
                try:
                    self.patterns.append((key, re.compile(key[3:]), fmt))
                except re.error as error:
                    raise ValueError(f"quantize_: config key {key!r} is not a regular expression: {error}") from None
            else:
                self.exact[key] = fmt

    def lookup(self, fqn: str) -> Format | None:
        found = self.exact.get(fqn)
        if fqn in self.exact:
            self.unused.discard(fqn)
        matched = fqn in self.exact
        for key, pattern, fmt in self.patterns:
            if pattern.fullmatch(fqn):
                self.unused.discard(key)
                if not matched:
                    found, matched = fmt, True
        return found if matched else self.default


def _check_dynamic_spec(model: nn.Module, spec: Mapping[Any, bool]) -> None:
    names = {name for name, _ in model.named_modules()}
    for key in spec:
        if isinstance(key, str):
            if key not in names:
                raise ValueError(f"quantize_dynamic: qconfig_spec names {key!r}, which the model does not have")
        elif not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(f"quantize_dynamic: qconfig_spec holds {key!r}, expected module types and submodule names")
        elif spec[key] and key is not nn.Linear and any(type(module) is key for module in model.modules()):
            warnings.warn(f"tersor: {key.__name__} stays float: only nn.Linear is replaced", stacklevel=3)


def _check_root(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model is {type(model).__name__}, expected an nn.Module")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "quantize_: model is an nn.Linear itself, which cannot be replaced in place; "
            "use tersor.QuantLinear.from_linear(model, tersor.Int8Dynamic())"
        )


def _linears(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Linear]]:
    """(fqn, parent, name, layer) of every place that holds an nn.Linear; a layer in two places counts twice."""
    found: list[tuple[str, nn.Module, str, nn.Linear]] = []
    for fqn, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            prefix, _, name = fqn.rpartition(".")
            found.append((fqn, model.get_submodule(prefix), name, module))
    return found


def _plan(model: nn.Module, rules: _Rules, filter_fn: Filter | None) -> list[_Place]:
    candidates = _linears(model)
    planned: list[tuple[str, nn.Module, str, nn.Linear, Format]] = []
    for fqn, parent, name, layer in candidates:
        fmt = rules.lookup(fqn)
        if fmt is None:
            continue
        if filter_fn is not None:
            if filter_fn(layer, fqn):
                planned.append((fqn, parent, name, layer, fmt))
            continue
        reason = None if fqn in rules.exact else _unfit(layer)
        if reason:
            logger.warning("tersor: %s stays float: it has %s, which a swap would lose", fqn, reason)
            continue
        planned.append((fqn, parent, name, layer, fmt))
    if rules.unused:
        names = ", ".join(repr(key) for key in sorted(rules.unused))
        have = ", ".join(fqn for fqn, *_ in candidates[:8]) + (", ..." if len(candidates) > 8 else "")
        raise ValueError(f"quantize_: config keys match no nn.Linear: {names}; the model has: {have or 'none'}")

    owners = _owners(model, {id(layer) for _, _, _, layer, _ in planned})
    places = []
    seen: set[tuple[int, str]] = set()  # a shared parent offers its children under several names
    for fqn, parent, name, layer, fmt in planned:
        if (id(parent), name) in seen:
            continue
        seen.add((id(parent), name))
        owner = owners.get(id(layer.weight))
        if owner and filter_fn is None and fqn not in rules.exact:
            warnings.warn(
                f"tersor: {fqn} stays float: its weight is tied to {owner}, which is not swapped; "
                f"name it in the config ({{{fqn!r}: ...}}) to give it a packed copy of its own",
                stacklevel=4,
            )
            continue
        if owner:
            n_bytes = sum(spec.dtype.itemsize * torch.Size(spec.shape).numel() for spec in fmt.tensors(*layer.weight.shape))
            logger.warning("tersor: %s is tied to %s, which stays float: its packed copy adds %d bytes", fqn, owner, n_bytes)
        places.append(_Place(fqn, parent, name, fmt))
    return places


def has_hooks(layer: nn.Module) -> bool:
    """Whether a layer carries hooks, which replacing it would lose."""
    return any(getattr(layer, hooks) for hooks in _HOOKS)


def _unfit(layer: nn.Module) -> str | None:
    """What a layer carries that a swap would lose, or None."""
    if has_hooks(layer):
        return "hooks"
    if "weight" not in layer._parameters:
        return "no plain weight (pruned or re-parametrised)"
    return None


def _owners(model: nn.Module, swapped: set[int]) -> dict[int, str]:
    """id of each parameter of the modules that stay -> its name."""
    owners = {}
    for prefix, module in model.named_modules():
        if id(module) not in swapped:
            for name, parameter in module._parameters.items():
                owners[id(parameter)] = f"{prefix}.{name}" if prefix else name
    return owners


def _swap_all(places: list[_Place], device: torch.device | str | None, progress: bool) -> None:
    made: dict[int, QuantLinear] = {}  # by layer: one module in two places stays one module
    by_weight: dict[tuple[int, Format], QuantLinear] = {}  # one weight in two layers stays one packed weight
    kept_ids: list[nn.Module] = []  # keeps shared layers alive so that ids stay unique while needed
    counts: dict[int, int] = {}
    for place in places:
        weight_id = id(getattr(place.parent, place.name).weight)
        counts[weight_id] = counts.get(weight_id, 0) + 1
    for place in _tracked(places, progress):
        linear = getattr(place.parent, place.name)
        if id(linear) not in made:
            shared = by_weight.get((id(linear.weight), place.format))
            layer = QuantLinear.from_linear(linear, place.format) if shared is None else _with_weight_of(shared, linear)
            if device is not None:
                layer = layer.to(device)
            if counts[id(linear.weight)] > 1:
                made[id(linear)] = layer
                by_weight[(id(linear.weight), place.format)] = layer
                kept_ids.append(linear)
        else:
            layer = made[id(linear)]
        setattr(place.parent, place.name, layer)
        del linear


def _with_weight_of(shared: QuantLinear, linear: nn.Linear) -> QuantLinear:
    layer = QuantLinear(
        linear.in_features, linear.out_features, False, shared.format, torch.device("meta"), dtype=linear.weight.dtype
    )
    for spec in layer.specs():
        (layer._parameters if spec.parameter else layer._buffers)[spec.name] = getattr(shared, spec.name)
    layer.bias = linear.bias
    layer.train(linear.training)
    return layer


def _tracked(places: list[_Place], progress: bool) -> Iterable[_Place]:
    if not progress:
        return places
    from rich.console import Console
    from rich.progress import track

    return track(places, "quantizing layers", console=Console(stderr=True))


def disable_fast_paths(model: nn.Module) -> None:
    """nn.TransformerEncoder(Layer)'s eval fast path reads linear1.weight itself; it must not, once that is packed."""
    touched = 0
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if not any(isinstance(part, QuantLinear) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
        elif module.activation_relu_or_gelu:
            module.activation_relu_or_gelu = 0
            touched += 1
    if touched:
        logger.info("tersor: turned off the fused eval path of %d nn.TransformerEncoderLayer: it reads float weights", touched)
