"""Our layers against fp32 where everyone is held at AVX2: the machine of somebody without AVX-512.

python bench/avx2.py [--quick] [--json]
"""

from __future__ import annotations

import json
import os

HELD = {
    "TERSOR_ISA": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
os.environ.update(HELD)  # read when the libraries are loaded

import click  # noqa: E402
import compare  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from tersor.bench.layers import KERNEL, OURS, Bench, Row  # noqa: E402
from tersor.bench.machine import this_machine  # noqa: E402
from tersor.bench.our_formats import our_formats  # noqa: E402
from tersor.bench.timing import machine_name  # noqa: E402

FEW_BITS = ("int4", "int4-g128", "int4-g32", "ternary", "binary", "binary-xnor")
LARGE = tuple((k, n) for k, n in compare.SHAPES if k * n >= 768 * 3072)


def int8_bench(quick: bool) -> Bench:
    return Bench(compare.SHAPES[:2] if quick else compare.SHAPES, (1, 256) if quick else compare.ROWS, rounds=5)


def few_bits_bench(quick: bool) -> Bench:
    """One row, every format in turn."""
    against = ("fp32", *(f"tersor-{name}" for name in FEW_BITS[1:]))
    return Bench(LARGE[:1] if quick else LARGE, (1,), our_formats()[FEW_BITS[0]], against=against, rounds=5)


def figures(rows: list[Row]) -> list[dict[str, object]]:
    """Each row of ours, `format` telling which; times_fp32 is its ratio to the float layer."""
    names = {OURS: "", KERNEL: "kernel"} | {f"tersor-{name}": name for name in FEW_BITS}
    return [{**row.to_dict(), "format": names[row.name], "times_fp32": row.ratio} for row in rows if row.name in names]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="the smallest shapes only")
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON, for programs")
def main(quick: bool, as_json: bool) -> None:
    """Times fp32 and percent of the AVX2 limit: int8 over the grid of compare.py, few bits at M = 1."""
    torch.manual_seed(0)
    machine = this_machine(fresh=True)
    benches = int8_bench(quick), few_bits_bench(quick)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layers", total=sum(len(bench.cases()) for bench in benches))
        int8, few = (figures(list(bench.run(machine, lambda: progress.advance(task)))) for bench in benches)
    for figure in int8:
        figure["format"] = figure["format"] or "int8"
    for figure in few:
        figure["format"] = figure["format"] or FEW_BITS[0]
    few = [figure for figure in few if figure["format"] != "kernel"]
    if as_json:
        click.echo(json.dumps({"isa": machine.isa, "rows": int8 + few}))
        return
    table = Table("format", "K x N", "M", "times fp32", "GMAC/s", "of limit", title=f"{machine_name()}, {machine.isa}, 1 thread")
    for f in int8 + few:
        cells = f"{f['times_fp32']:.2f}", f"{f['gmacs']:.1f}", f"{f['of_limit']:.0%} {f['limited_by']}"
        table.add_row(str(f["format"]), f"{f['K']} x {f['N']}", str(f["M"]), *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
