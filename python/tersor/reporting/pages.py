"""A Report for people: tables in a terminal, Markdown, and one HTML page."""

from __future__ import annotations

import html as escaping
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .svg import layer_charts

if TYPE_CHECKING:
    from rich.table import Table

    from .measure import Report

_LAYER_COLUMNS = (
    "layer",
    "format",
    "K x N",
    "rows x calls",
    "ms before",
    "ms after",
    "ratio",
    "SQNR, dB",
    "share of error",
    "bytes",
)


def summary(report: Report) -> list[tuple[str, str, str, str]]:
    """(what, of the model, of the other, compared)."""
    (a, b), peak, size = report.seconds, report.peak_bytes, report.model_bytes
    rows = [
        ("time, min", milliseconds(a.best), milliseconds(b.best), f"{report.ratio:.2f}x"),
        ("time, median", milliseconds(a.median), milliseconds(b.median), f"{a.median / b.median:.2f}x"),
        ("model", megabytes(size[0]), megabytes(size[1]), f"{size[1] / size[0]:.0%}" if size[0] else "-"),
        ("peak memory", megabytes(peak[0]), megabytes(peak[1]), f"{peak[1] / peak[0]:.0%}" if peak[0] else "-"),
    ]
    if report.metric is not None:
        before, after = report.metric
        rows.append(("metric", f"{before:.6g}", f"{after:.6g}", f"{after - before:+.4g}"))
    rows.append(("output, mean cosine", "", "", f"{report.cosine:.6f}"))
    rows.append(("output, SQNR", "", "", f"{decibels(report.sqnr_db)} dB"))
    return rows


def layer_cells(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            row.fqn,
            row.format,
            f"{row.k} x {row.n}",
            ", ".join(f"{m} x {count}" for m, count in row.rows.items()),
            f"{row.before.best * 1e3:.3f}",
            f"{row.after.best * 1e3:.3f}",
            f"{row.ratio:.2f}x",
            decibels(row.sqnr_db),
            f"{row.error_share:.1%}",
            f"{row.bytes_before} -> {row.bytes_after}",
        )
        for row in report.layers
    ]


def headline(report: Report) -> str:
    facts = report.facts
    plural = "" if facts["threads"] == 1 else "s"
    return (
        f"{facts['other']} against {facts['model']}: {facts['machine']}, {facts['isa']}, {facts['threads']} thread{plural}, "
        f"torch {facts['torch']}, tersor {facts['tersor']}; {facts['calls']} call(s) a pass, {facts['rounds']} rounds"
    )


def note(report: Report) -> str:
    if not report.layers:
        return ""
    text = (
        "Of a layer: the time of all its calls of one pass, by itself and hot; the SQNR of its output; its share of error: "
        "squared error at the model's output with this layer alone exchanged."
    )
    return text + (f" Not called by these inputs: {', '.join(report.uncalled)}." if report.uncalled else "")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else {math.inf: "exact", -math.inf: "-inf"}.get(value, "nan")


# ---- a terminal -----------------------------------------------------------------------------------------------------------------


def tables(report: Report) -> Iterator[Table | str]:
    from rich.markup import escape
    from rich.table import Table

    whole = Table(title=escape(headline(report)), title_justify="left")
    for column in ("", "model", "other", "compared"):
        whole.add_column(column, justify="right" if column else "left")
    for row in summary(report):
        whole.add_row(*map(escape, row))
    yield whole
    if not report.layers:
        return
    layers = Table(caption=escape(note(report)), caption_justify="left")
    for column in _LAYER_COLUMNS:
        layers.add_column(column, justify="left" if column in ("layer", "format") else "right", overflow="fold")
    for cells in layer_cells(report):
        layers.add_row(*map(escape, cells))
    yield layers


# ---- Markdown -------------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in one cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&!])", r"\\\1", re.sub(r"\s+", " ", text))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns are text, the others numbers."""
    marks = ["---" if i < left else "---:" for i in range(len(columns))]
    lines = [map(plain, columns), marks, *(map(plain, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(report: Report) -> str:
    parts = [plain(headline(report)), markdown_table(("", "model", "other", "compared"), summary(report))]
    if report.layers:
        parts += [markdown_table(_LAYER_COLUMNS, layer_cells(report), left=2), plain(note(report))]
    return "\n\n".join(parts) + "\n"


# ---- HTML -----------------------------------------------------------------------------------------------------------------------

_STYLE = (
    "body{font-family:sans-serif;margin:2em;color:#222}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border-bottom:1px solid #ccc;padding:.2em .6em;text-align:right}td:first-child,th:first-child{text-align:left}"
)


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escaping.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>\n" + "\n".join([line(columns, "th"), *(line(row, "td") for row in rows)]) + "\n</table>"


def html(report: Report) -> str:
    title = escaping.escape(f"{report.facts['other']} against {report.facts['model']}")
    body = [
        f"<h1>{title}</h1>",
        f"<p>{escaping.escape(headline(report))}</p>",
        html_table(("", "model", "other", "compared"), summary(report)),
    ]
    if report.layers:
        body += [layer_charts(report.layers), html_table(_LAYER_COLUMNS, layer_cells(report))]
        body.append(f"<p>{escaping.escape(note(report))}</p>")
    # Even a viewer that would run scripts or fetch files is told not to.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"
