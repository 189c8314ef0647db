"""What a pass did: one line for each place it fused, and one, with the reason, for each it left."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

logger = logging.getLogger("tersor")


@dataclass(frozen=True)
class Entry:
    """pattern: its name in PATTERNS; where: the node or module it happened at; reason: why it was left, "" where it was done."""

    pattern: str
    where: str
    reason: str = ""


@dataclass
class FusionReport:
    """What was fused and what was left, in order. `print(report)` counts; `report.table()` is for rich."""

    title: str = "graph"
    fused: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def did(self, pattern: str, where: str) -> None:
        self.fused.append(Entry(pattern, where))

    def leave(self, pattern: str, where: str, reason: str) -> None:
        entry = Entry(pattern, where, reason)
        if entry not in self.left:
            self.left.append(entry)

    def count(self, pattern: str) -> int:
        """How many places `pattern` was fused at."""
        return sum(entry.pattern == pattern for entry in self.fused)

    def reasons(self, pattern: str) -> list[str]:
        """Why `pattern` was left, once for each reason."""
        return list(dict.fromkeys(entry.reason for entry in self.left if entry.pattern == pattern))

    def _rows(self) -> list[tuple[str, int, str, str]]:
        rows = [(name, n, "fused", "") for name, n in Counter(entry.pattern for entry in self.fused).items()]
        left = Counter((entry.pattern, entry.reason) for entry in self.left)
        return rows + [(name, n, "left", reason) for (name, reason), n in left.items()]

    def __str__(self) -> str:
        lines = [f"tersor, {self.title}:" + ("" if self.fused or self.left else " nothing to fuse")]
        lines += [f"  {how:5s} {n:4d} x {name}" + (f": {reason}" if reason else "") for name, n, how, reason in self._rows()]
        return "\n".join(lines)

    def table(self) -> object:
        """A rich.table.Table: pattern, how often, fused or left, why, and the first place."""
        from rich.table import Table

        table = Table("pattern", "places", "", "why", "first place", title=f"tersor, {self.title}")
        for name, n, how, reason in self._rows():
            entries = self.fused if how == "fused" else self.left
            first = next(entry.where for entry in entries if (entry.pattern, entry.reason) == (name, reason))
            table.add_row(name, str(n), how, reason, first)
        return table

    def log(self) -> None:
        logger.info("%s", self)
