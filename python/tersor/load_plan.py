"""The planning of load_: what goes where, whether all of it fits, and only then the change of the model."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .formats import Format, decode_tag
from .nn import QuantLinear, in_huge_pages
from .selection import has_hooks

logger = logging.getLogger("tersor")

TAG = "_extra_state"  # nn.Module's name in a state_dict for what get_extra_state returns
_SHOWN = 20  # names or lines in one message


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was opened. Two names of one stored tensor hold the same memory."""

    where: str  # for messages
    tensors: Mapping[str, Any]
    copy_to_meta: bool  # meta targets get copies; else the tensors themselves
    copy_to_new: bool  # so do the layers that replace a float layer with data
    metadata: Any = None  # a state_dict's own: the versions of its modules


@dataclass
class _Slot:
    """One tensor of the model, under all the names that it goes by."""

    target: Tensor | None  # None: of a layer that is still to be built
    shape: tuple[int, ...] | None  # None: it follows from the weight that is to come
    dtype: torch.dtype | None  # None: any of the target's kind
    keys: list[str] = field(default_factory=list)
    value: Any = None  # what the checkpoint has for it


@dataclass
class _Layer:
    """A packed layer of the checkpoint. It does not refer to the model's float layer, whose weight must be free to go."""

    format: Format
    n: int
    k: int
    speedup: dict[int, float] | None
    prefixes: list[str]  # where the model has it
    slots: dict[str, _Slot] = field(default_factory=dict)  # by the name of the stored tensor

    def __str__(self) -> str:
        return f"{self.format!r} with out_features={self.n}, in_features={self.k}"


