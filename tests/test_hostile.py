"""Inputs that nobody should pass and somebody will: a clear message or the right numbers, never a crash or wrong ones.

Messages of the ops for wrong sizes and dtypes are in test_ops.py, the second line behind them in test_raw_ops.py, of configs in
test_swap.py, of files in test_checkpoint*.py.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from cases import ANY_K, EPS, FORMATS, INPUT_SCALE, INT8, Case, GroupedCase, assert_equal, assert_within, fitting
from torch import nn

import tersor
import tersor.numpy as tn
import tersor.ops as ops
from tersor import Int8Dynamic, QuantLinear

LAYERS = ["linear_dynamic", "linear_weight_only"]
N, K = 20, 24


@pytest.fixture(params=ANY_K, ids=repr)
def layer(request):
    return QuantLinear.from_linear(nn.Linear(K, N), request.param)


@pytest.fixture(params=LAYERS)
def op(request):
    return ops.OPS[request.param]


# ---- what a module is called with


def odd_x():
    x = torch.randn(3, K)
    yield "0-d", torch.tensor(1.0), ValueError, r"QuantLinear: x is \[\], expected \[\.\.\., 24\]"
    yield "K", torch.randn(3, K + 1), ValueError, r"QuantLinear: x is \[3, 25\], expected \[\.\.\., 24\] \(in_features\)"
    yield "K transposed", x.t(), ValueError, r"QuantLinear: x is \[24, 3\], expected"
    yield "float64", x.double(), TypeError, "x is torch.float64, expected float32, bfloat16 or float16"
    yield "integer", x.long(), TypeError, "x is torch.int64, expected float32"
    yield "bool", x.bool(), TypeError, "x is torch.bool, expected float32"
    yield "complex", x.to(torch.complex64), TypeError, "x is torch.complex64, expected float32"
    yield "float8", x.to(torch.float8_e4m3fn), TypeError, "x is torch.float8_e4m3fn, expected float32"
    yield "sparse", x.to_sparse(), TypeError, r"x is torch.sparse_coo, expected a dense tensor; call .to_dense\(\)"
    yield "csr", x.to_sparse_csr(), TypeError, "x is torch.sparse_csr, expected a dense tensor"
    yield "mkldnn", x.to_mkldnn(), TypeError, "x is torch._mkldnn, expected a dense tensor"
    yield "meta", x.to("meta"), ValueError, "weight_packed is on cpu, x on meta; move the module or x so that they meet"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("x", "error", "message"), [pytest.param(*rest, id=name) for name, *rest in odd_x()])
def test_odd_x(layer, x, error, message):
    with pytest.raises(error, match=message):
        layer(x)
    with pytest.raises(error, match=message), torch.no_grad():
        layer.bfloat16()(x)


def test_layer_on_another_device(layer):
    with pytest.raises(ValueError, match="weight_packed is on meta, x on cpu; move the module or x so that they meet"):
        layer.to("meta")(torch.randn(3, K))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_x(op, layout):
    _, tiles, scale, bias = Case(3, N, K).make()
    x = torch.nested.nested_tensor([torch.randn(2, K), torch.randn(3, K)], layout=layout)
    with pytest.raises(TypeError, match="x is a nested tensor, expected a dense one; pad it with torch.nested.to_padded_tensor"):
        op(x, tiles, scale, bias)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_arguments_that_are_no_dense_tensors():
    x, tiles, scale, bias = Case(3, N, K).make()
    q, x_scale, row_sum = ops.quantize_rows.reference(x)
    good = {
        "linear_dynamic": {"x": x, "weight_packed": tiles, "weight_scale": scale, "bias": bias},
        "linear_weight_only": {"x": x, "weight_packed": tiles, "weight_scale": scale, "bias": bias},
        "linear_static": {"x": x, "weight_packed": tiles, "weight_scale": scale, "bias": bias, "input_scale": INPUT_SCALE},
        "quantize_rows": {"x": x, "absmax": torch.ones(3)},
        "quantize_static": {"x": x, "input_scale": INPUT_SCALE},
        "linear_acc": {"q": q, "row_sum": row_sum, "weight_packed": tiles, "out_features": N},
        "linear_s8": {"q": q, "scale": x_scale, "row_sum": row_sum, "weight_packed": tiles, "weight_scale": scale, "bias": bias},
        "input_grad": {"grad": torch.randn(3, N), "weight_packed": tiles, "weight_scale": scale, "in_features": K},
    }
    good["linear_dynamic_quantize"] = good["linear_dynamic"]
    good["linear_s8_quantize"] = good["linear_s8"]
    x, tiles, scale, threshold, bias = Case(3, N, K).make_xnor()
    good["binarize_rows"] = {"x": x, "threshold": threshold}
    good["linear_xnor"] = {"x": x, "weight_packed": tiles, "weight_scale": scale, "threshold": threshold, "bias": bias}
    x, tiles, scale, groups, bias = GroupedCase(3, N, 64).make_grouped()
    good["linear_grouped"] = {"x": x, "weight_packed": tiles, "weight_scale": scale, "group_scale": groups, "bias": bias}
    good["norm_quantize"] = {"x": x, "residual": x, "weight": torch.ones(64), "bias": torch.ones(64), "eps": 1e-5, "kind": "layer"}
    good["norm_quantize"] |= {"want_sum": False, "want_y": False}
    x, tiles, scale, bias = Case(3, 32, K).make()
    stored = {"weight_packed": tiles, "weight_scale": scale, "bias": bias, "activation": "silu"}
    for name in ("linear_glu", "linear_glu_quantize"):
        good[name] = {"x": x} | stored
    for name in ("linear_glu_s8", "linear_glu_s8_quantize"):
        good[name] = {"q": q, "scale": x_scale, "row_sum": row_sum} | stored | {"dtype": torch.float32}
    weight = torch.randn(32, K) * (torch.rand(32, K) < 0.3)
    sparse = ("weight_packed", "weight_index", "weight_offset", "weight_sum")
    values, w_scale, _ = ops.quantize_rows.reference(weight)
    good["linear_sparse"] = {
        "x": x,
        **dict(zip(sparse, ops.pack_sparse(values), strict=True)),
        "weight_scale": w_scale,
        "bias": bias,
    }
    good["linear_sparse_float"] = {"x": x, **dict(zip(sparse, ops.pack_sparse_float(weight), strict=False)), "bias": bias}
    assert good.keys() == {name for name in ops.OPS if not name.endswith("_differentiable")}
    for name, arguments in good.items():
        ops.OPS[name](**arguments)
        for argument, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                continue
            with pytest.raises(TypeError, match=f"{name}: {argument} is torch.sparse_coo, expected a dense tensor"):
                ops.OPS[name](**arguments | {argument: value.to_sparse()})
            if argument not in ("bias", "absmax", "residual") and (name, argument) != ("norm_quantize", "weight"):
                with pytest.raises(TypeError, match=f"{name}: {argument} is NoneType, expected a Tensor"):
                    ops.OPS[name](**arguments | {argument: None})
            for wrong in ("tiles", 3, [value]):  # torch names the argument
                with pytest.raises((TypeError, RuntimeError, ValueError), match=argument):
                    ops.OPS[name](**arguments | {argument: wrong})
    with pytest.raises((TypeError, RuntimeError), match="in_features"):
        ops.input_grad(**good["input_grad"] | {"in_features": None})


# ---- sizes


@pytest.mark.parametrize("n", [0, 1, 16, 17])
@pytest.mark.parametrize("k", [0, 1, 4, 5])
def test_smallest_sizes(op, n, k):
    for shape in ((), (0,), (1,), (5,), (2, 0, 3), (0, 0)):
        x = torch.randn(*shape, k)
        _, tiles, scale, bias = Case(1, n, k).make()
        y, want = op(x, tiles, scale, bias), op.reference(x, tiles, scale, bias)
        assert y.shape == (*shape, n)
        assert_within(y, want, 1e-5)
        for got, ref in zip(ops.quantize_rows(x), ops.quantize_rows.reference(x), strict=True):
            assert_equal(got, ref)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
@pytest.mark.parametrize(("n", "k"), [(0, 3), (3, 0), (0, 0), (1, 1), (1, 5), (5, 1)])
def test_smallest_modules(fmt, n, k, tmp_path):
    k = fitting(fmt, k)
    model = nn.Sequential(nn.Linear(k, n))
    want = model(x := torch.randn(4, k))
    bound = 0.05 if fmt in INT8 else 2.0 + 4 * k  # few bits: the shapes and no more
    tersor.quantize_(model, fmt)
    assert_within(model(x), want, bound)
    tersor.save(model, tmp_path / "m.safetensors")
    assert_equal(tersor.load_(nn.Sequential(nn.Linear(k, n)), tmp_path / "m.safetensors")(x), model(x))
    assert_within(tersor.dequantize_(model)(x), want, bound)


def test_k_above_the_exact_range(op):
    message = "K=132105 is above 132104, the largest for which int32 sums are exact"
    with pytest.raises(ValueError, match=message):
        op(torch.zeros(1, 132105), torch.zeros(1, 33027, 64, dtype=torch.uint8), torch.zeros(1), None)
    with pytest.raises(ValueError, match=message):
        ops.quantize_rows(torch.zeros(1, 132105))
    for fmt in FORMATS:
        with pytest.raises(ValueError, match="in_features=132105 is above 132104"):
            tersor.quantize_(nn.Sequential(nn.Linear(132105, 1, device="meta")), fmt)


# ---- more than 2^31 elements

NOT_SCALAR = pytest.mark.skipif(
    os.environ.get("TERSOR_ISA") == "scalar", reason="20 s; sizes and strides are computed in shared code"
)


def virtual(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory that is touched only where it is used; calloc gives pages of zeros on first use."""
    try:
        buffer = np.zeros(count * torch.empty(0, dtype=dtype).element_size(), np.uint8)
    except MemoryError:
        pytest.skip("the system does not lend so much address space")
    return torch.from_numpy(buffer).view(dtype)


