"""The layers of a real model, all-MiniLM-L6-v2: each matches its reference, and the sentence embeddings stay what they were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cases import assert_equal

import tersor
import tersor.ops as ops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
pytest.importorskip("transformers", reason="transformers is not installed")
minilm = pytest.importorskip("minilm_model")


@pytest.fixture(scope="module")
def pair():
    try:
        model, swapped = minilm.load_model(), minilm.load_model()
        minilm.load_texts(limit=1)
    except minilm.MissingData as error:
        pytest.skip(str(error))
    return model, tersor.quantize_(swapped, tersor.Int8Dynamic())


def test_every_layer_matches_its_reference(pair):
    _, swapped = pair
    layers = [m for m in swapped.modules() if isinstance(m, tersor.QuantLinear)]
    assert len(layers) == 37
    for layer in layers[:7] + layers[-1:]:
        x = torch.randn(20, layer.in_features)
        q, scale, row_sum = ops.quantize_rows(x)
        args = (q, row_sum, layer.weight_packed, layer.out_features)
        assert_equal(ops.linear_acc(*args), ops.linear_acc.reference(*args))
        assert_equal(
            layer(x).detach(), ops.linear_dynamic.reference(x, layer.weight_packed, layer.weight_scale, layer.bias.detach())
        )


def test_sentence_embeddings(pair):
    model, swapped = pair
    texts = minilm.load_texts(limit=40).documents
    with torch.inference_mode():
        cosine = (minilm.embed(model, texts) * minilm.embed(swapped, texts)).sum(-1)
    assert cosine.mean() >= 0.9965
    assert cosine.min() >= 0.98


def test_state_dict_is_a_quarter(pair):
    def n_bytes(model: torch.nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    model, swapped = pair
    embeddings = sum(p.numel() * 4 for p in model.embeddings.parameters())
    assert n_bytes(swapped) - embeddings <= 0.27 * (n_bytes(model) - embeddings)
