"""Int4, Ternary, Binary and BinaryXnor as formats: which codes a weight gets, what is stored and how much, and what a layer computes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from cases import FEW_BITS, FORMATS, assert_equal, assert_within, fitting
from torch import nn

import tersor
import tersor.ops as ops
from tersor import Binary, BinaryXnor, Int4, Int8Dynamic, QuantLinear, Ternary
from tersor.formats import format_from_dict
from tersor.weights import CLIP_RATIOS

N, K = 37, 256


@pytest.fixture(params=FEW_BITS, ids=repr)
def fmt(request):
    return request.param


def normal(n: int = N, k: int = K, seed: int = 0) -> nn.Linear:
    linear = nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
    return linear


def error(fmt, weight: torch.Tensor) -> float:
    """Relative error of the stored weight, root mean square."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight)
    back = QuantLinear.from_linear(linear, fmt).dequantize().weight
    return ((back.double() - weight.double()).norm() / weight.double().norm()).item()


# ---- which codes


def test_the_parts_of_a_quantiser_make_the_whole(fmt):
    """scales, steps, codes are what training uses: a conversion must give the same."""
    linear = normal()
    layer = QuantLinear.from_linear(linear, fmt)
    scales = fmt.scales(linear.weight.detach())
    for name, value in scales.items():
        assert_equal(value, getattr(layer, name).detach())
    steps = fmt.steps(scales, N, K)
    groups = K // 32 if fmt == Int4(32) else 1
    assert steps.dtype == torch.float32 and steps.shape == (N, groups)
    codes = fmt.codes(linear.weight.detach(), steps)
    assert codes.dtype == torch.int8 and codes.shape == (N, K)
    assert_equal(ops.to_rows(layer.weight_packed, N, K, fmt.bits), codes)
    back = (codes.view(N, groups, -1).float() * steps.unsqueeze(-1)).view(N, K)
    assert_equal(layer.dequantize().weight.detach(), back)
    parts = fmt.quantize(linear.weight.detach(), scales)
    assert_equal(parts["weight_packed"], layer.weight_packed.detach())


def test_int8_has_the_same_parts():
    weight = normal().weight.detach()
    for fmt in (Int8Dynamic(), tersor.Int8WeightOnly()):
        scales = fmt.scales(weight)
        layer = QuantLinear.from_linear(normal(), fmt)
        assert_equal(scales["weight_scale"], layer.weight_scale)
        codes = fmt.codes(weight, fmt.steps(scales, N, K))
        assert_equal(ops.to_rows(layer.weight_packed, N, K), codes)


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_int4_beats_rounding_to_the_absmax(group_size):
    for weight in (normal().weight.detach(), torch.distributions.StudentT(4.0).sample((N, K)), torch.rand(N, K) - 0.5):
        groups = weight.view(N, -1, group_size or K)
        step = groups.abs().amax(-1, keepdim=True) / 7
        plain = (((groups / step).round() * step - groups).norm() / weight.norm()).item()
        # never worse but for the float16 of a group's scale: 2^-11 of a step
        assert error(Int4(group_size), weight) <= plain * 1.001
    weight = torch.randn(64, 4096)
    step = weight.view(64, -1, group_size or 4096).abs().amax(-1, keepdim=True) / 7
    plain = (((weight.view(64, -1, group_size or 4096) / step).round() * step).view(64, 4096) - weight).norm() / weight.norm()
    assert error(Int4(group_size), weight) < plain.item() * {None: 0.80, 128: 0.95, 64: 0.98, 32: 0.995}[group_size]


def test_int4_finds_the_best_of_its_steps():
    """Against every ratio by plain arithmetic in float64."""
    weight = normal(20, 64).weight.detach()
    absmax = weight.abs().amax(1, keepdim=True).double()
    errors = []
    for ratio in CLIP_RATIOS:
        step = absmax * ratio / 7
        errors.append((((weight.double() / step).clamp(-8, 7).round() * step - weight.double()) ** 2).sum(1))
    layer = Int4().scales(weight)["weight_scale"].double()
    own = (((weight.double() / layer[:, None]).clamp(-8, 7).round() * layer[:, None] - weight.double()) ** 2).sum(1)
    assert_within(own, torch.stack(errors).amin(0), 1e-5 * own)
    assert len({round(float(s), 4) for s in layer / absmax[:, 0] * 7}) > 2  # not one ratio for all


