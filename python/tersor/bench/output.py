"""Benches as tables, files and plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .layers import KERNEL, OURS, Row
from .machine import Limits, Machine


def layers_table(rows: Iterable[Row], title: str) -> Table:
    """Rows of `tersor bench linear`; a line under each shape."""
    table = Table(title=title)
    for column in ("K x N", "M", "contender", "min us", "median us", "ratio", "GMAC/s", "GB/s", "of limit"):
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    last: tuple[int, int, int] | None = None
    for row in rows:
        case = (row.k, row.n, row.m)
        if last is not None and case != last:
            table.add_section()
        first, last = case != last, case
        style = "bold" if row.name == OURS else "dim" if row.name == KERNEL else None
        table.add_row(
            f"{row.k} x {row.n}" if first else "",
            str(row.m) if first else "",
            row.name,
            f"{row.timing.best * 1e6:.1f}",
            f"{row.timing.median * 1e6:.1f}",
            f"{row.ratio:.2f}x",
            f"{row.gmacs:.1f}",
            f"{row.gbytes:.1f}",
            f"{row.of_limit:.0%} {row.limited_by}",
            style=style,
        )
    return table


def machine_table(machine: Machine) -> Table:
    """The limits of a machine."""
    table = Table(title=f"{machine.cpu}, instruction set {machine.isa}")
    table.add_column("limit")
    for limits in machine.limits:
        table.add_column(f"{limits.threads} thread{'s' if limits.threads > 1 else ''}", justify="right")
    for what, unit, get in (
        ("int8 multiply-adds", "GMAC/s", lambda limits: limits.int8),
        ("float32 multiply-adds", "GMAC/s", lambda limits: limits.f32),
        ("xor + popcount + add", "Gbit-MAC/s", lambda limits: limits.popcount),
    ):
        table.add_row(what, *(f"{get(limits):.1f} {unit}" for limits in machine.limits))
    for level in machine.limits[0].read:
        size = f" ({_size(machine.caches[level])})" if level in machine.caches else ""
        table.add_row(f"read {level}{size}", *(f"{limits.read[level]:.1f} GB/s" for limits in machine.limits))
    return table


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0].to_dict()))
        writer.writeheader()
        writer.writerows(row.to_dict() for row in rows)


def write_json(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    path.write_text(json.dumps({**facts, "rows": [row.to_dict() for row in rows]}, indent=1) + "\n", encoding="utf-8")


def plot_roofline(path: Path, rows: Sequence[Row], limits: Limits, title: str) -> None:
    """Each point at its arithmetic intensity against the ceilings of this machine. RuntimeError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("--plot needs matplotlib: pip install 'tersor[plot]'") from None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row.name, []).append((row.gmacs / row.gbytes, row.gmacs))
    intensities = [x for series in points.values() for x, _ in series]
    low, high = min(intensities) / 2, max(intensities) * 2
    for level, bandwidth in limits.read.items():
        axes.plot([low, high], [low * bandwidth, high * bandwidth], color="0.8", linewidth=1, zorder=1)
        axes.annotate(level, (low * 1.05, low * bandwidth * 1.15), color="0.5", fontsize=8)
    ceilings = {"int8": limits.int8, "float32": limits.f32}
    if any(row.limited_by == "popcount" for row in rows):
        ceilings["xor + popcount"] = limits.popcount
    for name, ceiling in ceilings.items():
        axes.axhline(ceiling, color="0.4", linewidth=1, linestyle="--", zorder=1)
        axes.annotate(f"{name} {ceiling:.0f} GMAC/s", (high, ceiling * 1.04), color="0.3", fontsize=8, ha="right")
    for name, series in points.items():
        xs, ys = zip(*series, strict=True)
        ours = {"marker": "D", "color": "black", "zorder": 3} if name == OURS else {"zorder": 2}
        axes.scatter(xs, ys, label=name, s=28, alpha=0.85, **ours)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(y for s in points.values() for _, y in s) / 2, max(ceilings.values()) * 1.6)
    axes.set_xlabel("multiply-adds per byte of weights, input and output")
    axes.set_ylabel("GMAC/s")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
