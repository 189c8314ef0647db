"""Swapping the layers of a model: plan everything, validate everything, then replace one module after the other."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapters import guard_merges
from .choice import Choice, row_counts
from .formats import BY_BITS, Format, Int8Dynamic
from .nn import QuantLinear, has_values
from .ops.checks import FLOATS, as_rows
from .progress import tracked
from .selection import Filter, Rules, Spot, Task, choose, some
from .weights import row_blocks

logger = logging.getLogger("tersor")
L = TypeVar("L", bound=nn.Module)

Config = Format | Mapping[str, "Format | None"]


@dataclass(frozen=True)
class Place(Spot):
    """One place of the model that holds a layer to swap."""

    format: Format
    speedup: dict[int, float] | None = None


def quantize_(
    model: nn.Module,
    config: Config,
    filter_fn: Filter | None = None,
    *,
    device: torch.device | str | None = None,
    only_if_faster: Any = None,
    progress: bool = False,
) -> nn.Module:
    """Replaces the nn.Linear layers of `model` by QuantLinear, in place, and returns it.

    config     a format, or a dict {fqn | "re:<regex>" (fullmatch) | "_default": format or None}; exact names win over patterns
               (in order), patterns over _default; None leaves a layer as it is. A key that matches nothing is an error.
    filter_fn  filter_fn(module, fqn) -> bool chooses among the nn.Linear layers, instead of the default rules: no layer whose
               weight is tied to a module that stays (one warning names it), none with hooks or a forward of its own, none in
               the trainable part of a peft adapter. A dict key that names a layer exactly also overrides the rules.
    device     where each new layer goes, right after it is made; None: where the old one was
    only_if_faster
               numbers of rows (1, or (1, 64)), or example inputs that the model is run on once: each layer is measured, float
               against packed (SparseInt8 also against Int8Dynamic, which gives the same bits: the faster of the two is
               taken), and swapped where packed is faster over all its calls. What was measured stays with the layer
               (`speedup`, in its repr and in files); a layer that stays float is logged. None: no measuring.
    progress   a progress bar on stderr

    Everything is validated before the first layer is touched: a ValueError leaves the model as it was. The smallest layers go
    first and each float weight is freed before the next is read, so memory falls from layer to layer; what comes on top of the
    float model is one packed layer and a few MiB of blocks. A root nn.Linear cannot be replaced in place.
    """
    places = plan(model, config, filter_fn, "quantize_")
    if only_if_faster is not None:
        places = _faster(model, places, only_if_faster, progress)
    _swap_all(places, device, progress)
    settle(model)
    return model


def plan(model: nn.Module, config: Config, filter_fn: Filter | None, function: str) -> list[Place]:
    """The places that `config` and `filter_fn` choose by the rules of quantize_, validated; the model is not touched.

    function  who asks, for messages
    """
    _check_root(model, function)
    chosen = choose(model, Rules(config, Task(function)), filter_fn)
    places = [Place(place.fqn, place.parent, place.name, fmt) for place, fmt in chosen]
    for place in places:
        _validate(place, function)
    return places


def dequantize_(model: nn.Module) -> nn.Module:
    """Replaces every QuantLinear of `model` by a float nn.Linear with the weight it stands for, in place, and returns it."""
    if isinstance(model, QuantLinear):
        raise ValueError("dequantize_: model is a QuantLinear itself, which cannot be replaced in place; use model.dequantize()")
    # All layers exist before the first is replaced, so no id is used twice.
    made: dict[int, nn.Linear] = {}
    weights: dict[tuple[int, torch.dtype], Tensor] = {}  # one packed weight in two layers becomes one float weight
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would show a shared child once
            if isinstance(child, QuantLinear):
                if id(child) not in made:
                    linear = made[id(child)] = child.dequantize()
                    packed = next(id(getattr(child, spec.name)) for spec in child.specs() if spec.parameter)
                    linear.weight = weights.setdefault((packed, linear.weight.dtype), linear.weight)
                setattr(parent, name, made[id(child)])
    guard_merges(model)
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

    num_bits 8 with activations "int8" (Int8Dynamic) or None (Int8WeightOnly); 4 (Int4), 2 (Ternary) and 1 (Binary) with "int8";
    1 with "binary" (BinaryXnor). Any other pair is a ValueError that lists them.
    """
    pair = (num_bits, activations)
    if type(num_bits) is not int or pair not in BY_BITS:
        pairs = ", ".join(f"({bits}, {act!r})" for bits, act in BY_BITS)
        raise ValueError(f"quantize_weights: (num_bits, activations) is ({num_bits!r}, {activations!r}), expected one of: {pairs}")
    return quantize_(net, BY_BITS[pair]())


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


def _check_root(model: nn.Module, function: str = "quantize_") -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is {type(model).__name__}, expected an nn.Module")
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"{function}: model is an nn.Linear itself, which cannot be replaced in place; "
            "use tersor.QuantLinear.from_linear(model, tersor.Int8Dynamic())"
        )