class LoadPlan:
    """What goes where. Making it raises ValueError unless all of it fits; only apply() changes the model."""

    def __init__(self, model: nn.Module, source: Source, strict: bool) -> None:
        self.model = model
        self.source = source
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.problems: list[str] = []
        self.refused: set[str] = set()  # prefixes with a problem of their own: their keys are not reported one by one
        self.layers: dict[str, _Layer] = {}  # by prefix
        self.slots: dict[Hashable, _Slot] = {}
        self.extra: list[str] = []  # extra states of other modules, and what only its own module can write
        self._find_layers()
        self._find_slots()
        self._match(strict)
        if self.problems:
            lines = listed(self.problems, "\n  ")
            raise ValueError(f"load_: {source.where} does not fit the model; nothing was changed:\n  {lines}")

    def _refuse(self, prefix: str, reason: str) -> None:
        self.problems.append(reason)
        self.refused.add(prefix)

    def _find_layers(self) -> None:
        """The layers that the tags of the checkpoint describe, each where the model can have it."""
        tensors = self.source.tensors
        places: dict[int, list[str]] = {}  # one module in two places is one layer
        for prefix, module in self.modules.items():
            places.setdefault(id(module), []).append(prefix)
        for key, state in tensors.items():
            prefix, name = split(key)
            at = self.modules.get(prefix)
            if name != TAG or _has_extra_state(at):
                continue
            try:
                layer = _Layer(*decode_tag(state, prefix or "the root"), prefixes=[prefix])
            except ValueError as error:
                # Elsewhere it is some other module's state, an unexpected key.
                if isinstance(at, nn.Linear | QuantLinear):
                    self._refuse(prefix, str(error))
                continue
            reason = _unfit(layer, at, prefix)
            if reason:
                self._refuse(prefix, reason)
                continue
            layer.prefixes = places[id(at)]
            have = self.layers.setdefault(prefix, layer)
            if (have.format, have.n, have.k) != (layer.format, layer.n, layer.k):
                self._refuse(prefix, f"{prefix} is the same module as {have.prefixes[0]}, their tags differ")
            for place in have.prefixes:
                self.layers[place] = have
        for prefix, module in self.modules.items():
            if isinstance(module, QuantLinear) and prefix not in self.layers and prefix not in self.refused:
                hint = "but a float weight: load it before quantize_" if join(prefix, "weight") in tensors else "its tag"
                self._refuse(prefix, f"{prefix or 'the root'} is a QuantLinear; the checkpoint has no {join(prefix, TAG)}, {hint}")

    def _find_slots(self) -> None:
        """Every tensor of the model as it will be; tied ones, and the layers of a tied float weight, share one slot."""
        for prefix, layer in self.layers.items():
            module: Any = self.modules[prefix]
            for spec in layer.format.tensors(layer.n, layer.k):
                if isinstance(module, QuantLinear):
                    target = getattr(module, spec.name)
                    self._check_target(prefix, spec.name, target)
                    tie = identity(target)
                else:
                    # What does not follow from the weight is not tied with it.
                    target, tie = None, (id(module.weight if spec.channels else module), layer.format, spec.name)
                slot = self.slots.setdefault(tie, _Slot(target, None if spec.varies else spec.shape, spec.dtype))
                slot.keys.append(join(prefix, spec.name))
                layer.slots[spec.name] = slot
        packed = {key for slot in self.slots.values() for key in slot.keys}
        held = _holders(self.model)
        for key, target in self.model.state_dict(keep_vars=True).items():
            prefix, name = split(key)
            mine = prefix in self.layers
            replaced = mine and not isinstance(self.modules[prefix], QuantLinear)
            if prefix in self.refused or key in packed or (mine and name == TAG) or (replaced and name == "weight"):
                continue
            if name == TAG or not isinstance(target, Tensor) or (key not in self.source.tensors and _not_writable(target)):
                self.extra.append(key)
            elif self._check_target(prefix, name, target):
                if target.is_meta and id(target) not in held:
                    self._refuse(prefix, f"{key} is on meta and made by its module's state_dict; initialise that module first")
                slot = self.slots.setdefault(identity(target), _Slot(target, tuple(target.shape), None))
                slot.keys.append(key)

    def _check_target(self, prefix: str, name: str, target: Tensor) -> bool:
        if is_lazy(target):
            reason = "is not initialised yet; run the model once before load_"
        elif target.is_inference():
            reason = "was made under inference_mode and cannot be changed; make the model outside of it"
        elif is_sharded(target):
            reason = "is sharded; load before parallelising the model"
        elif why := _not_writable(target):
            reason = f"is {why} in the model and cannot be written in place; make it a plain tensor of its own"
        else:
            return True
        self._refuse(prefix, f"{join(prefix, name)} {reason}")
        return False

    def _match(self, strict: bool) -> None:
        """A value for every slot; what is missing, unexpected or of another size."""
        tensors = self.source.tensors
        expected = {join(prefix, TAG) for prefix in self.layers} | set(self.extra)
        missing = [key for key in self.extra if key not in tensors]
        for slot in self.slots.values():
            expected.update(slot.keys)
            found = [key for key in slot.keys if key in tensors]
            if not found:
                if slot.dtype is None:
                    missing += slot.keys
                else:
                    want = describe(slot.dtype, slot.shape or ())
                    self.problems.append(f"{slot.keys[0]} is missing; the tag of its layer asks for {want}")
                continue
            misfits = [reason for key in found if (reason := _misfit(key, tensors[key], slot))]
            if not misfits:
                slot.value = tensors[found[0]]
                different = [key for key in found[1:] if not _same(slot.value, tensors[key])]
                misfits = [f"{key} differs from {found[0]}; the model ties the two, untie them" for key in different]
            self.problems += misfits
        self._check_layers()
        unexpected = [key for key in tensors if key not in expected and split(key)[0] not in self.refused]
        for what, keys in (("missing", missing), ("unexpected", unexpected)):
            if keys and strict:
                self.problems.append(f"{what}: {listed(keys)}")
            elif keys and not self.problems:
                logger.warning("tersor: load_(strict=False): %s in %s: %s", what, self.source.where, listed(keys))

    def _check_layers(self) -> None:
        """Whether what goes into each packed layer makes one."""
        for prefix, layer in {id(layer): (prefix, layer) for prefix, layer in self.layers.items()}.values():
            values = {name: slot.value for name, slot in layer.slots.items()}
            if all(value is not None for value in values.values()):
                try:
                    layer.format.check_stored(values, layer.n, layer.k)
                except ValueError as error:
                    self._refuse(prefix, f"{prefix or 'the root'}: {error}")

    def apply(self) -> None:
        """Changes the model: packed layers one by one, each float layer gone before the next is read, then all other tensors."""
        self._try_extra_states()
        taken = _Taken()
        for layer in {id(layer): layer for layer in self.layers.values()}.values():
            if not isinstance(self.modules[layer.prefixes[0]], QuantLinear):
                self._replace(layer, taken)
        held = _holders(self.model)
        tensors = self.source.tensors
        rest: OrderedDict[str, Any] = OrderedDict((key, tensors[key]) for key in self.extra if key in tensors)
        for slot in self.slots.values():
            if slot.target is None or slot.value is None:
                continue
            resized = slot.target.shape != slot.value.shape
            if not slot.target.is_meta and not resized:
                rest.update(dict.fromkeys(slot.keys, slot.value))
                continue
            value = taken.take(slot.value, self.source.copy_to_meta if slot.target.is_meta else self.source.copy_to_new)
            if not slot.target.is_meta:
                value = value.to(slot.target.device)
            if isinstance(slot.target, nn.Parameter):
                value = nn.Parameter(value, requires_grad=slot.target.requires_grad)
            for holder, name in held[id(slot.target)]:
                holder[name] = value
        for prefix, layer in self.layers.items():
            layer_now: Any = self.modules[prefix]
            layer_now.speedup = layer.speedup
            if layer_now.bias is not None:
                layer_now._compute_dtype = layer_now.bias.dtype  # a meta bias came with the file's
        # torch's own loader for what has memory already: it runs the hooks of the modules.
        rest._metadata = self.source.metadata  # type: ignore[attr-defined]
        try:
            self.model.load_state_dict(rest, strict=False)
        except Exception as error:  # of a hook, whatever it raises
            raise ValueError(
                f"load_: a module refused its state from {self.source.where}, part of it is loaded: {error}"
            ) from error

    def _try_extra_states(self) -> None:
        """Other modules may refuse their extra state in set_extra_state, which only trying shows; what was set is then undone."""
        undo: list[tuple[nn.Module, Any]] = []
        for key in self.extra:
            prefix, name = split(key)
            if name != TAG or key not in self.source.tensors:
                continue
            module = self.modules[prefix]
            try:
                before = deepcopy(module.get_extra_state())
                undo.append((module, before))
                module.set_extra_state(deepcopy(self.source.tensors[key]))
            except Exception as error:
                for changed, state in reversed(undo):
                    with contextlib.suppress(Exception):
                        changed.set_extra_state(state)
                raise ValueError(
                    f"load_: {prefix or 'the root'} ({type(module).__name__}) refused {key} from {self.source.where}; nothing was "
                    f"changed: {type(error).__name__}: {error}"
                ) from error

    def _replace(self, layer: _Layer, taken: _Taken) -> None:
        old: Any = self.modules[layer.prefixes[0]]
        new = QuantLinear(layer.k, layer.n, False, layer.format, torch.device("meta"), old.weight.dtype)
        copy = self.source.copy_to_meta if old.weight.is_meta else self.source.copy_to_new
        for spec in new.specs():
            slot = layer.slots[spec.name]
            if slot.target is None:
                value = taken.take(slot.value, copy)
                if not old.weight.is_meta:
                    value = value.to(old.weight.device)
                # The slot now holds what the other layers of a tie share.
                slot.target = nn.Parameter(value, requires_grad=False) if spec.parameter else value
                slot.value = None
            held: dict[str, Any] = new._parameters if spec.parameter else new._buffers
            held[spec.name] = slot.target
        new.bias = old.bias
        new.train(old.training)
        for prefix in layer.prefixes:
            parent, name = split(prefix)
            setattr(self.modules[parent], name, new)
            self.modules[prefix] = new