def test_int4_uses_the_code_that_has_no_positive_twin():
    weight = torch.zeros(1, 32)
    weight[0, 0] = -1.0
    weight[0, 1:9] = torch.arange(8) / 8
    layer = QuantLinear.from_linear(from_weight(weight), Int4())
    assert error(Int4(), weight) < 1e-6
    assert ops.to_rows(layer.weight_packed, 1, 32, 4)[0, 0] == -8


def test_group_scales_are_relative_and_rounded_before_the_codes():
    weight = normal(33, 256).weight.detach() * torch.logspace(-3, 0, 8).repeat_interleave(32)
    fmt = Int4(32)
    scales = fmt.scales(weight)
    relative = ops.group_scales(scales["group_scale"], 33)
    assert relative.amax(1).eq(1).all()
    assert (relative > 0).all() and (relative <= 1).all()
    steps = fmt.steps(scales, 33, 256)
    assert_equal(steps, scales["weight_scale"].unsqueeze(1) * relative.half().float())
    layer = QuantLinear.from_linear(from_weight(weight), fmt)
    stored = layer.dequantize().weight.detach()
    ratio = stored.view(33, 8, 32) / steps.unsqueeze(-1)
    assert (ratio - ratio.round()).abs().max() < 1e-5
    # scales of their own are what groups are for: of the channel's a group of small weights would keep nothing
    small = slice(0, 32)
    assert (stored[:, small] - weight[:, small]).norm() < 0.12 * weight[:, small].norm()
    assert (QuantLinear.from_linear(from_weight(weight), Int4()).dequantize().weight[:, small] == 0).all()


def from_weight(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight)
    return linear


def test_ternary_is_absmean():
    weight = normal().weight.detach()
    for granularity, mean in (("channel", weight.abs().mean(1, keepdim=True)), ("tensor", weight.abs().mean())):
        fmt = Ternary(granularity)
        scales = fmt.scales(weight)
        assert scales["weight_scale"].shape == (N,)
        assert_within(scales["weight_scale"], mean.expand(N, 1).squeeze(1), 1e-6)
        codes = fmt.codes(weight, fmt.steps(scales, N, K))
        want = torch.round((weight / mean).clamp(-1, 1))
        assert (codes != want).float().mean() < 1e-3  # ties of a mean summed in another order
    by_hand = torch.tensor([[0.5, -0.5, 0.24, -0.26, 2.0, -0.1, 0.4, 0.0]])  # mean 0.5
    assert Ternary().codes(by_hand, torch.tensor([[0.5]])).tolist() == [[1, -1, 0, -1, 1, 0, 1, 0]]
    # half a step is a tie, to even
    assert Ternary().codes(torch.tensor([[0.25, -0.25, 0.75, -0.75]]), torch.tensor([[0.5]])).tolist() == [[0, 0, 1, -1]]


def test_one_scale_for_all_rows_needs_all_rows(monkeypatch):
    weight = torch.cat([torch.full((16, 64), 0.1), torch.full((16, 64), 0.3), torch.full((5, 64), 0.5)])
    monkeypatch.setattr("tersor.weights._BLOCK_ELEMENTS", 64 * 16)  # three blocks
    layer = QuantLinear.from_linear(from_weight(weight), Ternary("tensor"))
    mean = float(weight.double().mean())
    assert_within(layer.weight_scale, torch.full((37,), mean), 1e-7)
    assert ops.to_rows(layer.weight_packed, 37, 64, 2).float().mean(1).tolist() == [0.0] * 16 + [1.0] * 21
    assert_equal(layer.dequantize().weight.detach()[16:], torch.full((21, 64), layer.weight_scale[0].item()))


def test_binary_is_sign_and_mean():
    weight = normal().weight.detach().clone()
    weight[0, :3] = torch.tensor([0.0, -0.0, -1e-30])
    for fmt in (Binary(), BinaryXnor()):
        scales = fmt.scales(weight)
        assert_within(scales["weight_scale"], weight.abs().mean(1), 1e-7)
        codes = fmt.codes(weight, fmt.steps(scales, N, K))
        assert codes[0, :3].tolist() == [1, 1, -1]  # sign(0) = +1, of -0.0 too
        assert_equal(codes, torch.where(weight >= 0, 1, -1).to(torch.int8))


