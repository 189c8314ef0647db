"""Which layers of a model a config and a filter choose: one set of rules for whatever is then done to them."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .adapters import in_adapter, reads_base_weight
from .formats import Format
from .masks import mask_of

logger = logging.getLogger("tersor")
V = TypeVar("V")

Filter = Callable[[nn.Module, str], bool]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Spot:
    """One place of the model that holds a chosen layer. The layer itself is not held: its weight must be free to go."""

    fqn: str
    parent: nn.Module
    name: str

    def layer(self) -> nn.Linear:
        layer = getattr(self.parent, self.name) if self.name else self.parent
        assert isinstance(layer, nn.Linear)
        return layer


@dataclass(frozen=True)
class Task:
    """What is done to the layers that a config chooses, in the words of messages; `kind` is what a config holds."""

    function: str
    kind: type = Format
    example: str = "a format such as tersor.Int8Dynamic()"
    done: str = "swapped"
    stays: str = "float"
    packs: bool = True  # a packed layer replaces the old one: hooks are lost, and so is the float weight that others may read


class Rules(Generic[V]):
    """The config as a function of the layer's name: exact keys, then patterns in order, then the default."""

    def __init__(self, config: V | Mapping[str, V | None], task: Task) -> None:
        self.task = task
        function = task.function
        entries: Any = {"_default": config} if isinstance(config, task.kind) else config
        if not isinstance(entries, Mapping):
            raise TypeError(f"{function}: config is {config!r}, expected {task.example}, or a dict of them")
        self.exact: dict[str, V | None] = {}
        self.patterns: list[tuple[str, re.Pattern[str], V | None]] = []
        self.default: V | None = None
        self.unused: set[str] = set()
        for key, value in entries.items():
            if not isinstance(key, str):
                raise TypeError(f"{function}: config key {key!r} is not a string")
            fits = value is None or isinstance(value, task.kind)
            if not fits:
                raise TypeError(f"{function}: config[{key!r}] is {value!r}, expected {task.example}, or None")
            if key == "_default":
                self.default = value
                continue
            self.unused.add(key)
            if key.startswith("re:"):
                try:
                    self.patterns.append((key, re.compile(key[3:]), value))
                except re.error as error:
                    raise ValueError(f"{function}: config key {key!r} is not a regular expression: {error}") from None
            else:
                self.exact[key] = value

    @property
    def wants_some(self) -> bool:
        return any(value is not None for value in (self.default, *self.exact.values(), *(value for *_, value in self.patterns)))

    def lookup(self, fqn: str) -> V | None:
        found = self.exact.get(fqn)
        if fqn in self.exact:
            self.unused.discard(fqn)
        matched = fqn in self.exact
        for key, pattern, value in self.patterns:
            if pattern.fullmatch(fqn):
                self.unused.discard(key)
                if not matched:
                    found, matched = value, True
        return found if matched else self.default


def _linears(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Linear]]:
    """(fqn, parent, name, layer) of every place that holds an nn.Linear; a layer in two places counts twice."""
    found: list[tuple[str, nn.Module, str, nn.Linear]] = []
    for fqn, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            prefix, _, name = fqn.rpartition(".")
            found.append((fqn, model.get_submodule(prefix), name, module))
    return found


def choose(model: nn.Module, rules: Rules[V], filter_fn: Filter | None) -> list[tuple[Spot, V]]:
    """The layers that the config and the filter choose, each place of the model once, with what the config says of it."""
    task = rules.task
    _refuse_masks(model, rules, filter_fn)
    candidates = _linears(model)
    planned: list[tuple[str, nn.Module, str, nn.Linear, V]] = []
    adapters: list[str] = []
    for fqn, parent, name, layer in candidates:
        value = rules.lookup(fqn)
        if value is None:
            continue
        asked = filter_fn is not None or fqn in rules.exact
        if filter_fn is not None and not filter_fn(layer, fqn):
            continue
        trains = in_adapter(model, fqn)
        if trains and not asked:
            adapters.append(fqn)
            continue
        reason = (
            "is part of a peft adapter, which then no longer trains" if trains and task.packs else _unfit(layer, parent, name, task)
        )
        if reason and not asked:
            logger.warning("tersor: %s stays %s: it %s", fqn, task.stays, reason)
            continue
        if task.packs and _read_by_attention(parent, name):
            raise ValueError(
                f"{task.function}: {fqn} cannot be swapped: {_ATTENTION_READS}; leave it out of the config or filter_fn"
            )
        if "weight" not in layer._parameters and not task.packs:
            raise ValueError(f"{task.function}: {fqn} {reason}; leave it out of the config or filter_fn")
        if reason:
            logger.warning("tersor: %s is %s as asked, though it %s", fqn, task.done, reason)
        planned.append((fqn, parent, name, layer, value))
    if adapters:
        logger.info(
            "tersor: %d layers of peft adapters stay %s%s: %s",
            len(adapters),
            task.stays,
            ", so that they train" if task.packs else "",
            some(adapters),
        )
    if filter_fn is None:
        _report_reparametrised(model, rules)
    if rules.unused:
        names = ", ".join(repr(key) + _why_no_linear(model, key) for key in sorted(rules.unused))
        have = some([fqn for fqn, *_ in candidates])
        raise ValueError(f"{task.function}: config keys match no nn.Linear: {names}; the model has: {have or 'none'}")

    owners = _owners(model, {id(layer) for _, _, _, layer, _ in planned})
    places = []
    seen: set[tuple[int, str]] = set()  # a shared parent offers its children under several names
    for fqn, parent, name, layer, value in planned:
        if (id(parent), name) in seen:
            continue
        seen.add((id(parent), name))
        owner = owners.get(id(layer.weight))
        if owner and filter_fn is None and fqn not in rules.exact:
            _warn_caller(
                f"tersor: {fqn} stays {task.stays}: its weight is tied to {owner}, which is not {task.done}; "
                f"name it in the config ({{{fqn!r}: ...}}) to give it a {'packed copy' if task.packs else 'weight'} of its own"
            )
            continue
        if owner and isinstance(value, Format):
            n_bytes = sum(spec.dtype.itemsize * torch.Size(spec.shape).numel() for spec in value.tensors(*layer.weight.shape))
            logger.warning("tersor: %s is tied to %s, which stays float: its packed copy adds %d bytes", fqn, owner, n_bytes)
        places.append((Spot(fqn, parent, name), value))
    if not places and filter_fn is None and rules.wants_some:
        others = sum(type(module).__name__ == "Conv1D" for module in model.modules())
        gpt2 = f"; its {others} Conv1D (transformers' form of GPT-2's layers) are none" if others else ""
        stays = f"the model has {len(candidates)} nn.Linear{gpt2}"
        _warn_caller(f"tersor: {task.function}: no layer is {task.done}: {stays}")
    return places


