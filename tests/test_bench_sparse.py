"""`tersor bench sparse`: what it prunes, and how it reads its own figures; times themselves are not looked at."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tersor.bench.sparse import DENSE, FLOAT, FP32, INT8, SparseRow, break_even, pruned
from tersor.bench.timing import Timing
from tersor.cli import main

pytestmark = pytest.mark.native


@pytest.mark.parametrize(("pattern", "unit"), [("unstructured", (1, 1)), ("16x4", (16, 4))])
def test_the_smallest_go(pattern: str, unit: tuple[int, int]):
    w = torch.randn(64, 80)
    got = pruned(w, pattern, 0.75)
    kept = got != 0
    assert torch.equal(got[kept], w[kept])
    grid = w.square().reshape(64 // unit[0], unit[0], 80 // unit[1], unit[1]).mean((1, 3))
    whole = kept.reshape(64 // unit[0], unit[0], 80 // unit[1], unit[1])
    assert torch.equal(whole.any(3).any(1), whole.all(3).all(1))  # units go whole
    alive = whole.any(3).any(1)
    assert int((~alive).sum()) == round(0.75 * grid.numel())
    assert grid[~alive].max() <= grid[alive].min()


def test_two_of_four():
    w = torch.randn(8, 64)
    kept = (pruned(w, "2:4", 0.5) != 0).reshape(-1, 4)
    assert (kept.sum(1) == 2).all()
    size = w.abs().reshape(-1, 4)
    assert (size.masked_fill(kept, -1).amax(1) <= size.masked_fill(~kept, 9).amin(1)).all()


def row(sparsity: float, name: str, seconds: float) -> SparseRow:
    return SparseRow(64, 64, 1, "unstructured", sparsity, name, Timing(seconds, seconds), None, 1.0, 1.0, 1.0)


def test_break_even_is_where_it_stays_faster():
    rows = [row(s, DENSE, 1.0) for s in (0.5, 0.7, 0.8, 0.9)]
    rows += [row(s, INT8, t) for s, t in ((0.5, 0.9), (0.7, 1.2), (0.8, 0.8), (0.9, 0.5))]
    assert break_even(rows, "unstructured", 1, INT8, DENSE) == 0.8  # 0.5 is faster too, but 0.7 is not
    rows += [row(s, FLOAT, 2.0) for s in (0.5, 0.7, 0.8, 0.9)] + [row(s, FP32, 1.0) for s in (0.5, 0.7, 0.8, 0.9)]
    assert break_even(rows, "unstructured", 1, FLOAT, FP32) is None


@pytest.mark.parametrize("rows", ["2", pytest.param("1,2", marks=pytest.mark.slow)])
def test_the_command_measures_and_writes(tmp_path: Path, rows: str):
    out = tmp_path / "rows.csv"
    size = ("--k", "64", "--n", "32", "--m", rows, "--percent", "80", "--rounds", "3")
    result = CliRunner().invoke(main, ["bench", "sparse", *size, "--ours-only", "--csv", str(out)])
    assert result.exit_code == 0, result.output
    assert "16x4, M=2: sparse float is faster than fp32" in result.output
    with out.open() as file:
        found = list(csv.DictReader(file))
    assert {(r["pattern"], r["M"], r["contender"]) for r in found} == {
        (p, m, name) for p in ("unstructured", "16x4", "2:4") for m in rows.split(",") for name in (DENSE, INT8, FLOAT, FP32)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--patterns", "diagonal"), "'diagonal', expected some of"), (("--percent", "101"), "101 is above 100")],
)
def test_wrong_options_are_named(options: tuple[str, str], message: str):
    result = CliRunner().invoke(main, ["bench", "sparse", *options])
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())