def test_tiny_weights_give_zero(fmt):
    weight = torch.full((20, 64), 2.0**-102)
    layer = QuantLinear.from_linear(from_weight(weight), fmt)
    assert (layer.weight_scale == 0).all()
    assert_equal(layer.dequantize().weight.detach(), torch.zeros(20, 64))
    assert_equal(layer(torch.randn(3, 64)), layer.bias.detach().expand(3, 20))
    codes = ops.to_rows(layer.weight_packed, 20, 64, fmt.bits)
    assert (codes == (1 if fmt.bits == 1 else 0)).all()


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**100, 3e37])
def test_any_magnitude(fmt, scale):
    weight = normal().weight.detach() / 0.05 / 4
    want = QuantLinear.from_linear(from_weight(weight), fmt)
    got = QuantLinear.from_linear(from_weight(weight * scale), fmt)
    if scale != 3e37:  # a power of two changes no rounding
        assert_equal(got.weight_packed.detach(), want.weight_packed.detach())
        assert_equal(got.weight_scale, want.weight_scale * scale)
    assert torch.isfinite(got.weight_scale).all()
    assert abs(error(fmt, weight * scale) - error(fmt, weight)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes(fmt, dtype):
    linear = normal().to(dtype)
    got, want = QuantLinear.from_linear(linear, fmt), QuantLinear.from_linear(from_weight(linear.weight.detach().float()), fmt)
    for name, value in fmt.scales(linear.weight.detach()).items():
        assert_equal(value, getattr(want, name).detach())
    assert_equal(got.weight_packed.detach(), want.weight_packed.detach())
    assert got(torch.randn(3, K).to(dtype)).dtype == dtype


def test_no_thread_count_shows_in_a_weight(fmt):
    linear = normal(300, 1024)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(QuantLinear.from_linear(linear, fmt).state_dict())
    for other in results[1:]:
        for name, value in other.items():
            assert_equal(value, results[0][name])


# Relative errors of weights N(0, 1) at K = 1024, as docs/formats.md has them. Binary by theory: sqrt(1 - 2 / pi).
NORMAL_ERRORS = {"Int4()": 0.1085, "Int4(group_size=32)": 0.0875, "Binary()": 0.603, "BinaryXnor()": 0.603}
TERNARY_ERROR = 0.513


def test_error_on_normal_weights(fmt):
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    known = NORMAL_ERRORS.get(repr(fmt), TERNARY_ERROR)
    assert known * 0.99 < error(fmt, weight) < known * 1.01


def test_layer_is_near_the_product_with_its_weights(fmt):
    linear = normal()
    layer = QuantLinear.from_linear(linear, fmt)
    x = torch.randn(9, K)
    weight = layer.dequantize().weight
    if fmt == BinaryXnor():
        layer.threshold.uniform_(-0.5, 0.5)
        binary = torch.where(x >= layer.threshold, 1.0, -1.0) * (x - layer.threshold).abs().mean(1, keepdim=True)
        want = binary @ weight.t() + linear.bias
        assert ((layer(x) - want).norm() / want.norm()).item() < 1e-5
        return
    want = x @ weight.t() + linear.bias
    assert ((layer(x) - want).norm() / want.norm()).item() < 0.012  # the error of int8 activations


# ---- what is stored


RATIO = {8: 4, 4: 8, 2: 16, 1: 32}


def test_storage_is_as_small_as_promised(fmt, tmp_path):
    """Against float32, in the file and in memory: 8, 16 and 32 times, but for the scales: a few bytes a channel or group."""
    n, k = 1024, 4096
    model = nn.Sequential(nn.Linear(k, n, bias=False))
    floats = n * k * 4
    tersor.quantize_(model, fmt)
    scales = 4 * n + (2 * n * k // 32 if fmt == Int4(32) else 0) + (4 * k if fmt == BinaryXnor() else 0)
    tiles = floats // RATIO[fmt.bits]
    held = [*model.parameters(), *model.buffers()]
    assert sum(t.untyped_storage().nbytes() for t in held) == tiles + scales
    path = tmp_path / "m.safetensors"
    tersor.save(model, path)
    assert tiles + scales < path.stat().st_size < tiles + scales + 2048  # header, tag
    assert path.stat().st_size < floats / RATIO[fmt.bits] * (1.27 if fmt == Int4(32) else 1.04)
    loaded = tersor.load_(nn.Sequential(nn.Linear(k, n, bias=False)), path)
    x = torch.randn(2, k)
    assert_equal(loaded(x), model(x))


def test_bytes_in_a_file(tmp_path):
    """Names, dtypes and shapes: what another reader of the file finds."""
    want = {
        repr(Int4()): {"weight_packed": ("U8", [3, 32, 64]), "weight_scale": ("F32", [N])},
        repr(Int4(32)): {"weight_packed": ("U8", [3, 32, 64]), "weight_scale": ("F32", [N]), "group_scale": ("U8", [3, 8, 32])},
        repr(Ternary()): {"weight_packed": ("U8", [3, 16, 64]), "weight_scale": ("F32", [N])},
        repr(Ternary("tensor")): {"weight_packed": ("U8", [3, 16, 64]), "weight_scale": ("F32", [N])},
        repr(Binary()): {"weight_packed": ("U8", [3, 8, 64]), "weight_scale": ("F32", [N])},
        repr(BinaryXnor()): {"weight_packed": ("U8", [3, 8, 64]), "weight_scale": ("F32", [N]), "threshold": ("F32", [K])},
    }
    for fmt in FEW_BITS:
        path = tmp_path / "m.safetensors"
        tersor.save(nn.Sequential(QuantLinear.from_linear(normal(), fmt)), path, overwrite=True)
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        found = {key[2:]: (entry["dtype"], entry["shape"]) for key, entry in header.items() if key.startswith("0.")}
        assert found.pop("bias") == ("F32", [N])
        assert found.pop("_extra_state")[0] == "U8"
        assert found == want[repr(fmt)]


def test_tags(fmt):
    tag = json.loads(bytes(QuantLinear.from_linear(normal(), fmt).get_extra_state().tolist()))["format"]
    assert tag["name"] == fmt.tag
    assert format_from_dict(tag) == fmt
    assert eval(repr(fmt), vars(tersor)) == fmt


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "int4", "group_size": 48}, "group_size is 48, expected None or one of: 32, 64, 128"),
        ({"name": "int4", "group_size": 32.0}, "group_size is 32.0"),
        ({"name": "int4", "group_size": True}, "group_size is True"),
        ({"name": "int4", "group_size": [32]}, r"group_size is \[32\]"),
        ({"name": "int4", "bits": 3}, "unknown fields: bits"),
        ({"name": "int4", "op": "x"}, "unknown fields: op"),
        ({"name": "ternary", "granularity": "block"}, "granularity is 'block', expected 'channel' or 'tensor'"),
        ({"name": "ternary", "granularity": None}, "granularity is None"),
        ({"name": "binary-xnor", "threshold": 0}, "unknown fields: threshold"),
    ],
    ids=str,
)
def test_forged_tags(data, message):
    with pytest.raises((ValueError, TypeError), match=message):
        format_from_dict(data)


