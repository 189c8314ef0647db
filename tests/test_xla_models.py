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
from xla_common import JIT, env, torchax, xla

import tersor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
pytest.importorskip("transformers", reason="transformers is not installed")
minilm = pytest.importorskip("minilm_model")
bench = pytest.importorskip("minilm_xla")

pytestmark = [pytest.mark.xla, pytest.mark.slow]


@pytest.fixture(scope="module")
def texts():
    """The float model, and (ids, mask) int64 [4, T] of sentences of different lengths."""
    try:
        return bench.Embedding(minilm.load_model()), *bench.tokens(bench.SENTENCES)
    except minilm.MissingData as error:
        pytest.skip(str(error))


@JIT
def test_minilm_end_to_end(texts, monkeypatch, jit: bool):
    """The whole model there against the CPU kernels. Softmax, norms and gelu in float64 on both sides: what these differ by is gone
    once a layer reads them as float32, so that every layer gets the same rows and must give the same bits."""
    # In a process of its own, where JAX may have 64 bits, and compiles for a CPU without fma, as the layers' arithmetic is defined.
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        cosine, apart = pool.submit(bench.float64_apart, bench.SENTENCES, jit).result()
    assert cosine >= 0.99999
    assert apart <= 1e-12


@JIT
def test_minilm_with_the_float_parts_of_either(texts, jit: bool):
    """In float32 JAX's softmax, norms and gelu differ from torch's by ulps. One ulp across a tie of the quantiser is a step of
    1 / 127, and the steps after it follow: a sentence differs by nothing or by a part of what the format itself costs it."""
    floats, ids, mask = texts
    swapped = bench.swapped(False)
    with torch.no_grad():
        want, unquantised = swapped(ids, mask), floats(ids, mask)
        got = bench.on_jax(swapped, ids, mask, jit)
    same = bench.cosines(got, want)
    assert same.median() >= 0.99999
    assert (1 - same <= 1 - bench.cosines(want, unquantised)).all()


@JIT
def test_minilm_with_float_activations(texts, jit: bool):
    """Nothing is rounded at run time, so ulps stay ulps."""
    _, ids, mask = texts
    swapped = bench.Embedding(tersor.quantize_(minilm.load_model(), tersor.Int8WeightOnly()))
    with torch.no_grad():
        want = swapped(ids, mask)
        got = bench.on_jax(swapped, ids, mask, jit)
    assert bench.cosines(got, want).min() >= 0.99999


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
