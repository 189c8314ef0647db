"""gptq_ and correct_bias_: closer to the float model than plain rounding, on the same steps, and nothing else changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tersor
from tersor.rounding import ROUNDED, gptq

K = 128


def model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, 64), nn.ReLU(), nn.Linear(64, 32)).to(dtype).eval()


def inputs(seed: int, rows: int = 600) -> torch.Tensor:
    """Features that depend on each other, as those of real layers do: without that there is nothing to make up for."""
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, K)
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)) @ mix


def error(got: nn.Module, want: nn.Module, x: torch.Tensor) -> float:
    return ((got(x) - want(x)).norm() / want(x).norm()).item()


@pytest.mark.parametrize(
    "fmt", [tersor.Int4(), tersor.Int4(32), tersor.Ternary(), tersor.Ternary("tensor"), tersor.Binary()], ids=str
)
def test_closer_than_rounding_to_nearest(fmt):
    net = model()
    plain = tersor.quantize_(copy.deepcopy(net), fmt)
    rounded = tersor.gptq_(copy.deepcopy(net), fmt, inputs(2))
    assert error(rounded, net, inputs(3)) <= 0.85 * error(plain, net, inputs(3))
    for i in (0, 2, 4):
        assert rounded[i].format == fmt
        assert torch.equal(rounded[i].weight_scale, plain[i].weight_scale)
        if "group_scale" in plain[i]._parameters:
            assert torch.equal(rounded[i].group_scale, plain[i].group_scale)


def test_a_diagonal_hessian_is_rounding_to_nearest():
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    for fmt in (tersor.Int4(32), tersor.Int4(), tersor.Ternary()):
        got, scales = gptq(weight, torch.linspace(1, 2, 64).diag(), fmt)
        want = fmt.dequantize(fmt.quantize(weight), 20, 64)
        assert torch.equal(got, want)
        assert torch.equal(scales["weight_scale"], fmt.scales(weight)["weight_scale"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_codes_are_those_that_were_chosen(dtype):
    """The values on the grid survive being packed, also as bfloat16."""
    linear = nn.Sequential(nn.Linear(K, 48).to(dtype))
    x = inputs(2).to(dtype)
    hessian = (x.float().T @ x.float()) / len(x)
    for fmt in (tersor.Int4(), tersor.Int4(64), tersor.Ternary(), tersor.Binary()):
        want, _ = gptq(linear[0].weight.detach(), hessian, fmt)
        got = tersor.gptq_(copy.deepcopy(linear), fmt, x)[0]
        assert torch.equal(got.dequantize().weight, want.to(dtype))
        assert got.weight.dtype == dtype


def test_other_formats_come_in_their_turn():
    net = model()
    got = tersor.gptq_(copy.deepcopy(net), {"_default": tersor.Int4(), "0": tersor.Int8Dynamic()}, inputs(2))
    plain = tersor.quantize_(copy.deepcopy(net), {"0": tersor.Int8Dynamic()})
    assert torch.equal(got[0].weight_packed, plain[0].weight_packed)
    assert [type(got[i].format).__name__ for i in (0, 2, 4)] == ["Int8Dynamic", "Int4", "Int4"]


def test_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(K, K, bias=False), nn.ReLU(), nn.Linear(K, K, bias=False)).eval()
    net[2].weight = net[0].weight
    got = tersor.gptq_(net, tersor.Int4(), inputs(2))
    assert got[0].weight_packed is got[2].weight_packed


def test_gptq_refusals_leave_the_model():
    net = model()
    with pytest.raises(ValueError, match="NaN or inf on the inputs"):
        tersor.gptq_(net, tersor.Int4(), torch.full((4, K), torch.nan))
    net.unused = nn.Linear(K, K)
    net.forward = lambda x: net[0](x)
    with pytest.raises(ValueError, match="never reach 2, 4, unused"):
        tersor.gptq_(net, tersor.Int4(), inputs(2))
    assert not any(isinstance(m, tersor.QuantLinear) for m in net.modules())


def test_every_rounded_format_chooses_codes_one_by_one():
    for cls in ROUNDED:
        column = torch.tensor([[0.9], [-0.2], [3.0]])
        assert cls().codes(column, torch.ones(3, 1)).shape == (3, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_brings_the_means_together(bias):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(K, 32, bias=bias)).eval()
    x = inputs(2) + 1
    packed = tersor.quantize_(copy.deepcopy(net), tersor.Ternary())
    before = (packed(x) - net(x)).mean(0).norm()
    kept = [p.clone() for p in net.parameters()]
    assert tersor.correct_bias_(packed, net, [x[:200], x[200:]]) is packed
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))
    # What is left comes from the activations, whose rounding has no mean of its own.
    assert (packed(x) - net(x)).mean(0).norm() <= 0.02 * before
    by = (net[0].weight - packed[0].dequantize().weight).double() @ x.double().mean(0)
    want = by if net[0].bias is None else by + net[0].bias.double()
    assert torch.allclose(packed[0].bias.double(), want, rtol=1e-6, atol=1e-7)


def test_bias_correction_needs_the_float_layers():
    packed = tersor.quantize_(model(), tersor.Int4())
    with pytest.raises(ValueError, match="reference has nothing at 0"):
        tersor.correct_bias_(packed, nn.Sequential(), inputs(2))
    with pytest.raises(ValueError, match="holds no QuantLinear"):
        tersor.correct_bias_(model(), model(), inputs(2))


def test_a_corrected_model_is_saved_and_loaded(tmp_path):
    packed = tersor.correct_bias_(tersor.quantize_(model(), tersor.Ternary()), model(), inputs(2))
    tersor.save(packed, tmp_path / "m.safetensors")
    again = tersor.load_(model(), tmp_path / "m.safetensors")
    assert torch.equal(again(inputs(3)), packed(inputs(3)))
