"""What a search chooses among: the layers of a model, the formats that each may take, and a file of what is known already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bench.timing import cpu_name
from ..formats import Format
from ..json_files import write_json
from ..nn import QuantLinear
from ..selection import Filter, Rules, Task, choose
from ..swap import Config

_VERSION = 1  # of the file


@dataclass(frozen=True)
class Unit:
    """One layer of the model, all the names it has, and the formats it may take; None stands for float."""

    names: tuple[str, ...]
    layer: nn.Linear
    formats: tuple[Format, ...]


def units_of(
    model: nn.Module, formats: Config | Iterable[Config], filter_fn: Filter | None, function: str
) -> tuple[list[Unit], list[str]]:
    """The layers that quantize_ would swap by its rules, in the model's order, and remarks on formats that do not fit some.

    formats  a format or several; in the place of one also a dict {fqn | "re:..." | "_default": format or None} as in quantize_,
             which says what that candidate is for each layer (scales of Int8Static differ by layer)
    """
    if isinstance(formats, Format | Mapping):
        formats = [formats]
    found: dict[str, tuple[nn.Linear, list[Format]]] = {}
    remarks = []
    configs = list(formats)
    if not configs:
        raise ValueError(f"{function}: formats is empty, expected formats such as tersor.Int8Dynamic()")
    for config in configs:
        for spot, fmt in choose(model, Rules(config, Task(function)), filter_fn):
            layer = spot.layer()
            own = found.setdefault(spot.fqn, (layer, []))[1]
            try:
                fmt.check_sizes(*layer.weight.shape)
                fmt.constants()
            except ValueError as error:
                remarks.append(f"{spot.fqn}: {error}")
                continue
            if fmt not in own:
                own.append(fmt)
    names: dict[nn.Linear, list[str]] = {}
    for fqn, (layer, _) in found.items():
        names.setdefault(layer, []).append(fqn)
    order = {module: i for i, module in enumerate(model.modules())}
    units = [Unit(tuple(all_names), layer, tuple(found[all_names[0]][1])) for layer, all_names in names.items()]
    return sorted((unit for unit in units if unit.formats), key=lambda unit: order[unit.layer]), remarks


class Packed:
    """Layers in their formats, each made once and kept: a trial of a whole model needs them all."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, str], QuantLinear] = {}

    def layer(self, unit: Unit, fmt: Format) -> QuantLinear:
        key = id(unit.layer), key_of(fmt)
        if key not in self._made:
            self._made[key] = QuantLinear.from_linear(unit.layer, fmt)
        return self._made[key]


def key_of(fmt: Format | None) -> str:
    """A format as a key of JSON."""
    return "float" if fmt is None else repr(fmt)


@dataclass
class Memory:
    """What was measured, in a JSON file where a path is given: a search that was stopped goes on from it.

    The file belongs to one model, one set of layers and formats and one machine; inputs and metric are the caller's to keep.
    """

    path: Path | None
    function: str
    belongs_to: str
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path | None, function: str, units: list[Unit], what: str) -> Memory:
        """Raises ValueError where the file is of something else, or damaged."""
        memory = cls(None if path is None else Path(path), function, fingerprint(units, what))
        if memory.path is None or not memory.path.exists():
            return memory
        way_out = "give another path, or delete the file"
        try:
            stored = json.loads(memory.path.read_text(encoding="utf-8"))
            version, of, data = stored["version"], stored["belongs_to"], stored["data"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{function}: path {memory.path} is no file of an earlier run; {way_out}") from None
        if version != _VERSION or of != memory.belongs_to or not isinstance(data, dict):
            raise ValueError(
                f"{function}: path {memory.path} is of another model, other formats, another machine or thread count; {way_out}"
            )
        memory.data = data
        return memory

    def get(self, *keys: str) -> Any:
        value: Any = self.data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def put(self, value: Any, *keys: str) -> None:
        inner = self.data
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
        if self.path is not None:
            write_json(self.path, {"version": _VERSION, "belongs_to": self.belongs_to, "data": self.data})


def fingerprint(units: list[Unit], what: str) -> str:
    """Of the layers, their weights, their formats, the machine, and `what` is measured."""
    digest = hashlib.sha256(f"{what} {cpu_name()} {torch.get_num_threads()}".encode())
    for unit in units:
        weight = unit.layer.weight.detach()
        sums = [weight.sum(dtype=torch.float64).item(), weight[:, : weight.shape[1] // 2].sum(dtype=torch.float64).item()]
        digest.update(repr((unit.names, tuple(weight.shape), sums, [key_of(fmt) for fmt in unit.formats])).encode())
        # repr leaves out nothing that is compared, but an input_scale is stored apart from its format
        digest.update(repr([getattr(fmt, "input_scale", None) for fmt in unit.formats]).encode())
    return digest.hexdigest()
