"""Whole models through torchax: all-MiniLM-L6-v2 against the CPU kernels, a float head trained on frozen layers, a fused graph."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import assert_within
from torch import nn
from xla_common import JIT, env, jax, torchax, xla

import tersor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
pytest.importorskip("transformers", reason="transformers is not installed")
minilm = pytest.importorskip("minilm_model")

pytestmark = pytest.mark.xla


SENTENCES = [
    "A cat sits on the mat.",
    "Heavy rain is expected in the north of the country tonight, with floods along the larger rivers.",
    "The bank raised its interest rates by a quarter of a point.",
    "Why?",
]


def load_texts():
    """The float model, and (ids, mask) int64 [4, T] of sentences of different lengths."""
    model, tokenizer = minilm.load_model(), minilm.load_tokenizer()
    rows = [e.ids for e in tokenizer.encode_batch(SENTENCES)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return model, ids, mask


@pytest.fixture(scope="module")
def texts():
    try:
        return load_texts()
    except minilm.MissingData as error:
        pytest.skip(str(error))


def embedding(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return minilm.sentence_embedding(model, ids, mask)


class Embedding(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return embedding(self.model, ids, mask)


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


class Float32Within(nn.Module):
    """A layer among parts that compute in float64."""

    def __init__(self, layer: tersor.QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.float()).double()


def in_float64(model: nn.Module) -> nn.Module:
    """In place: everything but the quantised layers computes in float64, weights unchanged."""
    for module in list(model.modules()):
        if isinstance(module, tersor.QuantLinear):
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, tersor.QuantLinear):
                setattr(module, name, Float32Within(child))
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.double()
    return model


def float64_embeddings_apart(jit: bool) -> tuple[float, float]:
    """(least cosine, largest difference) of the sentences between the CPU kernels and the lowerings, all else in float64."""
    jax.config.update("jax_enable_x64", True)
    xla.register()
    env = torchax.default_env()
    _, ids, mask = load_texts()
    model = Embedding(in_float64(tersor.quantize_(minilm.load_model(), tersor.Int8Dynamic())))
    with torch.no_grad():
        want = model(ids, mask)
        with env:
            model.to("jax")
            call = torchax.interop.JittableModule(model) if jit else model
            got = call(ids.to("jax"), mask.to("jax")).torch().detach()
    assert got.dtype == torch.float64
    return cosines(got, want).min().item(), (got - want).abs().max().item()


@pytest.mark.slow
@JIT
def test_minilm_end_to_end(texts, monkeypatch, jit: bool):
    """The whole model there against the CPU kernels. Softmax, norms and gelu in float64 on both sides: what these differ by is gone
    once a layer reads them as float32, so that every layer gets the same rows and must give the same bits."""
    # In a process of its own, where JAX may have 64 bits, and compiles for a CPU without fma, as the layers' arithmetic is defined.
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        cosine, apart = pool.submit(float64_embeddings_apart, jit).result()
    assert cosine >= 0.99999
    assert apart <= 1e-12


@JIT
def test_minilm_with_the_float_parts_of_either(env, texts, jit: bool):
    """In float32 JAX's softmax, norms and gelu differ from torch's by ulps. One ulp across a tie of the quantiser is a step of
    1 / 127, and the steps after it follow, so that a sentence differs by nothing or by a part of what the format itself costs it."""
    model, ids, mask = texts
    swapped = tersor.quantize_(minilm.load_model(), tersor.Int8Dynamic())
    with torch.no_grad():
        want, floats = embedding(swapped, ids, mask), embedding(model, ids, mask)
        with env:
            swapped.to("jax")
            call = torchax.interop.JittableModule(Embedding(swapped)) if jit else Embedding(swapped)
            got = call(ids.to("jax"), mask.to("jax")).torch().detach()
    same = cosines(got, want)
    assert same.median() >= 0.99999
    assert (1 - same <= 1 - cosines(want, floats)).all()


@JIT
def test_minilm_with_float_activations(env, texts, jit: bool):
    """Nothing is rounded at run time, so ulps stay ulps."""
    _, ids, mask = texts
    swapped = tersor.quantize_(minilm.load_model(), tersor.Int8WeightOnly())
    with torch.no_grad():
        want = embedding(swapped, ids, mask)
        with env:
            swapped.to("jax")
            call = torchax.interop.JittableModule(Embedding(swapped)) if jit else Embedding(swapped)
            got = call(ids.to("jax"), mask.to("jax")).torch().detach()
    assert cosines(got, want).min() >= 0.99999


@JIT
def test_a_fused_graph_moves_there(env, jit: bool):
    """What fuse() made for the CPU gives the same numbers there; XLA fuses by itself, so it is not needed."""
    model = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48)).eval()
    tersor.quantize_(model, tersor.Int8Dynamic())
    x = torch.randn(6, 48)
    with torch.no_grad():
        want = model(x)
        fused = tersor.fuse(model, (x,))
        with env:
            fused.to("jax")
            xla.register()
            got = (torchax.interop.JittableModule(fused) if jit else fused)(x.to("jax")).torch().detach()
    # A norm's row and a gelu's may be one step of int8 apart in an element.
    step = 4 * 127**-1 * (model[3].dequantize().weight.abs().amax() + model[1].dequantize().weight.abs().amax() * 2)
    assert_within(got, want, step.item())
