"""`report()`: everything is measured here; pages.py shows it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..bench.timing import Timing, interleaved, machine_name
from ..calibration import Batch, batches, evaluating, watched
from ..choice import Rows, race, rows_of_calls
from ..comparison import Distance, Layer, exchanged, linear_layers, model_bytes
from ..nn import QuantLinear
from ..progress import tracking

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Metric = Callable[[nn.Module], float]
SECONDS = 0.05  # a model's turn in a round: long against a scheduler tick, short against a change of the CPU's frequency


@dataclass(frozen=True)
class LayerRow:
    """One layer of the model against its counterpart in the other.

    rows         {M: calls with M rows} of one pass over the inputs
    before, after
                 seconds of all these calls: each layer by itself, hot, as `tersor bench linear` measures it
    sqnr_db      of its output, on what the model gives the layer
    error_share  of the error at the model's output: squared error with this layer alone exchanged, over the sum of that of all
    """

    fqn: str
    format: str
    k: int
    n: int
    rows: Rows
    before: Timing
    after: Timing
    sqnr_db: float
    error_share: float
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Time before / time after."""
        return self.before.best / self.after.best

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.fqn,
            "format": self.format,
            "K": self.k,
            "N": self.n,
            "rows": {str(m): count for m, count in self.rows.items()},
            "seconds": {"model": self.before._asdict(), "other": self.after._asdict()},
            "ratio": self.ratio,
            "sqnr_db": finite(self.sqnr_db),
            "error_share": finite(self.error_share),
            "bytes": {"model": self.bytes_before, "other": self.bytes_after},
        }