class _Taken:
    """Hands tensors of the checkpoint over to the model. One memory is handed over once: a second taker gets a copy."""

    def __init__(self) -> None:
        self.storages: set[int] = set()

    def take(self, value: Tensor, copy: bool) -> Tensor:
        value = value.detach().resolve_conj().resolve_neg()
        storage = value.untyped_storage().data_ptr()
        misaligned = value.data_ptr() % value.element_size() != 0
        if copy or storage in self.storages or misaligned or value.is_inference() or not value.is_contiguous():
            return in_huge_pages(value.clone(memory_format=torch.contiguous_format))
        if storage:
            self.storages.add(storage)
        return value


def _unfit(layer: _Layer, module: nn.Module | None, prefix: str) -> str | None:
    """Why `layer` cannot stand where `module` stands, or None."""
    it = f"{prefix or 'the root'} is {layer} in the checkpoint"
    if module is None:
        return f"{it}; the model has no module of that name"
    if not isinstance(module, QuantLinear):
        if type(module) is not nn.Linear:
            return f"{it}, {type(module).__name__} in the model, expected nn.Linear or QuantLinear"
        if not prefix:
            return f"{it}; the model is an nn.Linear itself, which cannot be replaced in place, pass a tersor.QuantLinear"
        if has_hooks(module):
            return f"{it}; its nn.Linear in the model has hooks or a forward of its own, which a swap would lose: set them later"
    if (layer.n, layer.k) != (module.out_features, module.in_features):
        return f"{it}, out_features={module.out_features}, in_features={module.in_features} in the model"
    if isinstance(module, QuantLinear) and module.format != layer.format:
        return f"{it}, {module.format!r} in the model"
    try:
        layer.format.check_sizes(layer.n, layer.k)
    except ValueError as error:
        return f"{it}: {error}"
    return None


