"""`advise()`: what a model needs, what each format makes of it here, and what limits it elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..bench.machine import Machine, this_machine
from ..bench.our_formats import arithmetic
from ..bench.timing import interleaved, machine_name
from ..calibration import Batch, batches, evaluating
from ..choice import Rows, rows_of_calls
from ..comparison import exchanged, model_bytes
from ..formats import Binary, BinaryXnor, Format, Int4, Int8Dynamic, Int8WeightOnly, Ternary
from ..nn import QuantLinear
from ..progress import tracking
from ..reporting.measure import Metric, distance_between, float_score, run_all, score
from ..selection import Rules, Task, choose
from .hardware import HARDWARE, Hardware
from .predict import Here, LayerTime, call_cost, can_predict, predict, weight_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FORMATS: tuple[Format, ...] = (Int8Dynamic(), Int8WeightOnly(), Int4(), Int4(32), Ternary(), Binary(), BinaryXnor())
_KEPT_BITS = 8  # formats of so many bits keep a model's outputs without calibration or training
ROUNDS, SECONDS = 5, 0.02


@dataclass(frozen=True)
class LayerAdvice:
    """A layer as it is; seconds: of its calls of a pass, by format ("float" included); bound: what most of a float call is, and of
    a call in the recommended format."""

    fqn: str
    k: int
    n: int
    rows: Rows
    seconds: dict[str, float]
    bound: dict[str, str]


@dataclass(frozen=True)
class FormatAdvice:
    """All layers in one format, here. seconds: predicted for a pass of the whole model; bytes: of the model; memory: those and the
    largest input and output of a layer; drop: measured where a bound was given; reasons: why it was not chosen, if so."""

    format: str
    seconds: float
    layers_s: float
    limited_by: str  # "compute", "bandwidth", "overhead", or "the rest of the model"
    bytes: int
    memory: int
    drop: float | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class HardwareAdvice:
    """A prediction from data sheets: the least time of the linear layers in one format, and what limits it.

    limited_by  "memory": it does not fit; else "compute" or "bandwidth", whichever takes longer in all
    seconds     sum over the layers of the longer of both; no device can do better
    """

    hardware: str
    format: str
    fits: bool
    memory: int
    seconds: float
    limited_by: str
    meets_latency: bool | None
    runs: str
    source: str


@dataclass(frozen=True)
class Advice:
    """What advise() found. recommended: a key of `formats`, "float", or None where nothing holds what was asked.

    measured_s  of a pass of the float model here
    rest_s      of it what is not in the layers a swap takes: attention, norms, activations, by the prediction of those layers
    """

    machine: str
    threads: int
    asked: dict[str, float | None]
    measured_s: float
    rest_s: float
    layers: tuple[LayerAdvice, ...]
    formats: tuple[FormatAdvice, ...]
    hardware: tuple[HardwareAdvice, ...]
    recommended: str | None
    config: Format | None
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self) | {"config": None if self.config is None else self.config.to_dict()}
        for layer in found["layers"]:
            layer["rows"] = {str(m): count for m, count in layer["rows"].items()}
        return found

    def __str__(self) -> str:
        from .text import text

        return text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .text import tables

        yield from tables(self)


@dataclass(frozen=True)
class Called:
    """A layer that the inputs reach."""

    fqn: str
    layer: nn.Linear
    rows: Rows

    @property
    def size(self) -> tuple[int, int]:
        """(N, K)"""
        return self.layer.out_features, self.layer.in_features

    @property
    def item(self) -> int:
        return self.layer.weight.element_size()


def advise(
    model: nn.Module,
    inputs: Any,
    *,
    latency: float | None = None,
    memory: float | None = None,
    max_drop: float | None = None,
    metric: Metric | None = None,
    formats: Iterable[Format] = FORMATS,
    hardware: Iterable[Hardware] = HARDWARE,
    machine: Machine | None = None,
    progress: bool = False,
) -> Advice:
    """Says which format to swap a float model to, here, and what limits it on other hardware.

    inputs    a tensor, a tuple of arguments, a dict of keywords, or an iterable of those; one pass over them is what times are of
    latency   seconds that a pass may take
    memory    bytes that the model and its largest input and output of a layer may take
    max_drop  how far `metric` may fall, or without one: 1 - mean cosine of the model's outputs on `inputs`. It is then measured for
              each format. None: formats below 8 bits, which need calibration or training, are shown but not recommended
    metric    metric(model) -> float, higher is better
    formats   candidates; sparse ones have no prediction, as their time follows from their zeros
    machine   the limits of this machine; None: known ones, or measured now (a few seconds)
    progress  a progress bar on stderr

    The float model is timed here, briefly, with torch's threads; times of layers are predictions, which bench/target_advice.py
    compares with measurements. Other hardware is not measured: its rows are bounds from data sheets for the linear layers alone.
    Raises ValueError / TypeError, naming the argument, and RuntimeError where there is no native library to measure limits with.
    """
    for name, value in (("latency", latency), ("memory", memory)):
        if value is not None and not value > 0:
            raise ValueError(f"advise: {name} is {value}, expected a positive number, or None")
    if max_drop is not None and not max_drop >= 0:
        raise ValueError(f"advise: max_drop is {max_drop}, expected 0 or more, or None")
    if metric is not None and max_drop is None:
        raise ValueError("advise: metric is given without max_drop, the bound that it is for")
    candidates = list(formats)
    if unknown := [fmt for fmt in candidates if not isinstance(fmt, Format)]:
        raise TypeError(f"advise: formats holds {unknown[0]!r}, expected formats such as tersor.Int8Dynamic()")
    remarks = [f"{fmt!r}: no prediction, its time follows from its zeros" for fmt in candidates if not can_predict(fmt)]
    candidates = [fmt for fmt in candidates if can_predict(fmt)]
    calls = batches(inputs, "advise: inputs")
    with evaluating(model), tracking(2 + len(candidates), "advising", progress) as step:
        layers = called_layers(model, calls)
        measured_s = interleaved({"model": lambda: run_all(model, calls)}, ROUNDS, SECONDS)["model"].best
        step("limits of this machine")
        machine = machine or this_machine()
        here = Here(machine, machine.with_threads(torch.get_num_threads()), call_cost())
        step("formats")
        options: list[Format | None] = [None, *candidates]
        times = {fmt: layer_times(layers, fmt, here) for fmt in options}
        rest_s = max(0.0, measured_s - sum(t.seconds for own in times[None] for t in own))
        base = None if metric is None else float_score(model, metric, "advise")
        found = []
        for fmt in options:
            drop = None if max_drop is None else _drop(model, layers, fmt, calls, metric, base)
            found.append(_format_advice(model, layers, fmt, times[fmt], rest_s, drop, (latency, memory, max_drop)))
            step(_name(fmt))
    possible = [(advice, fmt) for advice, fmt in zip(found, options, strict=True) if not advice.reasons]
    best, config = min(possible, key=lambda pair: pair[0].seconds, default=(None, None))
    rows = [hardware_advice(model, layers, fmt, device, latency) for device in hardware for fmt in options]
    return Advice(
        f"{machine_name()}, {machine.isa}",
        here.limits.threads,
        {"latency": latency, "memory": memory, "max_drop": max_drop},
        measured_s,
        rest_s,
        tuple(_layer_advice(layers, times, config)),
        tuple(found),
        tuple(row for row in rows if row is not None),
        None if best is None else best.format,
        config,
        tuple(remarks),
    )


def called_layers(model: nn.Module, calls: list[Batch]) -> list[Called]:
    """The layers that quantize_ would swap and these inputs reach, each once. ValueError where there is none."""
    chosen = {spot.layer(): spot.fqn for spot, _ in reversed(choose(model, Rules(Int8Dynamic(), Task("advise")), None))}
    counts = rows_of_calls(model, chosen, calls)
    found = [Called(fqn, layer, counts[id(layer)]) for layer, fqn in reversed(chosen.items()) if counts[id(layer)]]
    if not found:
        raise ValueError("advise: the inputs reach no layer that could be swapped")
    return found


def fitting(fmt: Format | None, layer: Called) -> Format | None:
    """The format, or None (float) where the layer's size does not suit it."""
    if fmt is None:
        return None
    try:
        fmt.check_sizes(*layer.size)
    except ValueError:
        return None
    return fmt


