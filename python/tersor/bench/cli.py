"""`tersor bench`: what the kernels reach on the machine at hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .timing import cap_peers, machine_name

T = TypeVar("T")


class Numbers(click.ParamType):
    """Comma-separated whole numbers above 0."""

    name = "number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,16,256", param, ctx)
        if min(numbers) < 1:
            self.fail(f"{value!r} holds a number below 1", param, ctx)
        return numbers


def output_file(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """Refused before anything is measured, not after."""
    if value is None:
        return None
    path = Path(value)
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise click.BadParameter(f"{value!r} cannot be written", ctx, param)
    return path


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure kernels on this machine, in percent of its own limits.

    Set TERSOR_ISA to measure another instruction set, e.g. TERSOR_ISA=avx2.
    """


def or_exit(f: Callable[[], T]) -> T:
    try:
        return f()
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from None


def measured_machine(fresh: bool) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    from .machine import steps, this_machine, usable_cores

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("limits of this machine", total=steps(1 if usable_cores() == 1 else 2))
        return or_exit(lambda: this_machine(fresh, on_step=lambda: progress.advance(task)))


@bench.command()
@click.option("--fresh", is_flag=True, help="Measure again, even if the limits are known.")
@click.option("--json", "as_json", is_flag=True, help="Print the limits as JSON, for programs.")
def machine(fresh: bool, as_json: bool) -> None:
    """Show what this machine can do at most: arithmetic and read bandwidth.

    Measured in a few seconds the first time, kept in the user's cache folder.
    """
    import dataclasses
    import json

    limits = measured_machine(fresh)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(limits), indent=1))
        return
    from rich.console import Console

    from .output import machine_table

    Console().print(machine_table(limits))


