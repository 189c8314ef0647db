"""One trained network in every format: what the examples of bench/vision.py and bench/tabular.py share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from tersor.bench.timing import interleaved, machine_name

if TYPE_CHECKING:
    from torch import nn

    from tersor.formats import Format

FLOAT = "float32"
DYNAMIC, STATIC, GPTQ = "Int8Dynamic", "Int8Static", "Int4, GPTQ"
TERNARY, PRUNED, STUDENT = "Ternary, trained", "SparseInt8, 80 % pruned", "student, distilled, Int8Dynamic"
NAMES = (DYNAMIC, STATIC, GPTQ, TERNARY, PRUNED, STUDENT)
BATCHES = (1, 256)


class Example(NamedTuple):
    """base is trained; `train` trains a model in place for so many steps and calls what it is given after each."""

    base: nn.Module
    train: Callable[[nn.Module, int, Callable[[], Any]], None]
    distill: Callable[[nn.Module, int], nn.Module]  # a student of base
    shrink: dict[str, Any]  # how tersor.shrink makes it
    seen: list[Any]  # calls of the model for calibration
    steps: int  # of training a format
    int4: Format
    kept: tuple[str, ...]  # names of the layers that few bits leave at int8, unpruned: the last one, and a first one


def makers(example: Example) -> dict[str, Callable[[], nn.Module]]:
    """How each of NAMES is made."""
    import tersor
    from tersor import train as qat

    base, steps = example.base, example.steps
    int8 = tersor.Int8Dynamic()
    kept = dict.fromkeys(example.kept, int8)

    def ternary() -> nn.Module:
        model = qat.qat_(copy.deepcopy(base), {"_default": tersor.Ternary(), **kept})
        example.train(model, steps, lambda: None)
        return qat.convert_(model)

    def pruned() -> nn.Module:
        model = copy.deepcopy(base)
        schedule = tersor.CubicSchedule(end=max(1, steps // 2), every=max(1, steps // 20))
        config = {"_default": tersor.Unstructured(0.8), **dict.fromkeys(example.kept)}
        pruner = tersor.prune_(model, config, schedule=schedule)
        example.train(model, steps, pruner.step)
        return tersor.quantize_(tersor.finalize_(model), {"_default": tersor.SparseInt8(), **kept})

    def student() -> nn.Module:
        model = tersor.shrink(base, inputs=example.seen, **example.shrink)
        return tersor.quantize_(example.distill(model, steps).eval(), int8)

    return {
        DYNAMIC: lambda: tersor.quantize_(copy.deepcopy(base), int8),
        STATIC: lambda: tersor.quantize_(copy.deepcopy(base), tersor.calibrate(base, tersor.Int8Static(), example.seen)),
        GPTQ: lambda: tersor.gptq_(copy.deepcopy(base), {"_default": example.int4, **kept}, example.seen),
        TERNARY: ternary,
        PRUNED: pruned,
        STUDENT: student,
    }


def models(example: Example, on_row: Callable[[str], None]) -> dict[str, nn.Module]:
    """FLOAT and NAMES, ready for inference."""
    found = {FLOAT: example.base}
    for name, make in makers(example).items():
        on_row(name)
        found[name] = make().eval()
    return found


def times_float(float_call: Callable[[], object], call: Callable[[], object], rounds: int = 5) -> float:
    """How many times as fast as the float model's, interleaved, in inference mode."""
    import torch

    with torch.inference_mode():
        times = interleaved({FLOAT: float_call, "other": call}, rounds, 0.05)
    return times[FLOAT].best / times["other"].best


def table(
    title: str, metric: str, unit: str, figures: dict[str, float], found: dict[str, nn.Module], inputs: tuple[Any, ...], rounds: int
) -> Table:
    """metric, bytes and speed of each; inputs: of at least max(BATCHES) rows. A figure without a model stands alone."""
    import torch

    from tersor.comparison import model_bytes

    times = {}
    with torch.inference_mode():
        for batch in BATCHES:
            x = tuple(t[:batch] for t in inputs)
            times[batch] = interleaved({name: partial(model, *x) for name, model in found.items()}, rounds, 0.05)
    out = Table(title=f"{title}, {machine_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    for column in ("", metric, "kB", *(f"{unit}/s, batch {batch}" for batch in BATCHES), "times float32"):
        out.add_column(column, justify="right" if column else "left")
    for name, figure in figures.items():
        cells = ["-"] * (len(BATCHES) + 2)
        if name in found:
            speeds = [times[batch][name].best for batch in BATCHES]
            against = " / ".join(f"{times[batch][FLOAT].best / times[batch][name].best:.2f}" for batch in BATCHES)
            cells = [
                f"{model_bytes(found[name]) / 1e3:,.0f}",
                *(f"{batch / s:,.0f}" for batch, s in zip(BATCHES, speeds, strict=True)),
                against,
            ]
        out.add_row(name, f"{figure:.2f}", *cells)
    return out