def _has_extra_state(module: nn.Module | None) -> bool:
    """Whether `module` has an extra state that is its own business."""
    if module is None or isinstance(module, QuantLinear):
        return False
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _misfit(key: str, value: Any, slot: _Slot) -> str | None:
    """Why `value` cannot go into `slot`, or None."""
    if not isinstance(value, Tensor):
        return f"{key} is a {type(value).__name__}, expected a Tensor"
    if value.is_meta or value.is_nested or value.layout is not torch.strided or value.is_quantized or is_sharded(value):
        return f"{key} is meta, sparse, nested, sharded or of a quantised dtype, expected a plain tensor with data"
    want = slot.dtype
    if want is None:
        assert slot.target is not None
        want = value.dtype if _kind(value) == _kind(slot.target) else slot.target.dtype
    if value.dtype != want or slot.shape not in (None, tuple(value.shape)):
        shape = slot.shape if slot.shape is not None else value.shape
        return f"{key} is {describe(value.dtype, value.shape)}, expected {describe(want, shape)}"
    return None


def _not_writable(t: Tensor) -> str | None:
    """Why torch could not copy a plain tensor into `t`: it would find out halfway through the model."""
    if t.is_nested or t.layout is not torch.strided or t.is_quantized:
        return "nested, sparse or quantised"
    if not t.is_meta and any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
        return "expanded (its elements share memory)"
    return None


def _kind(t: Tensor) -> tuple[bool, bool, bool]:
    """What a load does not convert: float to integer and the like would lose values in silence."""
    return t.is_floating_point(), t.is_complex(), t.dtype == torch.bool


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, for tensors of one shape."""
    if identity(a) == identity(b):
        return True
    bits = [t.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


def _holders(model: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """id of a tensor -> every (dict, name) of a module that holds it."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                found.setdefault(id(t), []).append((held, name))
    return found


def identity(t: Tensor) -> Hashable:
    """Equal for tensors that are the same elements of the same memory."""
    if t.is_meta or t.is_nested or t.layout is not torch.strided or t.numel() == 0:
        return id(t)
    return t.device, t.data_ptr(), t.dtype, tuple(t.shape), t.stride(), t.is_conj(), t.is_neg()


def is_sharded(t: Tensor) -> bool:
    """Whether t is a DTensor (asked without importing torch.distributed)."""
    return hasattr(t, "full_tensor")


def describe(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def listed(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    more = f"{separator}... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return separator.join(names[:_SHOWN]) + more


def split(key: str) -> tuple[str, str]:
    """A key of a state_dict -> (name of the module, name of the tensor)."""
    prefix, _, name = key.rpartition(".")
    return prefix, name


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