def _validate(place: Place, function: str) -> None:
    """A function of its own: a caller's variable would keep the last float weight alive during the swap."""
    linear = place.layer()
    try:
        place.format.check_sizes(linear.out_features, linear.in_features)
        place.format.constants()
    except ValueError as error:
        raise ValueError(f"{function}: {place.fqn}: {error}; nothing was changed") from None
    if linear.weight.dtype not in FLOATS:
        expected = "expected float32, bfloat16 or float16, as its inputs will have to be; call model.float() first"
        raise TypeError(f"{function}: {place.fqn}.weight is {linear.weight.dtype}, {expected}; nothing was changed")
    if not is_finite(linear.weight.detach()):
        raise ValueError(f"{function}: {place.fqn}.weight holds NaN or inf; nothing was changed")


def _faster(model: nn.Module, places: list[Place], only_if_faster: Any, progress: bool) -> list[Place]:
    """The places whose packed layer was measured to be faster; the others are logged."""
    rows = row_counts(model, [place.layer() for place in places], only_if_faster)
    choice, faster, stay = Choice(), [], []
    for place in tracked(places, "measuring layers", progress):
        counts = rows[id(place.layer())]
        best = choice.best(place.layer(), place.format, counts) if counts else None
        if best is None:
            stay.append(place.fqn if counts else f"{place.fqn} (never called)")
        else:
            if best[0] != place.format:
                logger.info("tersor: %s becomes %r, which is faster here than %r", place.fqn, best[0], place.format)
            faster.append(dataclasses.replace(place, format=best[0], speedup=best[1]))
    if stay:
        logger.info("tersor: %d layers stay float, which is as fast here: %s", len(stay), some(stay))
    return faster


def _swap_all(places: list[Place], device: torch.device | str | None, progress: bool) -> None:
    groups: dict[int, list[Place]] = {}  # the places of one weight, by its id: all weights are alive here
    for place in places:
        groups.setdefault(id(place.layer().weight), []).append(place)

    def make(place: Place, shared: QuantLinear | None) -> QuantLinear:
        linear = place.layer()
        layer = QuantLinear.from_linear(linear, place.format) if shared is None else share_weight(shared, linear, place.format)
        layer.speedup = place.speedup
        return layer if device is None else layer.to(device)

    # The largest weight last: memory has fallen furthest when its packed copy is made.
    for group in tracked(sorted(groups.values(), key=_weight_size), "quantizing layers", progress):
        swap_group(group, make)


def _weight_size(group: list[Place]) -> int:
    return group[0].layer().weight.numel()


def swap_group(places: list[Place], make: Callable[[Place, L | None], L]) -> None:
    """Swaps the places of one weight: one module in two of them stays one module.

    make  (place, shared) -> new layer; shared is the layer that this weight already has in the place's format, or None
    """
    made: dict[int, L] = {}  # by the id of the layer
    by_format: dict[Format, L] = {}
    kept: list[nn.Module] = []  # so that the ids stay unique
    for place in places:
        linear = place.layer()
        if id(linear) not in made:
            made[id(linear)] = by_format[place.format] = make(place, by_format.get(place.format))
            kept.append(linear)
        setattr(place.parent, place.name, made[id(linear)])


def is_finite(weight: Tensor) -> bool:
    """By row blocks: of a whole weight, torch.isfinite would allocate more bytes than the weight has."""
    rows = as_rows(weight) if weight.dim() else weight.reshape(1, 1)
    return not has_values(weight) or all(bool(torch.isfinite(rows[begin:end]).all()) for begin, end in row_blocks(*rows.shape))


def share_weight(shared: QuantLinear, linear: nn.Linear, fmt: Format) -> QuantLinear:
    """A layer on the packed weight of `shared`. What does not follow from the weight (an input_scale, a threshold) is its own."""
    own = fmt.constants()
    layer = QuantLinear(
        linear.in_features, linear.out_features, False, shared.format, torch.device("meta"), dtype=linear.weight.dtype
    )
    for spec in layer.specs():
        value = getattr(shared, spec.name)
        if spec.name in own:
            value = own[spec.name].to(value.device).expand(spec.shape).clone()
        (layer._parameters if spec.parameter else layer._buffers)[spec.name] = value
    layer.bias = linear.bias
    layer.train(linear.training)
    return layer


def settle(model: nn.Module) -> None:
    """What the modules around packed layers must know, after a swap or a load."""
    disable_fast_paths(model)
    guard_merges(model)


def disable_fast_paths(model: nn.Module, kind: type[nn.Module] = QuantLinear) -> None:
    """nn.TransformerEncoder(Layer)'s eval fast path reads linear1.weight itself; it must not, where that layer is of `kind`."""
    touched = 0
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if not any(isinstance(part, kind) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
        elif module.activation_relu_or_gelu:
            module.activation_relu_or_gelu = 0
            touched += 1
    if touched:
        logger.info("tersor: turned off the fused eval path of %d nn.TransformerEncoderLayer: it reads float weights", touched)
