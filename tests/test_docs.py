"""The pages of docs/ and the README: every Python block runs, in the order of its page; the API pages hold every public name."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from torch import nn

import tersor

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Blocks of one page share a namespace, comments `invisible-code-block: python` set up what the text takes for granted, and
# `skip: next "reason"` marks what cannot run here.
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT))


def blocks(page: str) -> list[int]:
    """Lines at which Python blocks begin, counted without sybil."""
    return [i for i, line in enumerate((ROOT / page).read_text().split("\n"), 1) if line.startswith("```python")]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_python_block_runs(page, tmp_path, monkeypatch, subtests):
    monkeypatch.chdir(tmp_path)
    document = SYBIL.parse(ROOT / page)
    document.namespace.update(torch=torch, nn=nn, tersor=tersor)
    examples = list(document.examples())
    assert set(blocks(page)) <= {example.line for example in examples}
    for example in examples:
        if page == "README.md":  # each of its blocks stands alone; on a page a comment sets this up
            document.namespace["model"] = nn.Sequential(OrderedDict(body=nn.Linear(64, 64), act=nn.ReLU(), head=nn.Linear(64, 8)))
        with subtests.test(f"{page}:{example.line}"):
            example.evaluate()


def test_the_api_pages_hold_every_public_name():
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("api*.md"))
    shown = set(re.findall(r"^::: tersor\.(\w+)$", text, re.M))
    assert shown >= {*tersor._PUBLIC, *tersor._SUBMODULES}
    shown = set(re.findall(r"^ {8}- (\w+)$|^::: tersor\.ops\.\w+\.(\w+)$", text, re.M))
    ops = {op.public_name for op in tersor.ops.OPS.values() if not op.public_name.endswith("_differentiable")}
    assert {a or b for a, b in shown} >= ops


def test_every_page_is_in_the_navigation():
    named = re.findall(r"\b([a-z_]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
