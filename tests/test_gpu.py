"""The op suite on a GPU, against the references on the CPU: `pytest -m gpu` where there is one. The checks are functions of a device
and run on the CPU here too, so that they are known to work before a GPU sees them."""

import copy

import pytest
import torch
from cases import (
    ALL_WIDTHS,
    EPS,
    FORMATS,
    GROUPED_CASES,
    INPUT_SCALE,
    LARGE_K,
    Case,
    GroupedCase,
    assert_equal,
    assert_within,
    epilogue_bound,
    fitting,
)
from test_cuda import pruned_24
from torch import Tensor

import tersor
import tersor.ops as ops

CPU = torch.device("cpu")
DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)]
ROW_COUNTS = (1, 3, 16, 17, 64, 130)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
on_devices = pytest.mark.parametrize("device", DEVICES)


def moved(device: torch.device, *values):
    return [v.to(device) if isinstance(v, Tensor) else v for v in values]


def some(cases: list, device: torch.device) -> list:
    """All of them on a GPU, a few on the CPU, which has suites of its own."""
    return cases if device.type == "cuda" else cases[:: max(1, len(cases) // 12)]


@on_devices
def test_rows_are_quantised_bit_for_bit(device):
    for m in ROW_COUNTS:
        for k in (1, 63, 64, 1000):
            for dtype in FLOATS:
                x = torch.randn(m, k).to(dtype)
                x[0, 0] = torch.nan if m > 1 else x[0, 0]
                for got, want in zip(ops.quantize_rows(x.to(device)), ops.quantize_rows.reference(x), strict=True):
                    assert_equal(got.cpu(), want)
                strided = torch.randn(k, m).to(dtype).t()
                for got, want in zip(
                    ops.quantize_static(*moved(device, strided, INPUT_SCALE)),
                    ops.quantize_static.reference(strided, INPUT_SCALE),
                    strict=True,
                ):
                    assert_equal(got.cpu(), want)
                threshold = torch.randn(k)
                bits, scale = ops.binarize_rows(*moved(device, x, threshold))
                want_bits, want_scale = ops.binarize_rows.reference(x, threshold)
                assert_equal(bits.cpu(), want_bits)
                assert_equal(scale.cpu(), want_scale)


@on_devices
def test_accumulators_are_exact(device):
    shapes = [Case(m, n, k, bits=bits) for m in ROW_COUNTS for n, k in ((33, 97), (48, 128), (1, 1)) for bits in ops.CODES]
    for case in some([*ALL_WIDTHS, *LARGE_K, *shapes], device):
        x, tiles, _, _ = case.make()
        q, _, row_sum = ops.quantize_rows.reference(x)
        got = ops.linear_acc(*moved(device, q, row_sum, tiles), case.n, case.bits)
        assert_equal(got.cpu(), ops.linear_acc.reference(q, row_sum, tiles, case.n, case.bits))


@on_devices
def test_layers_of_every_width_and_epilogue(device):
    for case in some([Case(m, 48, 130, dtype, bits=bits) for m in ROW_COUNTS for dtype in FLOATS for bits in ops.CODES], device):
        x, tiles, scale, bias = case.make()
        for epilogue in ops.EPILOGUES:
            got = ops.linear_dynamic(*moved(device, x, tiles, scale, bias), epilogue, case.bits).cpu()
            want = ops.linear_dynamic.reference(x, tiles, scale, bias, epilogue, case.bits)
            before = ops.linear_s8.reference(*ops.quantize_rows.reference(x), tiles, scale, bias, "none", torch.float32, case.bits)
            # The reference errs by as much as the kernel may.
            assert_within(got, want, 2 * epilogue_bound(case, before, epilogue))
        residual = torch.randn(case.m, case.n).to(case.dtype)
        got = ops.linear_dynamic(*moved(device, x, tiles, scale, bias), "none", case.bits, *moved(device, residual))
        assert_equal(got.cpu(), ops.linear_dynamic.reference(x, tiles, scale, bias, "none", case.bits, residual))


@on_devices
def test_the_cpu_kernels_bits_on_every_device(device):
    for m in ROW_COUNTS:  # class E: equal between native kernels
        for bits in ops.CODES:
            x, tiles, scale, bias = Case(m, 37, 130, bits=bits).make()
            for epilogue in ops.EPILOGUES:
                got = ops.linear_dynamic(*moved(device, x, tiles, scale, bias), epilogue, bits)
                assert_equal(got.cpu(), ops.linear_dynamic(x, tiles, scale, bias, epilogue, bits))
        x, tiles, scale, threshold, bias = Case(m, 37, 130).make_xnor()
        got = ops.linear_xnor(*moved(device, x, tiles, scale, threshold, bias), "gelu")
        assert_equal(got.cpu(), ops.linear_xnor(x, tiles, scale, threshold, bias, "gelu"))


@on_devices
def test_group_scales(device):
    for case in some([*GROUPED_CASES, *(GroupedCase(m, 37, 384, group_size=128) for m in ROW_COUNTS)], device):
        arguments = case.make_grouped()
        got = ops.linear_grouped(*moved(device, *arguments)).cpu().double()
        x, tiles, scale, group_scale, bias = arguments
        q, x_scale, _ = ops.quantize_rows.reference(x)
        relative = ops.group_scales(group_scale, case.n).double().repeat_interleave(case.group_size, 1)
        weight = ops.to_rows(tiles, case.n, case.k, 4).double() * relative
        unit = x_scale.double().unsqueeze(1) * scale.double()
        exact = (q.double() @ weight.t()) * unit + bias.double()
        # Product and sum of each group, two scales, the bias, and the store: class F of docs/numerics.md.
        groups = case.k // case.group_size
        bound = (2 * groups + 5) * EPS[torch.float32] * (q.double().abs() @ weight.abs().t()) * unit.abs()
        bound = (
            bound + (EPS[case.dtype] + EPS[torch.float32]) * 1.01 * exact.abs() + (2.0**-25 if case.dtype == torch.float16 else 0)
        )
        assert_within(got, exact, 1.01 * bound)


@on_devices
@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_and_gated_units(device, dtype):
    for m in ROW_COUNTS:
        for kind in ("layer", "rms"):
            x, residual = torch.randn(m, 130).to(dtype), torch.randn(m, 130).to(dtype)
            weight, bias = torch.randn(130), torch.randn(130) if kind == "layer" else None
            got = ops.norm_quantize(*moved(device, x, residual, weight, bias), 1e-5, kind, True, True)
            for ours, cpu in zip(got, ops.norm_quantize(x, residual, weight, bias, 1e-5, kind, True, True), strict=True):
                assert_equal(ours.cpu(), cpu)
        for bits in ops.CODES:
            x, tiles, scale, bias = Case(m, 96, 130, dtype, bits=bits).make()
            arguments = (x, tiles, scale, bias, "silu", bits)
            assert_equal(ops.linear_glu(*moved(device, *arguments)).cpu(), ops.linear_glu(*arguments))
            for ours, cpu in zip(
                ops.linear_glu_quantize(*moved(device, *arguments)), ops.linear_glu_quantize(*arguments), strict=True
            ):
                assert_equal(ours.cpu(), cpu)


@on_devices
def test_24_weights(device):
    for m in ROW_COUNTS:
        for n, k in ((37, 130), (64, 1024), (1, 3)):
            linear = torch.nn.Linear(k, n)
            with torch.no_grad():
                linear.weight.mul_(pruned_24(n, k) != 0)
            layer = tersor.QuantLinear.from_linear(linear, tersor.SparseInt8())
            x = torch.randn(m, k)
            want = layer(x)
            layer.to(device)
            assert (layer.weight_packed.dim() == 3) == (device.type == "cuda")
            assert_equal(layer(x.to(device)).cpu(), want)
            assert_equal(layer.to(CPU)(x), want)


@on_devices
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_layers_move_and_come_back(device, fmt, tmp_path):
    k = fitting(fmt, 70)
    layer = tersor.QuantLinear.from_linear(torch.nn.Linear(k, 37), fmt)
    x = torch.randn(5, k)
    want, stored = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    there = copy.deepcopy(layer).to(device)
    got = there(x.to(device)).cpu()
    # The formats of class I and E have tests of their own; float sums of K products differ by 2 K eps at most (class F), one rounding
    # of each of the two, and activations that are int8 differ by nothing.
    magnitude = x.double().abs() @ layer.dequantize().weight.detach().double().abs().t() + layer.bias.detach().double().abs()
    assert_within(got, want, 2 * (2 * k + 2) * EPS[torch.float32] * 1.01 * (magnitude + want.detach().double().abs()))
    tersor.save(torch.nn.Sequential(there), tmp_path / "model.safetensors")
    loaded = tersor.load_(torch.nn.Sequential(torch.nn.Linear(k, 37)).to(device), tmp_path / "model.safetensors")
    assert_equal(loaded(x.to(device)).cpu(), got)
    for name, value in there.to(CPU).state_dict().items():
        assert_equal(value, stored[name])


@on_devices
def test_gradients(device):
    layer = tersor.QuantLinear.from_linear(torch.nn.Linear(70, 37)).to(device)
    x = torch.randn(5, 70)
    ours = x.to(device).requires_grad_()
    layer(ours).sum().backward()
    want = layer.dequantize().weight.detach().cpu().sum(0).expand(5, 70)
    assert_within(ours.grad.cpu(), want, 1e-5 * 37)


@pytest.mark.gpu
def test_in_a_cuda_graph_and_compiled():
    device = torch.device("cuda")
    for fmt in FORMATS:
        k = fitting(fmt, 128)
        layer = tersor.QuantLinear.from_linear(torch.nn.Linear(k, 64), fmt).to(device).eval()
        x = torch.randn(20, k, device=device)
        with torch.inference_mode():
            want = layer(x)
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                layer(x)
            side.synchronize()
            if layer.format.op.name in ops.CUDA_KERNELS:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    y = layer(x)
                x.normal_()
                graph.replay()
                assert_equal(y, layer(x))
            assert_equal(torch.compile(layer, fullgraph=True)(x), layer(x))
        assert want.shape == (20, 64)


@pytest.mark.gpu
def test_streams_and_second_devices():
    layer = tersor.QuantLinear.from_linear(torch.nn.Linear(512, 512))
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        there = copy.deepcopy(layer).to(device)
        x = torch.randn(64, 512)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            assert_equal(there(x.to(device)).cpu(), layer(x))
    if torch.cuda.device_count() > 1:
        with pytest.raises(ValueError, match="is on cuda:0"):
            ops.linear_dynamic(torch.randn(2, 512, device="cuda:1"), layer.weight_packed.to("cuda:0"), layer.weight_scale, None)


@pytest.mark.gpu
def test_arguments_on_other_devices_are_refused():
    x, tiles, scale, bias = Case(3, 16, 64).make()
    with pytest.raises(ValueError, match="weight_packed is on cpu"):
        ops.linear_dynamic(x.cuda(), tiles, scale.cuda(), bias.cuda())
    with pytest.raises(ValueError, match=r"weight_packed is on cuda:0"):
        ops.linear_dynamic(x, tiles.cuda(), scale, bias)