def _warn_caller(message: str) -> None:
    """A UserWarning at the line that called the package, however deep the functions of the package lie."""
    package = __name__.partition(".")[0]
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _refuse_masks(model: nn.Module, rules: Rules[Any], filter_fn: Filter | None) -> None:
    for fqn, module in model.named_modules():
        if mask_of(module) and rules.lookup(fqn) is not None and (filter_fn is None or filter_fn(module, fqn)):
            raise ValueError(
                f"{rules.task.function}: {fqn or 'model'} carries a mask of prune_; "
                "call tersor.finalize_(model) first, which makes its zeros permanent"
            )


def has_hooks(layer: nn.Module) -> bool:
    """Whether a layer carries hooks, or a forward set on the object (accelerate wraps a layer so): replacing it loses them."""
    return any(getattr(layer, hooks) for hooks in _HOOKS) or "forward" in layer.__dict__


def unfit_by_itself(layer: nn.Module, task: Task) -> str | None:
    """What a layer carries that a swap would lose, as far as the layer alone shows it; or None."""
    lost = ", which a swap would lose" if task.packs else ""
    if has_hooks(layer) and task.packs:
        return f"has hooks or a forward of its own{lost}"
    if "weight" not in layer._parameters:
        return f"has no plain weight (pruned or re-parametrised){lost}"
    return None


def _unfit(layer: nn.Module, parent: nn.Module, name: str, task: Task) -> str | None:
    """What a layer carries that a swap would lose, or who reads its float weight; or None."""
    reason = unfit_by_itself(layer, task)
    if reason or not task.packs:
        return reason
    if _read_by_attention(parent, name):
        return f"cannot be packed: {_ATTENTION_READS}"
    if reads_base_weight(parent, name):
        return "is the base of a DoRA adapter, which reads its float weight"
    return None


_ATTENTION_READS = "nn.MultiheadAttention reads the weight of its out_proj itself"


def _read_by_attention(parent: nn.Module, name: str) -> bool:
    return (
        name == "out_proj" and isinstance(parent, nn.MultiheadAttention) and type(parent).forward is nn.MultiheadAttention.forward
    )


def _report_reparametrised(model: nn.Module, rules: Rules[Any]) -> None:
    """Parametrising a layer gives it a class of its own, which hides it from the swap: say so."""
    task = rules.task
    lost = ", which a swap would lose" if task.packs else ""
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_parametrized(module) and fqn not in rules.exact and rules.lookup(fqn):
            logger.warning("tersor: %s stays %s: it is parametrised%s", fqn, task.stays, lost)


def _why_no_linear(model: nn.Module, key: str) -> str:
    """What a config key names, where it names a module of the model at all."""
    module = dict(model.named_modules(remove_duplicate=False)).get(key)
    if module is None:
        return ""
    parent, _, name = key.rpartition(".")
    reads = f": {_ATTENTION_READS}" if _read_by_attention(model.get_submodule(parent), name) else ""
    return f" (a {type(module).__name__}{reads})"


def some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _owners(model: nn.Module, swapped: set[int]) -> dict[int, str]:
    """id of each parameter of the modules that stay -> its name."""
    owners = {}
    for prefix, module in model.named_modules():
        if id(module) not in swapped:
            for name, parameter in module._parameters.items():
                owners[id(parameter)] = f"{prefix}.{name}" if prefix else name
    return owners