def test_square_layer_keeps_thresholds_and_channels_apart():
    """threshold is [K] and weight_scale [N], of one length here: only one of them follows the channels."""
    parts = {spec.name: tuple(spec.part(torch.empty(spec.shape), 32, 50).shape) for spec in BinaryXnor().tensors(300, 300)}
    assert parts == {"weight_packed": (2, 10, 64), "weight_scale": (18,), "threshold": (300,)}
    layer = QuantLinear.from_linear(normal(300, 300), BinaryXnor())
    layer.threshold.copy_(torch.linspace(-1, 1, 300))
    before = layer.dequantize().weight.detach()
    assert_equal(before[299].abs(), layer.weight_scale[299].expand(300))
    model = tersor.dequantize_(nn.Sequential(layer))
    assert_equal(model[0].weight.detach(), before)


def test_threshold_moves_casts_and_loads(tmp_path):
    layer = QuantLinear.from_linear(normal(), BinaryXnor())
    assert (layer.threshold == 0).all() and layer.threshold.dtype == torch.float32
    x = torch.randn(5, K)
    plain = layer(x)
    layer.threshold.copy_(torch.linspace(-1, 1, K))
    want = layer(x)
    assert not torch.equal(want, plain)
    assert layer.half().float().threshold.dtype == torch.float32
    assert_equal(layer.half().threshold, torch.linspace(-1, 1, K))
    assert layer.to("meta").threshold.is_meta
    layer = QuantLinear.from_linear(normal(), BinaryXnor())
    layer.threshold.copy_(torch.linspace(-1, 1, K))
    tersor.save(nn.Sequential(layer), tmp_path / "m.safetensors")
    loaded = tersor.load_(nn.Sequential(nn.Linear(K, N)), tmp_path / "m.safetensors")
    assert_equal(loaded[0].threshold, layer.threshold)
    assert_equal(loaded(x), layer(x))
    layer.bfloat16()
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_group_scales_are_frozen_bytes():
    layer = QuantLinear.from_linear(normal(), Int4(32))
    before = layer.group_scale.detach().clone()
    assert not layer.group_scale.requires_grad and layer.group_scale.dtype == torch.uint8
    for cast in (layer.half, layer.bfloat16, layer.double, layer.float):
        assert_equal(cast().group_scale.detach(), before)


