"""Whole models through torchax: all-MiniLM-L6-v2 against the CPU kernels, a float head trained on frozen layers, a fused graph."""

from __future__ import annotations

import sys
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


@pytest.fixture(scope="module")
def texts():
    """The float model, and (ids, mask) int64 [4, T] of sentences of different lengths."""
    try:
        model, tokenizer = minilm.load_model(), minilm.load_tokenizer()
    except minilm.MissingData as error:
        pytest.skip(str(error))
    rows = [e.ids for e in tokenizer.encode_batch(SENTENCES)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return model, ids, mask


def embedding(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return minilm.sentence_embedding(model, ids, mask)


class Embedding(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return embedding(self.model, ids, mask)


class OnCpu(nn.Module):
    """A layer that is on the CPU, in a model that is on "jax"."""

    def __init__(self, layer: tersor.QuantLinear, env) -> None:
        super().__init__()
        self.env = env
        self.call = layer.forward  # not a submodule: it stays where it is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = torch.from_dlpack(self.env.t2j_iso(x))
        self.env.disable_torch_modes()
        try:
            y = self.call(values)
        finally:
            self.env.enable_torch_modes()
        return y.to("jax")


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


@pytest.mark.slow
def test_minilm_gives_the_embeddings_of_the_cpu_kernels(env, texts):
    """The layers of the model by the lowerings, and by the CPU kernels, with the same softmax, norms and gelu around them."""
    _, ids, mask = texts
    swapped = tersor.quantize_(minilm.load_model(), tersor.Int8Dynamic())
    by_kernels = tersor.quantize_(minilm.load_model(), tersor.Int8Dynamic())
    for name, layer in list(by_kernels.named_modules()):
        if isinstance(layer, tersor.QuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(by_kernels.get_submodule(parent), child, OnCpu(layer, env))
    with torch.no_grad(), env:
        got, want = (Embedding(model.to("jax"))(ids.to("jax"), mask.to("jax")).torch().detach() for model in (swapped, by_kernels))
    assert cosines(got, want).min() >= 0.99999


@JIT
def test_minilm_with_the_float_parts_of_either(env, texts, jit: bool):
    """JAX's softmax, norms and gelu differ from torch's by ulps. One ulp across a tie of the quantiser is a step of 1 / 127, and the
    steps after it follow, so that a sentence differs by nothing or by a part of what the format itself costs it."""
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