def traffic_of(layers: list[Called], fmt: Format | None) -> int:
    """Bytes of weights that a pass reads: between two calls of one layer all others take their turn."""
    return sum(weight_bytes(fitting(fmt, layer), *layer.size, layer.item) for layer in layers)


def layer_times(layers: list[Called], fmt: Format | None, here: Here) -> list[list[LayerTime]]:
    """For each layer the times of its calls of a pass."""
    traffic = traffic_of(layers, fmt)
    return [
        [
            predict(fitting(fmt, layer), *layer.size, m, here, traffic, layer.item)
            for m, count in layer.rows.items()
            for _ in range(count)
        ]
        for layer in layers
    ]


def _name(fmt: Format | None) -> str:
    return "float" if fmt is None else repr(fmt)


def _drop(
    model: nn.Module, layers: list[Called], fmt: Format | None, calls: list[Batch], metric: Metric | None, base: float | None
) -> float:
    """Measured on a copy that shares all other tensors. base: what the metric gives the model as it is."""
    if fmt is None:
        return 0.0
    swaps: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        own = fitting(fmt, layer)
        if own is not None:
            swaps[layer.layer] = QuantLinear.from_linear(layer.layer, own)
    changed = exchanged(model, swaps)
    if metric is not None and base is not None:
        return base - score(changed, metric, "advise")
    return 1 - distance_between(model, changed, calls).cosine


