"""`sensitivity()`: what one layer in one format alone does to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..calibration import Batch, batches, evaluating
from ..comparison import Distance, exchanged
from ..nn import QuantLinear
from ..progress import tracking
from ..reporting.measure import Metric, float_score, score
from ..reporting.pages import markdown_table
from ..selection import Filter
from ..swap import Config
from .candidates import Memory, Unit, key_of, units_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class LayerDamage:
    """fqn in `format`, all other layers float. damage: see Sensitivity.measure; bytes: of the packed layer."""

    fqn: str
    format: str
    damage: float
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """What sensitivity() found, in the order of the model.

    measure  what `damage` counts: "metric" (how far it falls), "loss" (how far it rises), or "output" (squared error at the
             model's output over its squared norm)
    """

    measure: str
    rows: tuple[LayerDamage, ...]
    remarks: tuple[str, ...]

    def worst(self) -> list[LayerDamage]:
        """The rows, the greatest damage first."""
        return sorted(self.rows, key=lambda row: -row.damage)

    def to_dict(self) -> dict[str, Any]:
        return {"measure": self.measure, "rows": [asdict(row) for row in self.rows], "remarks": list(self.remarks)}

    def _cells(self) -> list[tuple[str, ...]]:
        return [(row.fqn, row.format, f"{row.damage:.4g}", str(row.bytes)) for row in self.worst()]

    def to_markdown(self) -> str:
        """The greatest damage first."""
        return markdown_table(("layer", "format", f"damage ({self.measure})", "bytes"), self._cells(), left=2) + "\n"

    def __str__(self) -> str:
        return self.to_markdown()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape
        from rich.table import Table

        table = Table("layer", "format", f"damage ({self.measure})", "bytes")
        for cells in self._cells():
            table.add_row(*map(escape, cells))
        yield table


def sensitivity(
    model: nn.Module,
    formats: Config | Iterable[Config],
    inputs: Any,
    metric: Metric | None = None,
    *,
    loss: Loss | None = None,
    filter_fn: Filter | None = None,
    path: str | Path | None = None,
    progress: bool = False,
) -> Sensitivity:
    """The damage that each layer does alone in each format, everything else staying float. The model is not changed.

    formats    a format or several; in the place of one also a config of quantize_, a dict, where it differs by layer
    inputs     a tensor, a tuple of arguments, a dict of keywords, or an iterable of those; with loss: an iterable of pairs
               (inputs, target)
    metric     metric(model) -> float, higher is better; called once for each layer and format
    loss       loss(output, target) -> a number, lower is better; its mean over the pairs counts
               Neither: the squared error at the model's output over `inputs` counts, relative to the output's squared norm
    filter_fn  as in quantize_
    path       a JSON file: what is known there is not measured again, what is measured is added
    progress   a progress bar on stderr

    Raises ValueError / TypeError, naming the argument. Formats that do not fit a layer's size are left out for it, and named in
    `remarks`.
    """
    if metric is not None and loss is not None:
        raise ValueError("sensitivity: metric and loss exclude each other")
    units, remarks = units_of(model, formats, filter_fn, "sensitivity")
    measure = "metric" if metric else "loss" if loss else "output"
    memory = Memory.open(path, "sensitivity", units, measure)
    with evaluating(model):
        judge = _judge(model, inputs, metric, loss)
        damages = measured_damage(model, units, judge, memory, progress)
    rows = tuple(
        LayerDamage(unit.names[0], key, *damages[i, key]) for i, unit in enumerate(units) for key in map(key_of, unit.formats)
    )
    return Sensitivity(measure, rows, tuple(remarks))


Judge = Callable[[nn.Module], float]  # a changed model -> its damage


def measured_damage(
    model: nn.Module, units: list[Unit], judge: Judge, memory: Memory, progress: bool
) -> dict[tuple[int, str], tuple[float, int]]:
    """(damage, bytes) of each unit, by its index, in each of its formats."""
    from ..bench.layers import stored_bytes

    found: dict[tuple[int, str], tuple[float, int]] = {}
    with tracking(sum(len(unit.formats) for unit in units), "sensitivity", progress) as step:
        for i, unit in enumerate(units):
            for fmt in unit.formats:
                key = key_of(fmt)
                known = memory.get("damage", unit.names[0], key)
                if known is None:
                    layer = QuantLinear.from_linear(unit.layer, fmt)
                    known = [judge(exchanged(model, {unit.layer: layer})), stored_bytes(layer)]
                    memory.put(known, "damage", unit.names[0], key)
                found[i, key] = float(known[0]), int(known[1])
                step(unit.names[0])
    return found


def _judge(model: nn.Module, inputs: Any, metric: Metric | None, loss: Loss | None) -> Judge:
    if metric is not None:
        before = float_score(model, metric, "sensitivity")
        return lambda changed: before - score(changed, metric, "sensitivity")
    if loss is not None:
        pairs = _pairs(inputs)
        before = mean_loss(model, pairs, loss)
        return lambda changed: mean_loss(changed, pairs, loss) - before
    return output_judge(model, batches(inputs, "sensitivity: inputs"))


def output_judge(model: nn.Module, calls: list[Batch]) -> Judge:
    """Squared error over squared norm, of all that the model returns. The model's own outputs are kept."""
    wanted = [model(*args, **kwargs) for args, kwargs in calls]

    def judge(changed: nn.Module) -> float:
        distance = Distance()
        for want, (args, kwargs) in zip(wanted, calls, strict=True):
            distance.add(want, changed(*args, **kwargs))
        return distance.noise / distance.signal if distance.signal else distance.noise

    return judge


def _pairs(inputs: Any) -> list[tuple[Batch, Any]]:
    pairs = list(inputs) if isinstance(inputs, Iterable) and not isinstance(inputs, Tensor | Mapping) else []
    if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise TypeError("sensitivity: with loss, inputs must be an iterable of pairs (inputs, target)")
    return [(batches(given, "sensitivity: inputs")[0], target) for given, target in pairs]


def mean_loss(model: nn.Module, pairs: list[tuple[Batch, Any]], loss: Loss) -> float:
    return sum(float(loss(model(*args, **kwargs), target)) for (args, kwargs), target in pairs) / len(pairs)