@dataclass(frozen=True)
class Report:
    """What report() found; tuples hold the value of the model and of the other.

    seconds     of one pass over the inputs, interleaved
    peak_bytes  parameters and buffers, and the most that torch held beside them during a pass
    metric      None: none was given
    cosine      of the outputs, mean over their rows
    sqnr_db     of the other's output: 10 log10(signal / error)
    layers      empty where no layer has a counterpart, or with per_layer=False
    uncalled    layers that these inputs do not reach
    """

    facts: dict[str, Any]
    seconds: tuple[Timing, Timing]
    peak_bytes: tuple[int, int]
    model_bytes: tuple[int, int]
    metric: tuple[float, float] | None
    cosine: float
    sqnr_db: float
    layers: tuple[LayerRow, ...] = ()
    uncalled: tuple[str, ...] = field(default=())

    @property
    def ratio(self) -> float:
        """Time of the model / time of the other."""
        return self.seconds[0].best / self.seconds[1].best

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; what is not a finite number is None."""

        def both(pair: tuple[Any, Any]) -> dict[str, Any]:
            return {"model": pair[0], "other": pair[1]}

        return {
            **self.facts,
            "seconds": both((self.seconds[0]._asdict(), self.seconds[1]._asdict())),
            "ratio": self.ratio,
            "peak_bytes": both(self.peak_bytes),
            "model_bytes": both(self.model_bytes),
            "metric": both((finite(self.metric[0]), finite(self.metric[1]))) if self.metric else None,
            "cosine": finite(self.cosine),
            "sqnr_db": finite(self.sqnr_db),
            "layers": [row.to_dict() for row in self.layers],
            "uncalled": list(self.uncalled),
        }

    def to_markdown(self) -> str:
        from .pages import markdown

        return markdown(self)

    def to_html(self) -> str:
        """One page that holds its plots and needs no other file; everything is escaped, and it runs no script."""
        from .pages import html

        return html(self)

    def plot(self, path: str | Path | None = None) -> str:
        """An SVG of the layers: times the speed, SQNR, and share of the error. Written to `path` too, where one is given."""
        from .svg import layer_charts

        svg = layer_charts(self.layers)
        if path is not None:
            Path(path).write_text(svg, encoding="utf-8")
        return svg

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .pages import tables

        yield from tables(self)

    def __str__(self) -> str:
        return self.to_markdown()


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report(
    model: nn.Module,
    other: nn.Module,
    inputs: Any,
    metric: Metric | None = None,
    *,
    per_layer: bool = True,
    rounds: int = 7,
    progress: bool = False,
) -> Report:
    """Compares `other`, a swapped, pruned or smaller form of `model`, with it. Neither is changed.

    inputs     a tensor, a tuple of arguments, a dict of keywords, or an iterable of those: one pass over all of them is what is
               timed, and what cosine and SQNR are taken over
    metric     metric(model) -> float, higher is better; called once for each
    per_layer  also each nn.Linear or QuantLinear that `other` has otherwise under the same name. It costs one more forward pass a
               layer, and two timings for each distinct shape.
    rounds     how often each is timed
    progress   a progress bar on stderr

    Raises TypeError / ValueError, naming the argument; also where the outputs of the two do not correspond.
    """
    for name, value in (("model", model), ("other", other)):
        if not isinstance(value, nn.Module):
            raise TypeError(f"report: {name} is {type(value).__name__}, expected an nn.Module")
    if metric is not None and not callable(metric):
        raise TypeError(f"report: metric is {type(metric).__name__}, expected a function metric(model) -> float")
    if rounds < 1:
        raise ValueError(f"report: rounds is {rounds}, expected 1 or more")
    calls = batches(inputs, "report: inputs")
    pairs = _pairs(model, other) if per_layer else {}
    with (
        evaluating(model),
        evaluating(other),
        tracking(rounds + 1 + (2 if metric else 0) + len(pairs), "comparing", progress) as step,
    ):
        outputs = distance_between(model, other, calls)
        step("timing")
        contenders = {"model": lambda: run_all(model, calls), "other": lambda: run_all(other, calls)}
        seconds = interleaved(contenders, rounds, SECONDS, on_round=lambda: step("timing"))
        scores = None
        if metric is not None:
            scores = score(model, metric, "report"), score(other, metric, "report")
            step("metric")
            step("metric")
        rows, uncalled = _layer_rows(model, pairs, calls, step)
    return Report(
        _facts(model, other, len(calls), rounds),
        (seconds["model"], seconds["other"]),
        (peak_bytes(model, calls), peak_bytes(other, calls)),
        (model_bytes(model), model_bytes(other)),
        scores,
        outputs.cosine,
        outputs.sqnr_db,
        rows,
        uncalled,
    )


def run_all(model: nn.Module, calls: list[Batch]) -> None:
    for args, kwargs in calls:
        model(*args, **kwargs)


def score(model: nn.Module, metric: Metric, function: str) -> float:
    """metric(model), or TypeError where that is no number."""
    value = metric(model)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: metric(model) gave {type(value).__name__}, expected a number, higher is better") from None


def float_score(model: nn.Module, metric: Metric, function: str) -> float:
    """score() of the model as it is, against which others are held; ValueError where nothing can be."""
    value = score(model, metric, function)
    if not math.isfinite(value):
        raise ValueError(f"{function}: metric(model) is {value} for the model as it is, expected a finite number, higher is better")
    return value


def peak_bytes(model: nn.Module, calls: list[Batch]) -> int:
    """The model, and the most that its calls held at once beside it: everything that comes from torch's allocators (scratch of our
    kernels, at most 4 MiB a thread, does not)."""
    held = model_bytes(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            run_all(model, calls)
            return held + torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run_all(model, calls)
        changes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        return held + max(itertools.accumulate(changes), default=0)


def _facts(model: nn.Module, other: nn.Module, calls: int, rounds: int) -> dict[str, Any]:
    from .. import __version__, native

    info = native.cpu_info()
    return {
        "machine": machine_name(),
        "isa": info["kernels"].get("gemm_w8", "none") if info else "none: plain torch references, slow",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tersor": __version__,
        "model": type(model).__name__,
        "other": type(other).__name__,
        "calls": calls,
        "rounds": rounds,
    }


def _pairs(model: nn.Module, other: nn.Module) -> dict[str, tuple[Layer, Layer]]:
    """The layers that both models have under one name and in one size, where they are not the same."""
    found, others = {}, linear_layers(other)
    for fqn, layer in linear_layers(model).items():
        counterpart = others.get(fqn)
        if counterpart is None or counterpart is layer:
            continue
        if (layer.in_features, layer.out_features) != (counterpart.in_features, counterpart.out_features):
            continue
        if isinstance(layer, nn.Linear) and isinstance(counterpart, nn.Linear) and torch.equal(layer.weight, counterpart.weight):
            continue
        found[fqn] = layer, counterpart
    return found


def _layer_rows(
    model: nn.Module, pairs: dict[str, tuple[Layer, Layer]], calls: list[Batch], step: Callable[[str], None]
) -> tuple[tuple[LayerRow, ...], tuple[str, ...]]:
    if not pairs:
        return (), ()
    counts = rows_of_calls(model, [layer for layer, _ in pairs.values()], calls)
    called = {fqn: pair for fqn, pair in pairs.items() if counts[id(pair[0])]}
    distances = own_distances(model, called, calls)
    errors = {}
    for fqn, (layer, counterpart) in called.items():
        errors[fqn] = distance_between(model, exchanged(model, {layer: counterpart}), calls).noise
        step("layers")
    total = sum(errors.values())
    known: dict[Any, tuple[Timing, Timing]] = {}
    rows = []
    for fqn, (layer, other) in called.items():
        before, after = Timing(0, 0), Timing(0, 0)
        for m, count in counts[id(layer)].items():
            key = (_kind(layer), _kind(other), m)
            if key not in known:
                known[key] = race(layer, other, m)
            before, after = _plus(before, known[key][0], count), _plus(after, known[key][1], count)
        rows.append(
            LayerRow(
                fqn,
                repr(other.format) if isinstance(other, QuantLinear) else "float",
                layer.in_features,
                layer.out_features,
                counts[id(layer)],
                before,
                after,
                distances[fqn].sqnr_db,
                errors[fqn] / total if total else 0.0,
                model_bytes(layer),
                model_bytes(other),
            )
        )
    return tuple(rows), tuple(pairs.keys() - called.keys())


def own_distances(model: nn.Module, pairs: dict[str, tuple[Layer, Layer]], calls: list[Batch]) -> dict[str, Distance]:
    """The distance of each layer's output from its counterpart's, both on what the model gives the layer."""
    found = {fqn: Distance() for fqn in pairs}
    names = {layer: fqn for fqn, (layer, _) in pairs.items()}

    def see(layer: nn.Module, x: Tensor) -> None:
        first, second = pairs[names[layer]]  # type: ignore[index]
        found[names[layer]].add(first.forward(x), second(x))  # type: ignore[index]

    with watched(names, see):
        run_all(model, calls)
    return found


def distance_between(model: nn.Module, other: nn.Module, calls: list[Batch]) -> Distance:
    """The distance of the other's outputs from the model's."""
    found = Distance()
    for args, kwargs in calls:
        found.add(model(*args, **kwargs), other(*args, **kwargs))
    return found


def _kind(layer: Layer) -> Any:
    """Layers of one kind take one time; that of zeros follows from the values."""
    if isinstance(layer, QuantLinear) and not layer.format.by_rows:
        return id(layer)
    fmt = layer.format if isinstance(layer, QuantLinear) else None
    return layer.in_features, layer.out_features, layer.weight.dtype, layer.bias is None, fmt


def _plus(total: Timing, one: Timing, count: int) -> Timing:
    return Timing(total.best + count * one.best, total.median + count * one.median)
