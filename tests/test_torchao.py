"""torchao's own quantize_ with tersor.torchao.TersorConfig: our layers, bit for bit, and what they refuse."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import tersor
from tersor import Int4, Int8Dynamic, Int8Static, QuantLinear, SparseInt8, Ternary

pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization import FqnToConfig
from torchao.quantization import quantize_ as torchao_quantize_

from tersor.torchao import TersorConfig, whole_model


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Sequential(nn.Linear(48, 32)), nn.Linear(32, 10, bias=False))


def encoder(seed=0):
    torch.manual_seed(seed)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()


@pytest.mark.parametrize("fmt", [Int8Dynamic(), Int8Static(0.05), Int4(), Int4(32), Ternary("tensor"), SparseInt8()], ids=repr)
def test_the_layers_are_those_of_our_own_swap(fmt):
    one, other, x = mlp(), mlp(), torch.randn(5, 64)
    if fmt == Int4(32):
        one[2][0] = other[2][0] = nn.Identity()  # 48 is no multiple of 32
        one[3] = other[3] = nn.Identity()
    torchao_quantize_(one, TersorConfig(fmt))
    tersor.quantize_(other, fmt)
    assert torch.equal(one(x), other(x))
    assert [type(m) for m in one.modules()] == [type(m) for m in other.modules()]
    assert one[0].format == fmt.stored()
    assert one.state_dict().keys() == other.state_dict().keys()


def test_torchaos_filter_and_device_choose():
    model = torchao_quantize_(m := mlp(), TersorConfig(), lambda module, fqn: fqn == "2.0", device="meta") or m
    assert [name for name, module in model.named_modules() if isinstance(module, QuantLinear)] == ["2.0"]
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_fqn_to_config_mixes_formats():
    """By the name of a layer, of its weight, and by a pattern, which fits weights, biases and norms as well."""
    model = nn.Sequential(*mlp(), nn.LayerNorm(10), nn.Linear(10, 8), nn.Linear(8, 4))
    names = {"0": TersorConfig(Int4(32)), r"re:(2\.0|4|5)\..*": TersorConfig(), "6.weight": TersorConfig(Ternary()), "3": None}
    torchao_quantize_(model, FqnToConfig(names), filter_fn=None)
    assert model[0].format == Int4(32)
    assert model[2][0].format == Int8Dynamic()
    assert type(model[3]) is nn.Linear
    assert type(model[4]) is nn.LayerNorm
    assert model[5].format == Int8Dynamic()
    assert model[6].format == Ternary()


def test_whole_model_follows_our_rules():
    """The fused path of an encoder layer would read weights that are gone; a tied head would get a copy."""
    model, same, x = encoder(), encoder(), torch.randn(2, 7, 32)
    torchao_quantize_(model, TersorConfig(submodules=True), whole_model)
    tersor.quantize_(same, Int8Dynamic())
    with torch.no_grad():
        assert torch.equal(model(x), same(x))
    assert isinstance(model.layers[0].linear1, QuantLinear)

    tied = nn.ModuleDict({"embed": nn.Embedding(20, 16), "head": nn.Linear(16, 20), "body": nn.Linear(16, 16)})
    tied["head"].weight = tied["embed"].weight
    with pytest.warns(UserWarning, match="tied to embed"):
        torchao_quantize_(tied, TersorConfig(submodules=True), whole_model)
    assert type(tied["head"]) is nn.Linear
    assert isinstance(tied["body"], QuantLinear)


def test_what_a_layer_shows_is_respected(caplog):
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(model[3])
    with caplog.at_level(logging.WARNING, "tersor"):
        torchao_quantize_(model, TersorConfig())
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[2][0], QuantLinear)
    assert isinstance(model[3], nn.Linear)
    assert "an nn.Linear of 64 to 48 stays float: it has hooks" in caplog.text
    assert "an nn.Linear of 32 to 10 stays float: it has no plain weight" in caplog.text


def test_a_subclass_stays_float(caplog):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Own(8, 8))
    torchao_quantize_(model, TersorConfig())
    assert type(model[0]) is Own
    assert "is a Own, whose forward a swap would lose" in caplog.text


def test_errors():
    with pytest.raises(TypeError, match=r"format is 'int8', expected a format such as tersor.Int8Dynamic\(\); formats by name"):
        TersorConfig("int8")
    with pytest.raises(ValueError, match=r"told to convert a Sequential, expected nn.Linear; submodules=True"):
        torchao_quantize_(mlp(), TersorConfig(), whole_model)
    with pytest.raises(ValueError, match="must divide in_features=48"):
        torchao_quantize_(mlp(), TersorConfig(Int4(32)))
    pruned = mlp()
    tersor.prune_(pruned, tersor.Unstructured(0.5))
    with pytest.raises(ValueError, match=r"mask of prune_; call tersor.finalize_\(model\) first"):
        torchao_quantize_(pruned, TersorConfig())
    tersor.finalize_(pruned)
    torchao_quantize_(pruned, TersorConfig(SparseInt8()))
    assert pruned[0].format == SparseInt8()


@pytest.mark.parametrize("there", ["nothing", "an old one"])
def test_without_torchao_the_import_says_what_to_install(there, tmp_path):
    """In a process where torchao is hidden, or is one from before its configs."""
    if there == "an old one":
        (tmp_path / "torchao").mkdir()
        (tmp_path / "torchao" / "__init__.py").touch()
    hide = "sys.modules['torchao'] = None" if there == "nothing" else f"sys.path.insert(0, {str(tmp_path)!r})"
    code = f"import sys; {hide}; import tersor; tersor.quantize_; import tersor.torchao"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1
    assert out.stderr.splitlines()[-1].startswith("ImportError: tersor.torchao: torchao is missing or too old; pip install torchao")
