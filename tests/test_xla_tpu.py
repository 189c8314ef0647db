"""The TPU compiler (libtpu) without a TPU: what it makes of a layer, read from its optimised HLO."""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from xla_common import jax, xla

import tersor

pytest.importorskip("libtpu", reason="libtpu is not installed: make test-xla installs it")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
tpu = pytest.importorskip("tpu_compiler")

pytestmark = [pytest.mark.xla, pytest.mark.tpu_aot]
M, K, N = 128, 384, 1536  # rows, and a feed-forward layer of MiniLM
CHIPS = ["v5e", "v6e"]
FORMATS = [tersor.Int8Dynamic(), tersor.Binary(), tersor.BinaryXnor()]


def computations(hlo: str) -> dict[str, str]:
    """name -> text of each computation of an HLO module."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.DOTALL | re.MULTILINE)
    return dict(found)


def products(hlo: str, weights: list[tuple[int, int]]) -> dict[int, list[str]]:
    """N -> the texts of the output fusions whose root is an s8 x s8 -> s32 convolution with its epilogue: one for each weight [N, K],
    which is read as it is stored."""
    parts = computations(hlo)
    found = {name: text for name, text in parts.items() if re.search(r"= s32\[[\d,]*\]\S* convolution\(", text)}
    by_channels: dict[int, list[str]] = {}
    for name, text in found.items():
        assert re.search(rf"fusion\([^\n]*kind=kOutput, calls=%?{re.escape(name)}\b", hlo), f"{name} is not an output fusion"
        # scale of the row, scale of the channel, bias: in the same fusion
        assert len(re.findall(r" multiply\(", text)) >= 2, name
        assert " add(" in text, name
        ((channels, *operands),) = re.findall(r"= s32\[[\d,]*?(\d+)\]\S* convolution\(%([\w.\-]+), %([\w.\-]+)\)", text)
        for operand in operands:
            assert re.search(rf"%{re.escape(operand)} = s8\[", text), f"{operand} is not s8"
        by_channels.setdefault(int(channels), []).append(text)
    assert {n: len(texts) for n, texts in by_channels.items()} == Counter(n for n, _ in weights)
    # Nothing of a weight's size is copied, transposed or converted outside these fusions. (Within, the compiler names the change of
    # tiling on the way to the matrix unit a copy.)
    inside = set(found)
    while more := {called for name in inside for called in re.findall(r"calls=%?([\w.\-]+)", parts[name])} - inside:
        inside |= more
    for name, body in parts.items():
        for line in body.splitlines() if name not in inside else ():
            shape = re.match(r"\s*(?:ROOT )?%[\w.\-]+ = \(?\w+\[([\d,]+)\]\S* (?:copy|transpose|convert)\w*\(", line)
            sizes = sorted(int(size) for size in shape[1].split(",")) if shape else []
            assert not any(sizes == sorted(weight) for weight in weights), line
    return by_channels


@functools.cache
def exported_layer(fmt):
    model = nn.Sequential(tersor.QuantLinear.from_linear(nn.Linear(K, N), fmt), nn.ReLU())
    return tpu.exported(model, torch.randn(M, K))


@functools.cache
def exported_encoder_layer(fmt):
    """The program, and [N, K] of its layers."""
    model = tpu.swapped(tpu.encoder_layer(), fmt)
    layers = [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, tersor.QuantLinear)]
    return tpu.exported(model, torch.randn(8, 128, 384)), layers


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_one_s8_convolution_with_the_epilogue_in_its_fusion(fmt, chip: str):
    hlo = tpu.optimised_hlo(exported_layer(fmt), chip)
    assert not re.search(r"= (f32|bf16)\[[\d,]*\]\S* (convolution|dot)\(", hlo), "no float product"
    ((text,),) = products(hlo, [(N, K)]).values()
    assert " maximum(" in text, "relu is in the same fusion"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_layers_of_an_encoder_layer(fmt, chip: str):
    """MiniLM: q, k, v and the output projection, then the feed-forward pair with gelu between."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    try:
        program, layers = exported_encoder_layer(fmt)
    except sys.modules["minilm_model"].MissingData as error:
        pytest.skip(str(error))
    assert len(layers) == 6
    hlo = tpu.optimised_hlo(program, chip)
    (text,) = products(hlo, layers)[1536]
    assert " exponential(" in text, "gelu is in the same fusion"


def test_an_instruction_of_a_weights_size_outside_is_found():
    """Of text, so that the search above is known to see what it looks for."""
    fusion = (
        "%f (p: s8[4,8]) -> f32[4,8] {\n  %a = s8[4,8] parameter(0)\n  %b = s8[8,8] parameter(1)\n"
        "  %c = s32[4,8]{1,0} convolution(%a, %b)\n  %m = f32[4,8] multiply(%c, %c)\n  %n = f32[4,8] multiply(%m, %m)\n"
        "  ROOT %s = f32[4,8] add(%n, %n)\n}\n"
    )
    main = "ENTRY %main (p: s8[8,8]) -> f32[4,8] {{\n{}  ROOT %r = f32[4,8] fusion(%p), kind=kOutput, calls=%f\n}}\n"
    assert list(products(fusion + main.format(""), [(8, 8)])) == [8]
    with pytest.raises(AssertionError, match="transpose"):
        products(fusion + main.format("  %t = s8[8,8]{0,1} transpose(%p), dimensions={1,0}\n"), [(8, 8)])
    with pytest.raises(AssertionError, match="not an output fusion"):
        products(fusion + main.format("").replace("kOutput", "kLoop"), [(8, 8)])
    with pytest.raises(AssertionError):
        products(fusion.replace("%a = s8", "%a = f32") + main.format(""), [(8, 8)])
