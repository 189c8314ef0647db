"""all-MiniLM-L6-v2 in Int8Dynamic through torchax on JAX CPU against the CPU kernels: 1 - cosine for each of 12 sentences.

    build/xla/bin/python bench/minilm_xla.py                                          # make test-xla makes build/xla
    XLA_FLAGS=--xla_cpu_max_isa=AVX build/xla/bin/python bench/minilm_xla.py          # jitted code without fma

Float32 is how a model runs. There JAX's softmax, norms and gelu differ from torch's by ulps; an ulp across a tie of the quantiser
is a step of 1 / 127, and the steps after it follow. In float64 these parts differ by so little that nothing is left of it once a
layer reads its rows as float32: what then differs is the layers' own.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import minilm_model
import torch
import torchax
from torch import Tensor, nn

import tersor
from tersor.backends import xla

SENTENCES = [
    "A cat sits on the mat.",
    "Heavy rain is expected in the north of the country tonight, with floods along the larger rivers.",
    "The bank raised its interest rates by a quarter of a point.",
    "Why?",
]


class Embedding(nn.Module):
    """(ids, mask) int64 [batch, tokens] -> unit vectors [batch, 384]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return minilm_model.sentence_embedding(self.model, ids, mask)


class Float32Within(nn.Module):
    """A layer among parts that compute in float64."""

    def __init__(self, layer: tersor.QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
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


def tokens(sentences: list[str]) -> tuple[Tensor, Tensor]:
    """(ids, mask) int64 [sentences, tokens of the longest]."""
    rows = [e.ids for e in minilm_model.load_tokenizer().encode_batch(sentences)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def swapped(float64: bool) -> Embedding:
    model = tersor.quantize_(minilm_model.load_model(), tersor.Int8Dynamic())
    return Embedding(in_float64(model) if float64 else model)


@torch.no_grad()
def on_jax(model: Embedding, ids: Tensor, mask: Tensor, jit: bool) -> Tensor:
    """The embeddings by the lowerings. The model stays on "jax"."""
    xla.register()
    with torchax.default_env():
        model.to("jax")
        call = torchax.interop.JittableModule(model) if jit else model
        return call(ids.to("jax"), mask.to("jax")).torch().detach()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


@torch.no_grad()
def float64_apart(sentences: list[str], jit: bool) -> tuple[float, float]:
    """(least cosine, largest difference) between the CPU kernels and the lowerings, all else in float64. For a process of its own:
    JAX has 64 bits after it."""
    jax.config.update("jax_enable_x64", True)
    model, given = swapped(True), tokens(sentences)
    want = model(*given)
    got = on_jax(model, *given, jit)
    assert got.dtype == torch.float64
    return cosines(got, want).min().item(), (got - want).abs().max().item()


@torch.no_grad()
def main() -> None:
    ids, mask = tokens(SENTENCES + minilm_model.load_texts(8).queries)

    def show(name: str, a: Tensor, b: Tensor) -> None:
        print(f"{name:50} " + " ".join(f"{max(0.0, 1 - c):.0e}" for c in cosines(a, b).tolist()), flush=True)

    in32, in64 = swapped(False), swapped(True)
    want32, want64 = in32(ids, mask), in64(ids, mask)
    show("the format: CPU kernels, float32 model", want32, Embedding(minilm_model.load_model())(ids, mask))
    show("CPU kernels, float32 parts, float64 parts", want32, want64)
    for jit in (False, True):
        how = "jitted" if jit else "eager"
        show(f"JAX {how}, CPU kernels; float32 parts", on_jax(swapped(False), ids, mask, jit), want32)
        with jax.enable_x64(True):
            show(f"JAX {how}, CPU kernels; float64 parts", on_jax(swapped(True), ids, mask, jit), want64)


if __name__ == "__main__":
    main()
