"""QuantLinear as a module: accuracy, casts, devices, state, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
from cases import FORMATS, INT8, SPARSE_FLOAT, assert_equal, fitting
from torch import nn

import tersor
from tersor import Int8Dynamic, Int8Static, Int8WeightOnly, QuantLinear, formats


@pytest.fixture(params=FORMATS, ids=repr)
def fmt(request):
    return request.param


@pytest.fixture
def k(fmt):
    return fitting(fmt, 70)


@pytest.fixture
def layer(fmt, k):
    return QuantLinear.from_linear(nn.Linear(k, 37), fmt)


@pytest.mark.parametrize("k", [64, 768, 4096])
@pytest.mark.parametrize("m", [1, 32])
def test_relative_error(m: int, k: int):
    linear = nn.Linear(k, 512)
    x = torch.randn(m, k)
    want = linear(x)
    for fmt, bound in ((Int8Dynamic(), 0.010), (Int8WeightOnly(), 0.008)):
        got = QuantLinear.from_linear(linear, fmt)(x)
        assert ((got - want).norm() / want.norm()).item() <= bound


def test_stored_tensors_are_what_the_format_lists(k, layer, fmt):
    state = layer.state_dict()
    assert set(state) == {"bias", "_extra_state"} | {spec.name for spec in fmt.tensors(37, k)}
    assert {"weight_packed", "weight_scale"} < set(state)
    for spec in fmt.tensors(37, k):
        assert state[spec.name].dtype == spec.dtype
        assert spec.varies or tuple(state[spec.name].shape) == spec.shape
        assert (spec.name in dict(layer.named_parameters())) == spec.parameter
    assert not layer.weight_packed.requires_grad
    assert layer.bias.requires_grad


def test_quantises_in_row_blocks_like_in_one(k, fmt, monkeypatch):
    linear = nn.Linear(k, 100)
    want = QuantLinear.from_linear(linear, fmt).state_dict()
    monkeypatch.setattr("tersor.weights._BLOCK_ELEMENTS", k * 32)
    got = QuantLinear.from_linear(linear, fmt).state_dict()
    for name, value in want.items():
        assert_equal(got[name], value)


def test_dequantize_is_within_half_a_step(k, fmt):
    linear = nn.Linear(k, 37)
    layer = QuantLinear.from_linear(linear, fmt)
    back = layer.dequantize()
    if fmt in INT8:
        step = layer.weight_scale.unsqueeze(1)
        assert ((back.weight - linear.weight).abs() <= step * 0.5001).all()
        assert_equal(QuantLinear.from_linear(back, fmt).weight_packed, layer.weight_packed)
    assert back.bias is linear.bias


def test_zero_rows_and_bad_weights(k, fmt):
    linear = nn.Linear(k, 20)
    with torch.no_grad():
        linear.weight[3] = 0
        linear.weight[4] = 1e-40
    layer = QuantLinear.from_linear(linear, fmt)
    if fmt != tersor.Ternary("tensor"):  # one scale for all rows
        assert layer.weight_scale[3] == 0
        assert layer.weight_scale[4] == 0
    assert_equal(layer(torch.randn(2, k))[:, 3], linear.bias[3].expand(2).detach().clone())
    with torch.no_grad():
        linear.weight[7, 1] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN or inf in rows 0 to 19"):
        QuantLinear.from_linear(linear, fmt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts(k, layer, dtype):
    scale = layer.weight_scale.clone()
    x = torch.randn(3, k)
    cast = copy.deepcopy(layer).to(dtype)
    assert_equal(cast.weight_scale, scale)
    assert cast.bias.dtype == dtype
    assert cast.weight_packed.dtype == torch.uint8
    assert cast.weight.dtype == dtype
    assert cast.weight.shape == (37, k)
    assert torch.isnan(cast.weight.float()).all()
    assert cast(x.to(dtype)).dtype == dtype
    assert_equal(cast.float().weight_scale, scale)  # there and back loses nothing
    with pytest.raises(TypeError, match=r"Module.type"):
        layer.type(dtype)
    assert_equal(layer.weight_scale, scale)


def test_meta_and_to_empty(k, layer, fmt):
    meta = QuantLinear(k, 37, format=fmt, device="meta")
    assert meta(torch.randn(4, k, device="meta")).shape == (4, 37)
    real = meta.to_empty(device="cpu")
    real.load_state_dict(layer.state_dict())
    x = torch.randn(4, k)
    assert_equal(real(x), layer(x))
    with torch.device("meta"):
        assert QuantLinear(k, 37, format=fmt).weight_packed.is_meta
    assert layer.to("meta").weight_scale.is_meta


def test_state_round_trips(k, layer, fmt, tmp_path):
    x = torch.randn(5, k)
    want = layer(x)
    fresh = QuantLinear(k, 37, format=fmt)
    fresh.load_state_dict(layer.state_dict())
    assert_equal(fresh(x), want)
    assigned = QuantLinear(k, 37, format=fmt, device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    assert_equal(assigned(x), want)
    torch.save(layer.state_dict(), tmp_path / "a.pth")
    loaded = QuantLinear(k, 37, format=fmt)
    loaded.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True))
    assert_equal(loaded(x), want)
    safetensors.torch.save_model(layer, str(tmp_path / "a.safetensors"))
    loaded = QuantLinear(k, 37, format=fmt)
    safetensors.torch.load_model(loaded, str(tmp_path / "a.safetensors"))
    assert_equal(loaded(x), want)


def test_state_of_another_layer_is_refused(k, layer, fmt):
    other = next(f for f in FORMATS if f != fmt)
    with pytest.raises(ValueError, match="the state is in format"):
        QuantLinear(k, 37, format=other).load_state_dict(layer.state_dict(), strict=False)
    if fitting(fmt, k - 1) == k - 1:
        with pytest.raises(ValueError, match=f"the state is of a layer with out_features=37, in_features={k}"):
            QuantLinear(k - 1, 37, format=fmt).load_state_dict(layer.state_dict())  # the same tiles, another K
    state = layer.state_dict()
    state["_extra_state"] = torch.tensor(list(b"{nonsense"), dtype=torch.uint8)
    with pytest.raises(ValueError, match="tag is not JSON"):
        QuantLinear(k, 37, format=fmt).load_state_dict(state)


def test_copies(k, layer):
    x = torch.randn(2, k)
    assert_equal(copy.deepcopy(layer)(x), layer(x))
    assert_equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert_equal(layer.share_memory()(x), layer(x))


def test_wrong_k_by_less_than_a_tile(k, layer):
    with pytest.raises(ValueError, match=rf"QuantLinear: x is \[2, {k - 1}\], expected \[..., {k}\]"):
        layer(torch.randn(2, k - 1))
    with pytest.raises(ValueError, match=rf"QuantLinear: x is \[\], expected \[..., {k}\]"):
        layer(torch.tensor(1.0))


def test_trains_bias_and_input(k, layer):
    x = torch.randn(4, k, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.bias.grad.abs().sum() > 0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    before = layer.weight_packed.clone()
    optimizer.step()
    assert_equal(layer.weight_packed.data, before)


def test_made_under_inference_mode(fmt):
    with torch.inference_mode():
        layer = QuantLinear.from_linear(nn.Linear(32, 8), fmt)
    assert not layer.weight_packed.is_inference()
    assert not layer.weight_scale.is_inference()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(k, layer, backend):
    torch._dynamo.reset()  # each format is a recompilation of the same forward, of which torch allows eight
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for m in (3, 5, 17):
        x = torch.randn(m, k)
        assert_equal(compiled(x), layer(x))
    x = torch.randn(3, k, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None


def test_repr_and_arguments(k, layer, fmt):
    assert repr(layer) == f"QuantLinear(in_features={k}, out_features=37, bias=True, format={fmt.stored()!r})"
    with pytest.raises(TypeError, match="format is 'int8', expected a format"):
        QuantLinear(4, 4, format="int8")
    with pytest.raises(ValueError, match="in_features=132105 is above 132104"):
        tersor.QuantLinear(132105, 4, device="meta")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("weight_packed", torch.int8), ("weight_scale", torch.float16)])
def test_state_of_another_dtype_is_not_cast(layer, name, dtype, assign):
    model = nn.Sequential(layer)
    state = model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    state[f"0.{name}"] = state[f"0.{name}"].to(dtype)
    with pytest.raises(RuntimeError, match=f"0.{name} is {dtype}, expected .*; a cast would change the layer"):
        model.load_state_dict(state, assign=assign)
    for key, value in model.state_dict().items():
        assert_equal(value, before[key])


# ---- Int8Static: a scale that is known -------------------------------------------------------------------------------------------


def test_formats_are_all_covered():
    assert {type(fmt) for fmt in [*FORMATS, SPARSE_FLOAT]} == set(formats.FORMATS.values())


def test_known_scale_is_stored_and_may_be_set_later():
    linear = nn.Linear(40, 24)
    x = torch.randn(5, 40)
    layer = QuantLinear.from_linear(linear, Int8Static(x.abs().max().item() / 127))
    assert layer.format == Int8Static()
    assert layer.input_scale.dtype == torch.float32
    with torch.no_grad():
        want = linear(x)
        assert (layer(x) - want).norm() < 0.02 * want.norm()
        coarse = layer(x * 50)  # saturates
        layer.input_scale.mul_(50)
        assert (layer(x * 50) - linear(x * 50)).norm() < (coarse - linear(x * 50)).norm() / 10
    assert layer.half().input_scale.dtype == torch.float32
    loaded = QuantLinear(40, 24, format=Int8Static(), dtype=torch.float16)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.input_scale, layer.input_scale)
    assert b"input_scale" not in bytes(layer.get_extra_state().tolist())


@pytest.mark.parametrize("value", [0, -0.1, torch.nan, torch.inf, "0.1"])
def test_known_scale_must_be_a_positive_number(value):
    with pytest.raises(ValueError, match="Int8Static: input_scale is .*expected a positive number"):
        Int8Static(value)


def test_known_scale_is_needed():
    with pytest.raises(ValueError, match="Int8Static: input_scale is missing; give the largest"):
        QuantLinear.from_linear(nn.Linear(4, 4), Int8Static())
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="input_scale is missing"):
        tersor.quantize_(model, {"0": Int8Static(0.1), "_default": Int8Static()})
    assert type(model[0]) is nn.Linear


def test_tag_with_a_scale_in_it_is_refused():
    layer = QuantLinear.from_linear(nn.Linear(4, 4), Int8Static(0.1))
    forged = bytes(layer.get_extra_state().tolist()).replace(b'"int8-static"', b'"int8-static", "input_scale": 3')
    with pytest.raises(ValueError, match="format 'int8-static' has unknown fields: input_scale"):
        layer.set_extra_state(torch.tensor(list(forged), dtype=torch.uint8))