def assert_alike(op, got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal, but for the float sums of torch.mm, whose order depends on strides."""
    if ops.NATIVE or op is ops.linear_dynamic:
        assert_equal(got, want)
    else:
        assert_within(got, want, 1e-4 + 2 * EPS[got.dtype] * want.double().abs())


@pytest.mark.native
@NOT_SCALAR
def test_more_rows_than_2_31_elements(op):
    x, tiles, scale, _ = Case(1, 1, 64, torch.bfloat16).make()
    m = 2**31 // 64 + 5
    y = op(x.expand(m, 64), tiles, scale, None)
    assert y.shape == (m, 1)
    assert (y == op(x, tiles, scale, None)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_beyond_2_31(op, dtype):
    x, tiles, scale, bias = Case(2, N, K, dtype).make()
    far = 2**31 + 8
    buffer = virtual(far + K, dtype)
    for view in (
        buffer.as_strided((2, K), (far, 1)),
        buffer.as_strided((K, 2), (1, far)).t(),
        buffer.as_strided((2, 1, K), (far, 5, 1)),
    ):
        view.copy_(x.view(view.shape))
        assert_alike(op, op(view, tiles, scale, bias).view(2, N), op(x, tiles, scale, bias))
        assert_equal(ops.quantize_rows(view)[0].view(2, K), ops.quantize_rows(x)[0])
    wide = buffer.as_strided((1, 2), (1, far))  # along K
    wide.copy_(x[:1, :2])
    _, tiles, scale, bias = Case(1, N, 2, dtype).make()
    assert_alike(op, op(wide, tiles, scale, bias), op(x[:1, :2].contiguous(), tiles, scale, bias))
    if dtype == torch.float32:
        q, _, row_sum = ops.quantize_rows(x)
        _, tiles, _, _ = Case(2, N, K).make()
        rows = virtual(far + K, torch.int8).as_strided((2, K), (far, 1))
        rows.copy_(q)
        assert_equal(ops.linear_acc(rows, row_sum, tiles, N), ops.linear_acc(q, row_sum, tiles, N))


@pytest.mark.native
@NOT_SCALAR
def test_weights_beyond_2_31(op):
    k, n = 132104, 16 * 1030
    tiles = virtual(n // 16 * (k // 4) * 64, torch.uint8).view(n // 16, k // 4, 64)
    assert tiles.numel() > 2**31
    tiles[-1].fill_(128 + 1)  # every weight of the last 16 channels is 1, of the others -128
    x = torch.zeros(1, k)
    x[0, 0], x[0, -1] = 127.0, 3.0
    y = op(x, tiles, torch.ones(n), None)
    # x / scale is whole: 127 and 3; scale = 127 * (1/127f) is 1 within two roundings
    want = torch.full((1, n), -128.0 * 130)
    want[0, -16:] = 130.0
    assert_within(y, want, 4 * EPS[torch.float32] * want.abs().double())


@pytest.mark.slow
def test_output_beyond_2_31(op):
    m, n = 2**20 + 1, 2048  # 4 GiB of bfloat16
    x, tiles, scale, bias = Case(2, n, 4, torch.bfloat16).make()
    want = op(x, tiles, scale, bias)
    y = op(x[:1].expand(m, 4), tiles, scale, bias)
    assert y.numel() > 2**31
    for row in (0, m // 2, m - 1):
        assert_equal(y[row], want[0])
    assert (y[::1000] == want[0]).all()


def test_results_that_no_memory_can_hold():
    for m in (2**45, 2**62):
        x = torch.zeros(1, 4).expand(m, 4) if m < 2**60 else torch.zeros(1, 0).expand(m, 0)
        tiles = torch.zeros(1, x.shape[1] // 4, 64, dtype=torch.uint8)
        for op in (ops.linear_dynamic, ops.linear_weight_only):
            with pytest.raises((RuntimeError, ValueError), match=r"memory|overflow|numel|size"):
                op(x, tiles, torch.ones(4), None)
        with pytest.raises((RuntimeError, ValueError), match=r"memory|overflow|numel|size"):
            ops.quantize_rows(x)


# ---- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bad_row_spoils_no_other(layer, dtype):
    layer.to(dtype)
    for m in (1, 4, 9, 40):
        x = torch.randn(m, K).to(dtype)
        want = layer(x)
        for bad in (torch.nan, torch.inf, -torch.inf):
            for row in {0, m // 2, m - 1}:
                spoiled = x.clone()
                spoiled[row, 5] = bad
                y = layer(spoiled)
                others = [i for i in range(m) if i != row]
                assert_equal(y[others], want[others])
                if isinstance(layer.format, Int8Dynamic):
                    assert torch.isnan(y[row]).all()
                else:  # float products: what IEEE says, never a finite number where the weight is not 0
                    assert not torch.isfinite(y[row][layer.dequantize().weight[:, 5].float() != 0]).any()


def test_zero_rows_give_the_bias(layer):
    x = torch.zeros(5, K)
    x[1] = -0.0
    assert_equal(layer(x), layer.bias.detach().expand(5, N).contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_denormals_with_and_without_flushing(dtype):
    """Class I has the same bits either way: what flushing could change lies below 2^-100, where a row is zero anyhow."""
    x = torch.randn(8, K)
    x[0] = 1e-40
    x[1, 3:] = 1e-40  # beside normal values
    x[2] *= 2.0**-99
    x[3] *= 2.0**-115
    x[4] *= 2.0**-20  # denormal in float16
    x[5] = torch.tensor(2.0**-126)
    x = x.to(dtype)
    w = ops.from_rows(torch.randint(-127, 128, (N, K), dtype=torch.int8))
    want = ops.quantize_rows(x)
    acc = ops.linear_acc(want[0], want[2], w, N)
    y = ops.linear_dynamic(x, w, torch.full((N,), 0.01), None)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        got = ops.quantize_rows(x)
        got_acc = ops.linear_acc(got[0], got[2], w, N)
        got_y = ops.linear_dynamic(x, w, torch.full((N,), 0.01), None)
    finally:
        torch.set_flush_denormal(False)
    for a, b in zip((*got, got_acc, got_y), (*want, acc, y), strict=True):
        assert_equal(a, b)
    for a, b in zip(want, ops.quantize_rows.reference(x), strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_near_the_limit(dtype):
    top = torch.finfo(dtype).max
    x = torch.stack([torch.full((K,), top), torch.full((K,), -top), torch.linspace(-1, 1, K) * top, torch.randn(K)]).to(dtype)
    q, scale, row_sum = ops.quantize_rows(x)
    for got, want in zip((q, scale, row_sum), ops.quantize_rows.reference(x), strict=True):
        assert_equal(got, want)
    assert torch.isfinite(scale).all()
    assert q[0].tolist() == [127] * K and q[1].tolist() == [-127] * K
    w = torch.zeros(N, K, dtype=torch.int8)
    w[:, 0] = 1
    w[0] = 127
    tiles, w_scale = ops.from_rows(w), torch.full((N,), 2.0**-20)
    got = ops.linear_dynamic(x, tiles, w_scale, None)
    assert_equal(got, ops.linear_dynamic.reference(x, tiles, w_scale, None))
    assert torch.isfinite(got[:, 1:].float()).all() and not torch.isnan(got.float()).any()


# ---- views


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views(op, dtype):
    base = torch.randn(4000).to(dtype)
    _, tiles, scale, bias = Case(1, N, K, dtype).make()
    z = torch.randn(7, K, dtype=torch.complex64).conj()
    for x in (
        base.as_strided((9, K), (1, 1)),  # overlapping rows
        base.as_strided((9, K), (5, 3), 11),
        base.as_strided((3, 3, K), (7, 2, 1)),  # no one stride for the rows
        base.as_strided((9, K), (0, 1), 3),
        base.as_strided((9, K), (1, 0)),
        base.as_strided((9, K), (0, 0)),
        base[: 9 * K].view(K, 9).t(),
        base[: 9 * K].view(3, K, 3).permute(2, 0, 1),
        base[: 2 * 9 * K].view(9, 2 * K)[:, ::2],
        torch._neg_view(base[: 9 * K]).view(9, K),
        z.imag if dtype == torch.float32 else base[:K],  # negative, and every other element
    ):
        plain = x.resolve_neg().contiguous().clone()
        assert_equal(op(x, tiles, scale, bias), op(plain, tiles, scale, bias))
        for got, want in zip(ops.quantize_rows(x), ops.quantize_rows(plain), strict=True):
            assert_equal(got, want)


def odd(t: torch.Tensor, at: int) -> torch.Tensor:
    """t at an address that is `at` modulo 64."""
    raw = np.zeros(t.numel() * t.element_size() + 128, np.uint8)
    begin = (at - raw.ctypes.data) % 64
    raw = raw[begin : begin + t.numel() * t.element_size()]
    moved = torch.frombuffer(raw, dtype=t.dtype).view(t.shape)
    moved.copy_(t)
    assert moved.data_ptr() % 64 == at
    return moved


@pytest.mark.parametrize("at", [1, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_argument_off_its_alignment(at, dtype):
    """As in a mapped file. The sanitizer run of the fuzz sees a kernel that would rely on the alignment."""
    x, tiles, scale, bias = Case(9, 50, 101, dtype).make()
    q, x_scale, row_sum = ops.quantize_rows(x)
    for op in (ops.linear_dynamic, ops.linear_weight_only):
        moved = [odd(t, at) for t in (x, tiles, scale, bias)]
        if ops.NATIVE:
            assert_equal(op(*moved), op(x, tiles, scale, bias))
        assert_equal(op(odd(x, at).t().contiguous().t(), *moved[1:]), op(x.t().contiguous().t(), tiles, scale, bias))
    for got, want in zip(ops.quantize_rows(odd(x, at), odd(torch.ones(9), at)), ops.quantize_rows(x, torch.ones(9)), strict=True):
        assert_equal(got, want)
    assert_equal(
        ops.linear_s8(*(odd(t, at) for t in (q, x_scale, row_sum, tiles, scale, bias))),
        ops.linear_s8(q, x_scale, row_sum, tiles, scale, bias),
    )
    if ops.NATIVE and dtype == torch.float32:
        arrays = [t.numpy() for t in (x, tiles, scale, bias)]
        assert np.array_equal(tn.linear_dynamic(*(odd(t, at).numpy() for t in (x, tiles, scale, bias))), tn.linear_dynamic(*arrays))


def test_assigned_from_a_file_off_its_alignment(layer):
    """load_state_dict(assign=True) keeps the file's memory, wherever it begins."""
    x = torch.randn(5, K)
    state = {name: odd(t, 33) for name, t in layer.state_dict().items()}
    assigned = QuantLinear(K, N, format=layer.format, device="meta")
    assigned.load_state_dict(state, assign=True)
    assert assigned.weight_scale.data_ptr() == state["weight_scale"].data_ptr()
    assert_equal(assigned(x), layer(x))
    assert_equal(assigned.bfloat16().float().weight_scale, layer.weight_scale)


# ---- other entrances


def test_state_dict_of_another_format_by_torchs_own_loader(layer):
    other = QuantLinear(K, N, format=next(f for f in FORMATS if f != layer.format))
    before = {name: t.clone() for name, t in other.state_dict().items()}
    for assign in (False, True):
        with pytest.raises(ValueError, match=r"the state is in format \w+\(.*\), this layer in Int8\w+\(\)"):
            other.load_state_dict(layer.state_dict(), assign=assign)
    small = QuantLinear(K, N - 4, format=layer.format)
    with pytest.raises((RuntimeError, ValueError), match=r"out_features=20|weight_scale"):
        small.load_state_dict(layer.state_dict())
    if isinstance(layer.format, tersor.SparseInt8):
        return  # its sizes vary; test_sparse.py has what is wrong with them
    short = layer.state_dict() | {"weight_packed": layer.weight_packed[:1]}
    steps = layer.weight_packed.shape[1]
    with pytest.raises(RuntimeError, match=rf"size mismatch for weight_packed: .*\[1, {steps}, 64\].*\[2, {steps}, 64\]"):
        QuantLinear(K, N, format=layer.format).load_state_dict(short)
    assert before.keys() == other.state_dict().keys()


@pytest.mark.parametrize("x", ["hello", None, 3.0, [1.0] * K])
def test_x_that_is_no_tensor(layer, x):
    with pytest.raises(TypeError, match=f"QuantLinear: x is {type(x).__name__}, expected a Tensor"):
        layer(x)
