"""Bar charts as SVG text: no library, no script, every string escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .measure import LayerRow

_BAR, _LABEL, _CHART, _GAP, _HEAD = 14, 260, 200, 90, 24  # pixels: of a bar's line, its name, its length, its number, a title


def layer_charts(rows: Sequence[LayerRow]) -> str:
    """Three charts beside each other, a line a layer."""
    return bar_charts(
        [row.fqn for row in rows],
        {
            "times the speed": ([row.ratio for row in rows], "{:.2f}x"),
            "SQNR of its output, dB": ([row.sqnr_db for row in rows], "{:.1f}"),
            "share of the error": ([row.error_share for row in rows], "{:.1%}"),
        },
    )


def bar_charts(names: Sequence[str], charts: dict[str, tuple[Sequence[float], str]]) -> str:
    """charts: title -> (a value for each name, how it is written). Bars begin at 0; what is no finite number has none."""
    height = _HEAD + _BAR * len(names) + 8
    width = _LABEL + len(charts) * (_CHART + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">'
    ]
    for i, name in enumerate(names):
        shown = name if len(name) <= 42 else "..." + name[-39:]
        y = _HEAD + _BAR * i + 11
        lines.append(f'<text x="{_LABEL - 6}" y="{y}" text-anchor="end">{escape(shown)}<title>{escape(name)}</title></text>')
    for column, (title, (values, pattern)) in enumerate(charts.items()):
        left = _LABEL + column * (_CHART + _GAP)
        most = max((v for v in values if math.isfinite(v)), default=0.0)
        lines.append(f'<text x="{left}" y="14" font-weight="bold">{escape(title)}</text>')
        for i, value in enumerate(values):
            y = _HEAD + _BAR * i
            length = max(0.0, value / most * _CHART) if math.isfinite(value) and most > 0 else 0.0
            lines.append(f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{_BAR - 4}" fill="#4a7ab5"/>')
            lines.append(f'<text x="{left + length + 4:.1f}" y="{y + 11}">{escape(pattern.format(value))}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
