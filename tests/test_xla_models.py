"""Whole models through torchax: all-MiniLM-L6-v2 against the CPU kernels, a float head trained on frozen layers, a fused graph."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cases import EPS, assert_within
from torch import nn
from xla_common import JIT, env, jax, torchax, xla  # noqa: F401

import tersor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
pytest.importorskip("transformers", reason="transformers is not installed")
minilm = pytest.importorskip("minilm_model")

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def texts():
    """(ids, mask) int64 [4, 48] of sentences of different lengths, and the swapped model's unit vectors on the CPU."""
    try:
        model, tokenizer = minilm.load_model(), minilm.load_tokenizer()
        sentences = minilm.load_texts(limit=8).queries[:4]
    except minilm.MissingData as error:
        pytest.skip(str(error))
    encoded = [e.ids[:48] for e in tokenizer.encode_batch(sentences)]
    ids = torch.tensor([row + [0] * (48 - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (48 - len(row)) for row in encoded])
    return model, ids, mask


def embedding(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return minilm.sentence_embedding(model, ids, mask)


class Embedding(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return embedding(self.model, ids, mask)


@JIT
@pytest.mark.parametrize("fmt", [tersor.Int8Dynamic(), tersor.Int4(32), tersor.Int8WeightOnly()], ids=str)
def test_minilm_gives_the_embeddings_of_the_cpu_kernels(env, texts, fmt, jit: bool):  # noqa: F811
    model, ids, mask = texts
    swapped = tersor.quantize_(minilm.load_model(), fmt)
    with torch.no_grad():
        want, floats = embedding(swapped, ids, mask), embedding(model, ids, mask)
        # the device's own difference must be small beside that of the format, or the comparison would say nothing
        assert (want - floats).abs().max() > 1e-4
        with env:
            swapped.to("jax")
            call = torchax.interop.JittableModule(Embedding(swapped)) if jit else Embedding(swapped)
            got = call(ids.to("jax"), mask.to("jax")).torch()
    cosine = (got.double() * want.double()).sum(-1) / got.double().norm(dim=-1) / want.double().norm(dim=-1)
    assert cosine.min() >= 0.99999