def _format_advice(
    model: nn.Module,
    layers: list[Called],
    fmt: Format | None,
    times: list[list[LayerTime]],
    rest_s: float,
    drop: float | None,
    asked: tuple[float | None, float | None, float | None],
) -> FormatAdvice:
    latency, memory, max_drop = asked
    flat = [t for own in times for t in own]
    layers_s = sum(t.seconds for t in flat)
    parts = {"the rest of the model": rest_s}
    for t in flat:
        parts[t.bound] = parts.get(t.bound, 0.0) + t.seconds
    size = bytes_in(model, layers, fmt)
    needed = size + largest_activations(layers)
    reasons = []
    if latency is not None and rest_s + layers_s > latency:
        reasons.append(f"{(rest_s + layers_s) * 1e3:.3g} ms predicted, {latency * 1e3:.3g} allowed")
    if memory is not None and needed > memory:
        reasons.append(f"needs {needed} bytes, {memory:.0f} allowed")
    if max_drop is not None and not (drop is not None and drop <= max_drop):
        reasons.append(f"drop of {drop:.3g}, {max_drop:g} allowed")
    if max_drop is None and fmt is not None and fmt.bits < _KEPT_BITS:
        reasons.append("needs calibration or training; give max_drop to have it measured as it is")
    limited_by = max(parts, key=parts.__getitem__)
    return FormatAdvice(_name(fmt), rest_s + layers_s, layers_s, limited_by, size, needed, drop, tuple(reasons))


def _layer_advice(
    layers: list[Called], times: dict[Format | None, list[list[LayerTime]]], config: Format | None
) -> Iterable[LayerAdvice]:
    for i, layer in enumerate(layers):
        seconds = {_name(fmt): sum(t.seconds for t in own[i]) for fmt, own in times.items()}
        bound = {_name(fmt): max(times[fmt][i], key=lambda t: t.seconds).bound for fmt in dict.fromkeys((None, config))}
        n, k = layer.size
        yield LayerAdvice(layer.fqn, k, n, layer.rows, seconds, bound)


def bytes_in(model: nn.Module, layers: list[Called], fmt: Format | None) -> int:
    """Bytes of the model with its layers in the format; a weight that two layers share counts once."""
    weights = {id(layer.layer.weight): layer for layer in layers}.values()
    before = sum(weight_bytes(None, *layer.size, layer.item) for layer in weights)
    return model_bytes(model) - before + sum(weight_bytes(fitting(fmt, layer), *layer.size, layer.item) for layer in weights)


def largest_activations(layers: list[Called]) -> int:
    """Bytes of the largest input and output of one call of a layer."""
    return max(max(layer.rows) * sum(layer.size) * layer.item for layer in layers)


def hardware_advice(
    model: nn.Module, layers: list[Called], fmt: Format | None, device: Hardware, latency: float | None
) -> HardwareAdvice | None:
    """None where the data sheet has no figure for the arithmetic of the format (xor and popcount)."""
    if fmt is not None and arithmetic(fmt) == "popcount":
        return None
    compute_s = read_s = least_s = 0.0
    for layer in layers:
        own, (n, k) = fitting(fmt, layer), layer.size
        rate = device.int8_ops if own is not None and arithmetic(own) == "int8" else device.f32_ops
        stored = weight_bytes(own, n, k, layer.item)
        for m, count in layer.rows.items():
            computing = 2 * m * n * k / rate
            reading = (stored + m * (n + k) * layer.item) / device.bandwidth
            compute_s += count * computing
            read_s += count * reading
            least_s += count * max(computing, reading)
    needed = bytes_in(model, layers, fmt) + largest_activations(layers)
    fits = needed <= device.memory
    limited_by = "memory" if not fits else "compute" if compute_s >= read_s else "bandwidth"
    meets = None if latency is None or math.isnan(least_s) else fits and least_s <= latency
    return HardwareAdvice(device.name, _name(fmt), fits, needed, least_s, limited_by, meets, device.runs, device.source)
