"""What each way of quantising costs a real language model: perplexity of SmolLM2-135M on a novel, calibrated on another.

python bench/accuracy_smollm.py [--short]

The model's weights were 4-bit (Q4_1) before transformers made them float again: figures show what int8 adds, not the original
model, and int4 figures would mean little. The lm_head, tied to the embedding, stays float.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from every_format import FLOAT, times_float
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tersor.bench.timing import cap_peers, machine_name, torch_threads

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tersor.formats import Format

WINDOW, WINDOWS, PROMPT = 512, 8, 128
CALIBRATION_BOOK = "Sense and Sensibility"
DYNAMIC, SMOOTH, SIMULATION = "Int8Dynamic", "Int8Dynamic, smooth", "Int8Dynamic simulated in torch"
STATIC, STATIC_SMOOTH = "Int8Static", "Int8Static, smooth"
MIXED, MIXED_SMOOTH = "Int8Static, down and o dynamic", "Int8Static, smooth, down and o dynamic"
NAMES = (FLOAT, SIMULATION, DYNAMIC, SMOOTH, STATIC, STATIC_SMOOTH, MIXED, MIXED_SMOOTH)


class Row(NamedTuple):
    perplexity: float
    bytes: int
    prefill: float  # times as fast as the float model, PROMPT tokens
    decode: float  # the same, one token after them


def variants(fp32: nn.Module, calibration: Tensor) -> dict[str, Callable[[], nn.Module]]:
    """The models, each made when it is asked for: there is memory for one beside the float model and the smooth ones."""
    from smollm_model import calls

    import tersor

    seen = calls(calibration)
    smooth: dict[Format, nn.Module] = {}

    def smoothed(fmt: Format) -> nn.Module:
        if fmt not in smooth:
            smooth[fmt] = tersor.smooth_(copy.deepcopy(fp32), seen, format=fmt)
        return copy.deepcopy(smooth[fmt])

    def static(model: nn.Module, config: Any) -> nn.Module:
        return tersor.quantize_(model, tersor.calibrate(model, config, seen, observer="minmax"))

    def simulated() -> nn.Module:
        from minilm_model import simulate_int8_

        model = copy.deepcopy(fp32)
        head, model.lm_head = model.lm_head, None
        simulate_int8_(model).lm_head = head
        return model

    mixed = {"_default": tersor.Int8Static(), "re:.*(down|o)_proj": tersor.Int8Dynamic()}
    return {
        FLOAT: lambda: fp32,
        SIMULATION: simulated,
        DYNAMIC: lambda: tersor.quantize_(copy.deepcopy(fp32), tersor.Int8Dynamic()),
        SMOOTH: lambda: tersor.quantize_(smoothed(tersor.Int8Dynamic()), tersor.Int8Dynamic()),
        STATIC: lambda: static(copy.deepcopy(fp32), tersor.Int8Static()),
        STATIC_SMOOTH: lambda: static(smoothed(tersor.Int8Static()), tersor.Int8Static()),
        MIXED: lambda: static(copy.deepcopy(fp32), mixed),
        MIXED_SMOOTH: lambda: static(smoothed(tersor.Int8Dynamic()), mixed),
    }


def run(windows: int = WINDOWS, names: Iterable[str] = NAMES, on_row: Callable[[str], None] | None = None) -> dict[str, Row]:
    """Rows by name. Raises MissingData or ImportError where the model or the books are absent."""
    import torch
    from smollm_model import load_chapter, load_model, perplexity

    from tersor.comparison import model_bytes

    fp32, tokenizer = load_model()
    ids = load_chapter(tokenizer, windows * WINDOW).view(windows, WINDOW)
    calibration = load_chapter(tokenizer, windows * WINDOW, CALIBRATION_BOOK).view(windows, WINDOW)
    rows = {}

    def prefill(model: nn.Module) -> Callable[[], object]:
        return partial(model, ids[:1, :PROMPT], use_cache=True, logits_to_keep=1)

    def decode(model: nn.Module) -> Callable[[], object]:
        with torch.inference_mode():
            cache = prefill(model)().past_key_values  # type: ignore[attr-defined]

        def step() -> None:
            model(ids[:1, PROMPT : PROMPT + 1], past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return step

    makers = variants(fp32, calibration)
    for name in names:
        if on_row:
            on_row(name)
        model = makers[name]()
        speed = [times_float(call(fp32), call(model)) for call in (prefill, decode)]
        rows[name] = Row(perplexity(model, ids), model_bytes(model), *speed)
    return rows


def added(rows: dict[str, Row], name: str) -> float:
    """Perplexity over that of the float model, less 1."""
    return rows[name].perplexity / rows[FLOAT].perplexity - 1


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--short", is_flag=True, help="One window and the main rows: shows that it runs, not the figures.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Threads of torch.")
def main(short: bool, threads: int) -> None:
    """Perplexity of SmolLM2-135M in each way of int8. Ten minutes or so."""
    cap_peers()
    import torch
    from minilm_model import MissingData

    windows, names = (1, (FLOAT, DYNAMIC, SMOOTH)) if short else (WINDOWS, NAMES)
    try:
        with torch_threads(threads), Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=len(names))
            rows = run(windows, names, lambda name: progress.update(task, description=name, advance=1))
    except (ImportError, MissingData) as error:
        raise click.ClickException(str(error)) from None
    table = Table(
        title=f"SmolLM2-135M (weights from Q4_1), {windows} x {WINDOW} tokens of Pride and Prejudice, {machine_name()}, "
        f"torch {torch.__version__}",
        caption=f"calibrated on {windows} x {WINDOW} tokens of {CALIBRATION_BOOK}; lm_head stays float",
    )
    for column in ("", "perplexity", "against float", "MB", f"prefill {PROMPT}, times float", "decode, times float"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        speed = ("-", "-") if name == FLOAT else (f"{row.prefill:.2f}", f"{row.decode:.2f}")
        table.add_row(name, f"{row.perplexity:.3f}", f"{added(rows, name):+.2%}", f"{row.bytes / 1e6:.0f}", *speed)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
