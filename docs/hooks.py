"""What the site needs beside its pages: sections of the README, and docstrings, which are plain text, as Markdown."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe

README = Path(__file__).resolve().parent.parent / "README.md"
_INCLUDE = re.compile(r"^<!-- README: (.+?)(?:, from (.+))? -->$", re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`<!-- README: heading -->` on a line of its own is replaced by that section, or by what begins with the words after `from`,
    so that every figure stands in one place."""
    return _INCLUDE.sub(lambda match: _readme_section(match[1], match[2] or ""), markdown)


def _readme_section(heading: str, begin: str) -> str:
    sections = re.split(r"^##? (.+)$", README.read_text(), flags=re.M)
    if heading not in sections[1::2]:
        raise ValueError(f"README.md has no section {heading!r}")
    section = sections[sections.index(heading) + 1]
    return section[section.index(begin) :].replace("](docs/", "](").strip()


class PlainDocstrings(griffe.Extension):
    """Docstrings of this package: paragraphs, blocks indented by four (code), and aligned lists of `name  what it is`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Each paragraph of a docstring as Markdown."""
    return "\n\n".join(_paragraph(block) for block in re.split(r"\n\s*\n", text.rstrip()))


def _paragraph(block: str) -> str:
    lines = textwrap.dedent(block).split("\n")
    if block.startswith("    "):
        return "```python\n" + "\n".join(lines) + "\n```"
    if items := _arguments(lines):
        return "\n\n".join(f"`{name}`\n:   {_escaped(what)}" for name, what in items)
    return _escaped(" ".join(line.strip() for line in lines))


def _arguments(lines: list[str]) -> list[tuple[str, str]]:
    """(name, text) of an aligned list; a line that is indented goes on with the one before. Empty where it is no list."""
    items: list[tuple[str, str]] = []
    column = 0
    for line in lines:
        if line.startswith(" "):
            if not items:
                return []
            name, what = items[-1]
            items[-1] = (name, f"{what} {line.strip()}".strip())
            continue
        name, *rest = re.split(r"\s{2,}", line, maxsplit=1)
        if rest:
            column = len(line) - len(rest[0])
        elif column and line[column - 1 : column] == " ":  # a long name, with one space before the column
            name, rest = line[: column - 1], [line[column:]]
        items.append((name, rest[0] if rest else ""))
    return items if all(what for _, what in items) else []


def _escaped(text: str) -> str:
    """Outside of backticks nothing of a docstring is markup: [N, K] is a shape, * a product."""
    parts = re.split(r"(`[^`]+`)", text)
    plain = (re.sub(r"([\\*_{}\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2])
    return "".join(text for pair in zip(plain, [*parts[1::2], ""], strict=True) for text in pair)
