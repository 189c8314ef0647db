"""The measures that bench/accuracy_*.py report: ranks, paired errors, and glosses that are whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
pytest.importorskip("tokenizers", reason="tokenizers is not installed")
glosses = pytest.importorskip("glosses")


def test_ranks():
    documents = torch.eye(3)
    queries = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.3, 0.1], [0.5, 0.4, 0.3]])
    found = glosses.ranking(queries, documents)
    assert found.rank.tolist() == [1, 2, 3]
    assert found.recall_at_1() == pytest.approx(100 / 3)
    assert found.mean_reciprocal_rank() == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_the_error_is_paired():
    """A contender that fails on the same queries differs by nothing, whatever share that is."""
    a = glosses.Ranking(torch.tensor([1, 2, 1, 5] * 100), torch.ones(400))
    assert a.against(a) == (0.0, 0.0)
    b = glosses.Ranking(torch.cat([torch.tensor([2]), a.rank[1:]]), torch.ones(400))
    points, error = b.against(a)
    assert points == pytest.approx(-0.25) and error == pytest.approx(0.25, rel=1e-6)


def test_glosses():
    try:
        first, other = glosses.load_glosses(300), glosses.load_glosses(300, seed=1)
    except glosses.MissingData as error:
        pytest.skip(str(error))
    assert len(set(first.documents)) == 300 and all(len(query.split()) >= glosses.MIN_WORDS for query in first.queries)
    assert not any('"' in query[:1] or "|" in query for query in first.queries)
    assert first != other and first == glosses.load_glosses(300)