@bench.command()
@click.option(
    "--format", "format_name", default="int8-dynamic", show_default=True, help="Format of our layer; int4-g32: groups of 32."
)
@click.option("--m", "rows", type=Numbers(), default="1,16,256", show_default=True, help="Rows of the input.")
@click.option("--k", type=Numbers(), help="Input features. Every K is combined with every N.")
@click.option("--n", type=Numbers(), help="Output features.")
@click.option("--shapes", help="Layers of a known model: minilm, bert, smollm, llama.")
@click.option("--model", help="Layers of your own model: module:factory, a function that takes nothing and returns it.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--against", default="fp32,quantize-dynamic", show_default=True, help="Contenders; ratios are to the first. 'none': ours alone."
)
@click.option("--rounds", type=click.IntRange(3), default=7, show_default=True, help="Times each contender is measured.")
@click.option("--unrestricted", is_flag=True, help="Let oneDNN use AMX and AVX512-BF16 where this CPU has them.")
@click.option("--fresh-limits", is_flag=True, help="Measure the machine's limits again first.")
@click.option("--json", "json_path", callback=output_file, metavar="FILE", help="Write everything as JSON.")
@click.option("--csv", "csv_path", callback=output_file, metavar="FILE", help="Write the rows as CSV.")
@click.option("--plot", "plot_path", callback=output_file, metavar="FILE", help="Draw a roofline (png, svg or pdf).")
def linear(
    format_name: str,
    rows: tuple[int, ...],
    k: tuple[int, ...] | None,
    n: tuple[int, ...] | None,
    shapes: str | None,
    model: str | None,
    dtype: str,
    threads: int,
    against: str,
    rounds: int,
    unrestricted: bool,
    fresh_limits: bool,
    json_path: Path | None,
    csv_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Time linear layers: ours, the kernel alone, and others, interleaved.

    \b
    tersor bench linear --m 1,16,256 --k 4096 --n 4096
    tersor bench linear --shapes bert --threads 2 --plot roofline.png
    tersor bench linear --model my_package.models:build --against fp32

    "of limit" is the time that this machine's own limits allow for the shape (arithmetic, or reading the weights from the level of
    memory that holds them) over the time taken. Contenders: fp32, quantize-dynamic, and any format of ours as tersor-FORMAT.
    """
    # Called from a program that has torch loaded already, oneDNN has made its choice.
    cap = "oneDNN: as the calling program set it" if "torch" in sys.modules else cap_peers(unrestricted)
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from .. import __version__
    from .layers import DTYPES, SHAPES, Bench, Row, shapes_of_model
    from .our_formats import our_formats
    from .output import layers_table, plot_roofline, write_csv, write_json
    from .peers import expand

    formats = our_formats()
    if format_name not in formats:
        raise click.BadParameter(f"{format_name!r}, expected one of: {', '.join(formats)}", param_hint="--format")
    if sum(option is not None for option in (shapes, model, k or n)) > 1:
        raise click.UsageError("--shapes, --model and --k/--n exclude each other")
    if shapes is not None and shapes not in SHAPES:
        raise click.BadParameter(f"{shapes!r}, expected one of: {', '.join(SHAPES)}", param_hint="--shapes")
    if model is not None:
        layers = or_exit(lambda: shapes_of_model(model))
    else:
        layers = SHAPES[shapes] if shapes else tuple((a, b) for a in k or (4096,) for b in n or (4096,))
    names = [] if against == "none" else [name.strip() for name in against.split(",")]
    or_exit(lambda: expand(names))

    limits = measured_machine(fresh_limits)
    run = Bench(layers, rows, formats[format_name], DTYPES[dtype], threads, tuple(names), rounds)
    measured: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layers", total=len(run.cases()))
        # a shape may be too large for a format or for memory
        or_exit(lambda: measured.extend(run.run(limits, on_case=lambda: progress.advance(task))))
    facts = {
        "cpu": machine_name(),
        "isa": limits.isa,
        "threads": threads,
        "torch": torch.__version__,
        "tersor": __version__,
        "peers": cap,
        "noise": run.noise.warning(),
        "skipped": run.skipped,
    }
    title = f"{facts['cpu']}, {limits.isa}, {threads} thread(s), {dtype}, torch {torch.__version__}, {format_name}; {cap}"
    # A pipe or a file has no width of its own: wide enough for the table.
    console = Console() if sys.stdout.isatty() else Console(width=130)
    console.print(layers_table(measured, title))
    for reason in run.skipped:
        click.echo(f"skipped: {reason}")
    if facts["noise"]:
        click.echo(f"warning: {facts['noise']}", err=True)
    if json_path:
        write_json(json_path, measured, facts)
    if csv_path:
        write_csv(csv_path, measured)
    if plot_path:
        or_exit(lambda: plot_roofline(plot_path, measured, limits.with_threads(threads), title))


@bench.command()
@click.option("--m", "rows", type=Numbers(), default="1,16,64,256", show_default=True, help="Rows of the input.")
@click.option("--k", type=click.IntRange(1), default=4096, show_default=True, help="Input features.")
@click.option("--n", type=click.IntRange(1), default=4096, show_default=True, help="Output features.")
@click.option("--patterns", default="unstructured,16x4,2:4", show_default=True, help="Where the zeros are.")
@click.option("--percent", type=Numbers(), default="50,60,70,80,90,95,98", show_default=True, help="Shares of zeros.")
@click.option("--ours-only", is_flag=True, help="Leave torch's CSR and scipy out.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=5, show_default=True, help="Times each contender is measured.")
@click.option("--csv", "csv_path", callback=output_file, metavar="FILE", help="Write the rows as CSV.")
@click.option("--plot", "plot_path", callback=output_file, metavar="FILE", help="Draw speed-up over sparsity (png, svg or pdf).")
def sparse(
    rows: tuple[int, ...],
    k: int,
    n: int,
    patterns: str,
    percent: tuple[int, ...],
    ours_only: bool,
    threads: int,
    rounds: int,
    csv_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Time a layer with more and more zeros: SparseInt8 and SparseFloat against dense int8, fp32, torch's CSR and scipy.

    \b
    tersor bench sparse --m 1,64 --percent 80,90,95 --patterns unstructured,16x4

    At M = 1 times are hot: 19 calls in a row after a first one; the CSV has those after a flush of the caches beside them.
    """
    from rich.console import Console
    from rich.progress import Progress

    from .output import write_csv
    from .sparse import OTHERS, PATTERNS, SparseBench, break_even, markdown, plot

    kinds = tuple(name.strip() for name in patterns.split(","))
    if unknown := [kind for kind in kinds if kind not in PATTERNS]:
        raise click.BadParameter(f"{unknown[0]!r}, expected some of: {', '.join(PATTERNS)}", param_hint="--patterns")
    if max(percent) > 100:
        raise click.BadParameter(f"{max(percent)} is above 100", param_hint="--percent")
    others = () if ours_only else OTHERS
    run = SparseBench((k, n), rows, kinds, tuple(p / 100 for p in percent), others, threads, rounds)
    measured: list[Any] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("weights", total=len(run.cases()))
        or_exit(lambda: measured.extend(run.run(on_case=lambda: progress.advance(task))))
    title = f"{machine_name()}, {threads} thread(s), K={k}, N={n}, float32 in and out"
    click.echo(f"{title}\n\n{markdown(measured)}\n")
    for kind in kinds:
        for m in rows:
            for name, against in (("sparse int8", "int8"), ("sparse float", "fp32")):
                at = break_even(measured, kind, m, name, against)
                click.echo(f"{kind}, M={m}: {name} is faster than {against} {f'from {at:.0%} on' if at else 'nowhere here'}")
    for reason in run.skipped:
        click.echo(f"skipped: {reason}")
    if warning := run.noise.warning():
        click.echo(f"warning: {warning}", err=True)
    if csv_path:
        write_csv(csv_path, measured)
    if plot_path:
        or_exit(lambda: plot(plot_path, measured, title))


