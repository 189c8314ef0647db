"""`search()`: the fastest mix of formats that keeps a metric."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..bench.timing import Timing, interleaved
from ..calibration import Batch, batches, evaluating
from ..choice import Choice, Rows, rows_of_calls
from ..comparison import exchanged, model_bytes
from ..formats import Format
from ..progress import tracking
from ..reporting.measure import SECONDS, Metric, float_score, run_all, score
from ..reporting.pages import markdown_table
from ..selection import Filter
from ..swap import Config
from .candidates import Memory, Packed, Unit, key_of, units_of
from .damage import measured_damage, output_judge

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

EXACT = 64  # mixes up to which all are tried in the order of their speed
FINALISTS = 3  # mixes within the bound whose whole models are timed

Mix = tuple[int, ...]  # for each unit the index of its format; 0: float


@dataclass(frozen=True)
class Trial:
    """One mix of formats as a whole model.

    layers_s  seconds of its layers in a pass over the inputs, from the speed of each alone
    drop      metric of the float model - that of this one
    seconds   of the whole model, interleaved with the others that have one; None: not timed
    """

    name: str
    layers_s: float
    metric: float
    drop: float
    bytes: int
    seconds: Timing | None
    chosen: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "seconds": None if self.seconds is None else self.seconds._asdict()}


class Search(dict[str, "Format | None"]):
    """The config that search() found, for quantize_; and the table that shows why.

    trials   all mixes whose metric was measured: float, each format for all layers, and those on the way; chosen: this one
    exact    whether every faster mix was tried; else a greedy path was followed
    thorough every mix of that path was tried which is faster than the one found, and by its layers at least so many times as fast
             as the fastest: as given to search(), 0 if exact
    remarks  formats that do not fit some layer
    """

    def __init__(
        self,
        config: dict[str, Format | None],
        trials: Sequence[Trial],
        max_drop: float,
        exact: bool,
        thorough: float,
        remarks: Sequence[str],
    ) -> None:
        super().__init__(config)
        self.trials, self.max_drop, self.exact, self.thorough = tuple(trials), max_drop, exact, thorough
        self.remarks = tuple(remarks)

    @property
    def chosen(self) -> Trial:
        return next(trial for trial in self.trials if trial.chosen)

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": {fqn: None if fmt is None else fmt.to_dict() for fqn, fmt in self.items()},
            "max_drop": self.max_drop,
            "exact": self.exact,
            "thorough": self.thorough,
            "trials": [trial.to_dict() for trial in self.trials],
            "remarks": list(self.remarks),
        }

    _COLUMNS = ("mix", "whole model, ms", "x float", "its layers, ms", "metric", "drop", "MB", "")

    def _cells(self) -> list[tuple[str, ...]]:
        timed = {trial.name: trial.seconds for trial in self.trials if trial.seconds}
        base = timed.get("float")
        return [
            (
                trial.name,
                f"{trial.seconds.best * 1e3:.3f}" if trial.seconds else "",
                f"{base.best / trial.seconds.best:.2f}" if base and trial.seconds else "",
                f"{trial.layers_s * 1e3:.3f}",
                f"{trial.metric:.6g}",
                f"{trial.drop:+.4g}",
                f"{trial.bytes / 1e6:.2f}",
                "chosen" if trial.chosen else "" if trial.drop <= self.max_drop else "drops too far",
            )
            for trial in self.trials
        ]

    def to_markdown(self) -> str:
        return markdown_table(self._COLUMNS, self._cells()) + "\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"search, drop of at most {self.max_drop:g}")
        for column in self._COLUMNS:
            table.add_column(column, justify="left" if column in ("mix", "") else "right")
        for cells in self._cells():
            table.add_row(*map(escape, cells))
        yield table


def search(
    model: nn.Module,
    formats: Config | Iterable[Config],
    inputs: Any,
    *,
    max_drop: float,
    metric: Metric,
    damage_inputs: Any = None,
    filter_fn: Filter | None = None,
    thorough: float = 1.0,
    path: str | Path | None = None,
    rounds: int = 7,
    progress: bool = False,
) -> Search:
    """The config for quantize_ that is fastest on `inputs` while metric(model) falls by no more than max_drop.

        config = tersor.search(model, [tersor.Int8Dynamic(), tersor.Int4(32)], batch, max_drop=0.005, metric=accuracy)
        tersor.quantize_(model, config)

    formats   as in sensitivity(); float is always a candidate
    inputs    what the speed is for: a tensor, a tuple, a dict, or an iterable of those
    damage_inputs
              what the damage of each layer alone is measured on: more than one token of a text, say; None: inputs
    max_drop  in units of the metric, 0 or more
    metric    metric(model) -> float, higher is better; called some ten times
    thorough  0.9, say: of a path (see below) every mix is tried whose layers are at least 0.9 times as fast as the fastest mix's,
              so that the table shows whether one holds. A metric with noise has such that bisection passes by. 1: bisection alone;
              0: all that are faster than the one it finds, at worst as many calls of the metric as there are layers and formats
    path      a JSON file: a search that was stopped goes on from it
    rounds    how often each whole model is timed
    progress  progress bars on stderr

    Each layer is timed in each format, and the damage it does alone is the squared error at the model's output. Up to 64 mixes are
    all tried in the order of their speed. Beyond, a path leads from the fastest mix to float, each step the one that undoes most
    damage for its time, and bisection finds the fastest point of it that keeps the metric. The best mixes found are then timed as
    whole models. Layers that the inputs do not reach stay float. The model is not changed: those tried are copies that share its
    tensors.
    """
    if not callable(metric):
        raise TypeError(f"search: metric is {type(metric).__name__}, expected a function metric(model) -> float")
    if not max_drop >= 0:
        raise ValueError(f"search: max_drop is {max_drop}, expected 0 or more, in units of the metric")
    if not 0 <= thorough <= 1:
        raise ValueError(f"search: thorough is {thorough}, expected a number from 0 to 1")
    calls = batches(inputs, "search: inputs")
    units, remarks = units_of(model, formats, filter_fn, "search")
    with evaluating(model):
        counts = rows_of_calls(model, [unit.layer for unit in units], calls)
        units = [unit for unit in units if counts[id(unit.layer)]]
        if not units:
            raise ValueError("search: the inputs reach no layer that could be swapped")
        memory = Memory.open(path, "search", units, repr([sorted(counts[id(unit.layer)].items()) for unit in units]))
        run = _Run(model, units, metric, memory)
        judged_on = calls if damage_inputs is None else batches(damage_inputs, "search: damage_inputs")
        run.measure_layers([counts[id(unit.layer)] for unit in units], judged_on, progress)
        exact = math.prod(len(unit.formats) + 1 for unit in units) <= EXACT
        run.walk(max_drop, exact, thorough, progress)
        return run.result(calls, max_drop, exact, 0.0 if exact else thorough, remarks, rounds, progress)


class _Run:
    """One search: what is known of the layers, and the mixes tried."""

    def __init__(self, model: nn.Module, units: list[Unit], metric: Metric, memory: Memory) -> None:
        self.model, self.units, self.metric, self.memory = model, units, metric, memory
        self.options: list[tuple[Format | None, ...]] = [(None, *unit.formats) for unit in units]
        self.packed = Packed()
        self.seconds: list[list[float]] = []  # of each option of each unit
        self.damage: list[list[float]] = []
        self.metrics: dict[Mix, float] = {}

    def measure_layers(self, rows: list[Rows], calls: list[Batch], progress: bool) -> None:
        found = measured_damage(self.model, self.units, output_judge(self.model, calls), self.memory, progress)
        self.damage = [[0.0, *(found[i, key_of(fmt)][0] for fmt in unit.formats)] for i, unit in enumerate(self.units)]
        choice = Choice()
        with tracking(len(self.units), "layer speed", progress) as step:
            for unit, own in zip(self.units, rows, strict=True):
                known = self.memory.get("seconds", unit.names[0])
                if known is None:
                    known = _seconds(choice, unit, own)
                    self.memory.put(known, "seconds", unit.names[0])
                self.seconds.append([float(s) for s in known])
                step("layer speed")

    def layers_s(self, mix: Mix) -> float:
        return sum(seconds[i] for seconds, i in zip(self.seconds, mix, strict=True))

    def changed(self, mix: Mix) -> nn.Module:
        """A copy of the model with the layers of the mix."""
        layers: dict[nn.Module, nn.Module] = {}
        for unit, options, i in zip(self.units, self.options, mix, strict=True):
            fmt = options[i]
            if fmt is not None:
                layers[unit.layer] = self.packed.layer(unit, fmt)
        return exchanged(self.model, layers)

    def score(self, mix: Mix) -> float:
        if mix not in self.metrics:
            key = " ".join(map(str, mix))
            known = self.memory.get("metric", key)
            if known is None:
                measured = float_score if mix == self.floats else score
                known = measured(self.changed(mix), self.metric, "search")
                self.memory.put(known, "metric", key)
            self.metrics[mix] = float(known)
        return self.metrics[mix]

    @property
    def floats(self) -> Mix:
        return (0,) * len(self.units)

    def uniform(self) -> dict[str, Mix]:
        """Each format for all layers that can have it."""
        keys = dict.fromkeys(key_of(fmt) for unit in self.units for fmt in unit.formats)
        named = {}
        for key in keys:
            indices = [{key_of(f): i for i, f in enumerate(options)}.get(key, 0) for options in self.options]
            named[f"all {key}"] = tuple(indices)
        return named

    def walk(self, max_drop: float, exact: bool, thorough: float, progress: bool) -> None:
        """Measures the metric of mixes until the fastest that keeps it is known."""
        if exact:
            path = sorted(itertools.product(*(range(len(options)) for options in self.options)), key=self.layers_s)
        else:
            path = frontier(self.seconds, self.damage)
        limit = self.layers_s(path[0]) / thorough if thorough else math.inf
        near = [i for i, mix in enumerate(path) if i and self.layers_s(mix) <= limit] if thorough < 1 else []
        most = len(path) if exact else math.ceil(math.log2(len(path) + 1)) + 1 + len(near)
        with tracking(1 + len(self.uniform()) + most, "metric", progress) as step:
            floor = self.score(self.floats) - max_drop
            step("metric")
            for mix in self.uniform().values():
                self.score(mix)
                step("metric")
            if exact:
                for mix in path:
                    step("metric")
                    if self.score(mix) >= floor:
                        return
            step("metric")
            if self.score(path[0]) >= floor:
                return
            low, high = 1, len(path) - 1  # the last one is the float model, which drops nothing
            while low < high:
                middle = (low + high) // 2
                if self.score(path[middle]) >= floor:
                    high = middle
                else:
                    low = middle + 1
                step("metric")
            for i in near:
                if i < low:
                    self.score(path[i])
                step("metric")

    def result(
        self, calls: list[Batch], max_drop: float, exact: bool, thorough: float, remarks: list[str], rounds: int, progress: bool
    ) -> Search:
        names = {self.floats: "float"} | {mix: name for name, mix in self.uniform().items()}
        base = self.metrics[self.floats]
        within = sorted((mix for mix, value in self.metrics.items() if base - value <= max_drop), key=self.layers_s)
        timed = dict.fromkeys([self.floats, *self.uniform().values(), *within[:FINALISTS]])
        models = {mix: self.changed(mix) for mix in self.metrics}
        with tracking(rounds, "whole models", progress) as step:
            contenders = {str(mix): lambda model=models[mix]: run_all(model, calls) for mix in timed}
            seconds = interleaved(contenders, rounds, SECONDS, on_round=lambda: step("whole models"))
        best = min((mix for mix in within if mix in timed), key=lambda mix: seconds[str(mix)].best)
        trials = [
            Trial(
                names.get(mix, "mix " + self.summary(mix)),
                self.layers_s(mix),
                self.metrics[mix],
                base - self.metrics[mix],
                model_bytes(models[mix]),
                seconds.get(str(mix)),
                mix == best,
            )
            for mix in sorted(self.metrics, key=self.layers_s)
        ]
        config = {name: options[i] for unit, options, i in zip(self.units, self.options, best, strict=True) for name in unit.names}
        return Search({"_default": None, **config}, trials, max_drop, exact, thorough, remarks)

    def summary(self, mix: Mix) -> str:
        """How many layers have which format."""
        keys = [key_of(options[i]) for options, i in zip(self.options, mix, strict=True)]
        return ", ".join(f"{keys.count(key)} {key}" for key in dict.fromkeys(keys))


def _seconds(choice: Choice, unit: Unit, rows: Rows) -> list[float]:
    """Of all its calls of a pass: float, then each format."""
    m = tuple(sorted(rows))
    times = [choice.times(unit.layer, fmt, m) for fmt in unit.formats]
    # Each format raced the float layer; the float layer's own time is the best of those races.
    floats = sum(min(t[k][0] for t in times) * rows[k] for k in m)
    return [floats, *(sum(t[k][1] * rows[k] for k in m) for t in times)]


def frontier(seconds: Sequence[Sequence[float]], damage: Sequence[Sequence[float]]) -> list[Mix]:
    """Mixes from the fastest to float: each step changes one layer, to the option that undoes most damage for its time. Index 0 of
    a layer's options is float, without damage. Greedy multiple-choice knapsack: Sinha and Zoltners, Oper. Res. 27 (1979)."""
    mix = [min(range(len(own)), key=lambda i, own=own: (own[i], i)) for own in seconds]  # type: ignore[misc]
    path = [tuple(mix)]
    while True:
        best: tuple[float, int, int] | None = None
        for layer, now in enumerate(mix):
            for option, time in enumerate(seconds[layer]):
                undone = damage[layer][now] - damage[layer][option]
                if undone > 0:
                    cost = max(time - seconds[layer][now], 0.0)
                    rate = undone / cost if cost else math.inf
                    if best is None or rate > best[0]:
                        best = rate, layer, option
        if best is None:
            break
        mix[best[1]] = best[2]
        path.append(tuple(mix))
    floats = (0,) * len(mix)
    return path if path[-1] == floats else [*path, floats]
