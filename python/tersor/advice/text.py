"""An Advice for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..reporting.pages import markdown_table, megabytes, milliseconds, plain

if TYPE_CHECKING:
    from rich.table import Table

    from .recommend import Advice

_FORMATS = ("format", "predicted", "its layers", "mostly", "model", "drop", "")
_LAYERS = ("layer", "K x N", "rows x calls", "float", "bound by", "then", "bound by")
_HARDWARE = ("hardware", "format", "fits", "limited by", "at least", "Tersor there")


def headline(advice: Advice) -> str:
    asked = ", ".join(f"{name} {value:g}" for name, value in advice.asked.items() if value is not None)
    if advice.recommended is None:
        found = "nothing here holds what was asked"
    elif advice.recommended == "float":
        found = "recommended: leave the model float"
    else:
        found = f"recommended: tersor.quantize_(model, tersor.{advice.recommended})"
    return (
        f"{found}{f' (asked: {asked})' if asked else ''}. {advice.machine}, {advice.threads} thread(s): the float model takes "
        f"{milliseconds(advice.measured_s)} a pass, {milliseconds(advice.rest_s)} of it outside of its {len(advice.layers)} layers."
    )


def format_cells(advice: Advice) -> list[tuple[str, ...]]:
    return [
        (
            row.format,
            milliseconds(row.seconds),
            milliseconds(row.layers_s),
            row.limited_by,
            megabytes(row.bytes),
            "" if row.drop is None else f"{row.drop:.3g}",
            "recommended" if row.format == advice.recommended else "; ".join(row.reasons),
        )
        for row in advice.formats
    ]


def layer_cells(advice: Advice) -> list[tuple[str, ...]]:
    then = advice.recommended or "float"
    return [
        (
            row.fqn,
            f"{row.k} x {row.n}",
            ", ".join(f"{m} x {count}" for m, count in row.rows.items()),
            milliseconds(row.seconds["float"]),
            row.bound["float"],
            milliseconds(row.seconds[then]),
            row.bound[then],
        )
        for row in advice.layers
    ]


def hardware_cells(advice: Advice) -> list[tuple[str, ...]]:
    """The float model and the recommended format on each device."""
    shown = {"float", advice.recommended or "Int8Dynamic()"}
    return [
        (row.hardware, row.format, "yes" if row.fits else "no", row.limited_by, milliseconds(row.seconds), row.runs)
        for row in advice.hardware
        if row.format in shown
    ]


_NOTE = (
    "Times here are predictions from this machine's measured limits. Other hardware: a bound from data sheets, for the linear "
    "layers alone; nothing was timed there. fits: parameters, buffers, and the largest input and output of a layer."
)


def sources(advice: Advice) -> list[str]:
    return list(dict.fromkeys(f"{row.hardware}: {row.source}" for row in advice.hardware))


def text(advice: Advice) -> str:
    parts = [
        plain(headline(advice)),
        markdown_table(_FORMATS, format_cells(advice)),
        markdown_table(_LAYERS, layer_cells(advice)),
        markdown_table(_HARDWARE, hardware_cells(advice), left=4),
        plain(_NOTE),
        "\n".join(f"- {plain(line)}" for line in [*sources(advice), *advice.remarks]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(advice: Advice) -> Iterator[Table | str]:
    from rich.markup import escape
    from rich.table import Table

    yield escape(headline(advice))
    for columns, rows in (
        (_FORMATS, format_cells(advice)),
        (_LAYERS, layer_cells(advice)),
        (_HARDWARE, hardware_cells(advice)),
    ):
        table = Table()
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 or column in ("", "format", "bound by") else "right", overflow="fold")
        for cells in rows:
            table.add_row(*map(escape, cells))
        yield table
    yield escape(_NOTE)
    yield from (escape(f"- {line}") for line in [*sources(advice), *advice.remarks])