@bench.command()
@click.option("--format", "format_name", default="int8-dynamic", show_default=True, help="Format of our layer.")
@click.option("--m", "rows", type=Numbers(), default="1,16,256,4096", show_default=True, help="Rows of the input.")
@click.option("--k", type=Numbers(), default="4096", show_default=True, help="Input features. Every K is combined with every N.")
@click.option("--n", type=Numbers(), default="4096,11008", show_default=True, help="Output features.")
@click.option("--against", default="bf16,int-mm,torchao", show_default=True, help="Contenders; ratios are to the first.")
@click.option("--rounds", type=click.IntRange(3), default=7, show_default=True, help="Times each contender is measured.")
@click.option("--csv", "csv_path", callback=output_file, metavar="FILE", help="Write the rows as CSV.")
def cuda(
    format_name: str,
    rows: tuple[int, ...],
    k: tuple[int, ...],
    n: tuple[int, ...],
    against: str,
    rounds: int,
    csv_path: Path | None,
) -> None:
    """Time linear layers on a GPU: ours, cuBLAS in bfloat16, torch._int_mm and torchao, as CUDA graphs between CUDA events.

    "cold" is one call after the L2 cache was overwritten, "hot" many in a row; "of data sheet" is the time that the GPU's printed
    peaks allow for the shape over the cold time.
    """
    from rich.console import Console
    from rich.progress import Progress

    from .cuda import CudaBench, CudaRow, Gpu, markdown
    from .our_formats import our_formats
    from .output import write_csv

    formats = our_formats()
    if format_name not in formats:
        raise click.BadParameter(f"{format_name!r}, expected one of: {', '.join(formats)}", param_hint="--format")
    gpu = or_exit(Gpu)
    names = tuple(name.strip() for name in against.split(",") if name.strip() not in ("", "none"))
    run = CudaBench(tuple((a, b) for a in k for b in n), rows, formats[format_name], names, rounds)
    measured: list[CudaRow] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layers", total=len(run.cases()))
        or_exit(lambda: measured.extend(run.run(gpu, on_case=lambda: progress.advance(task))))
    click.echo(f"{gpu.name}, bfloat16 in and out, {format_name}\n\n{markdown(measured)}")
    for reason in run.skipped:
        click.echo(f"skipped: {reason}")
    if csv_path:
        write_csv(csv_path, measured)