# ---- a group size that does not fit


def test_group_size_must_divide_k():
    for size, k, message in (
        (128, 192, r"Int4\(group_size=128\): group_size 128 must divide in_features=192; those that do: 32, 64"),
        (64, 96, "group_size 64 must divide in_features=96; those that do: 32"),
        (32, 70, r"must divide in_features=70; no group size does, use Int4\(\)"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantLinear.from_linear(nn.Linear(k, 8), Int4(size))
        model = nn.Sequential(nn.Linear(128, 8), nn.Linear(k, 8))
        with pytest.raises(ValueError, match=f"quantize_: 1: .*{message}; nothing was changed"):
            tersor.quantize_(model, Int4(size))
        assert type(model[0]) is nn.Linear
    for size in (0, 16, 256, -32, "32", 32.0, True):
        with pytest.raises(ValueError, match="Int4: group_size is .*, expected None or one of: 32, 64, 128"):
            Int4(size)
    with pytest.raises(ValueError, match="Ternary: granularity is 'row', expected 'channel' or 'tensor'"):
        Ternary("row")


def test_mixed_formats_by_name():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    tersor.quantize_(model, {"0": Int8Dynamic(), "4": Int8Dynamic(), "_default": Ternary()})
    assert [type(m.format) for m in model if isinstance(m, QuantLinear)] == [Int8Dynamic, Ternary, Int8Dynamic]
    tersor.quantize_(other := nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 10)), {"0": Int4(), "1": Int4(32)})
    assert other(torch.randn(3, 70)).shape == (3, 10)


@pytest.mark.parametrize(
    ("pair", "fmt"),
    [((4, "int8"), Int4()), ((2, "int8"), Ternary()), ((1, "int8"), Binary()), ((1, "binary"), BinaryXnor())],
)
def test_by_bits(pair, fmt):
    net = tersor.quantize_weights(nn.Sequential(nn.Linear(40, 20)), num_bits=pair[0], activations=pair[1])
    assert net[0].format == fmt


@pytest.mark.parametrize("pair", [(4, None), (2, "binary"), (1, None), (3, "int8"), (8, "binary"), (4.0, "int8"), (True, "int8")])
def test_pairs_of_bits_that_do_not_exist(pair):
    pairs = r"\(8, 'int8'\), \(8, None\), \(4, 'int8'\), \(2, 'int8'\), \(1, 'int8'\), \(1, 'binary'\)"
    with pytest.raises(ValueError, match=rf"\(num_bits, activations\) is .*, expected one of: {pairs}"):
        tersor.quantize_weights(nn.Sequential(nn.Linear(4, 4)), *pair)


def test_tied_weights_share_what_is_packed(fmt):
    k = fitting(fmt, 40)
    a, b = nn.Linear(k, 20), nn.Linear(k, 20)
    b.weight = a.weight
    model = tersor.quantize_(nn.Sequential(a, b), fmt)
    assert model[0].weight_packed is model[1].weight_packed
    assert all(f in FORMATS for f in (model[0].format, model[1].format))


@pytest.mark.parametrize("fmt", [tersor.Int8Static, tersor.BinaryXnor])
def test_tied_weights_keep_numbers_of_their_own(fmt, tmp_path: Path):
    def model() -> nn.Module:
        net = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
        net["b"].weight = net["a"].weight
        return net

    static = fmt is tersor.Int8Static
    net = tersor.quantize_(model(), {"a": fmt(0.01), "b": fmt(0.5)} if static else fmt())
    name = "input_scale" if static else "threshold"
    if not static:
        net["b"].threshold.fill_(0.5)
    assert net["a"].weight_packed is net["b"].weight_packed
    want = (0.01, 0.5) if static else (0.0, 0.5)
    assert tuple(getattr(net[key], name).max().item() for key in "ab") == pytest.approx(want)
    tersor.save(net, tmp_path / "tied.safetensors")
    loaded = tersor.load_(model(), tmp_path / "tied.safetensors")
    assert loaded["a"].weight_packed is loaded["b"].weight_packed
    assert tuple(getattr(loaded[key], name).max().item() for key in "ab") == pytest.approx(want)
