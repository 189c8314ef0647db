"""Fused ops: residual add in the epilogue, norm to int8 rows, gated linear units. Each against the unfused ops, to the bit where its
class allows, else against float64 within a derived bound."""

from __future__ import annotations

import pytest
import torch
from cases import ALL_WIDTHS, EPS, GROUPED_CASES, INPUT_SCALE, Case, assert_equal, assert_within, epilogue_bound
from torch import Tensor

import tersor.ops as ops

U = EPS[torch.float32]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 384, 769, 4099]


# ---- residual


def added(y: Tensor, residual: Tensor) -> Tensor:
    """What the epilogue does to a float32 value before it is stored."""
    return (y + residual.float()).to(residual.dtype)


@pytest.mark.exact
@pytest.mark.parametrize("case", ALL_WIDTHS[::3], ids=str)
@pytest.mark.parametrize("epilogue", ["none", "relu", "silu"])
def test_residual(case: Case, epilogue: str):
    x, tiles, scale, bias = case.make()
    residual = torch.randn(case.m, case.n, generator=torch.Generator().manual_seed(7)).to(case.dtype)
    rows = ops.quantize_rows(x)
    want = added(ops.linear_s8(*rows, tiles, scale, bias, epilogue, torch.float32, case.bits), residual)
    assert_equal(ops.linear_s8(*rows, tiles, scale, bias, epilogue, case.dtype, case.bits, residual), want)
    assert_equal(ops.linear_dynamic(x, tiles, scale, bias, epilogue, case.bits, residual), want)
    if case.bits == 8:
        y = ops.linear_static(x.float(), tiles, scale, bias, INPUT_SCALE, epilogue)
        assert_equal(ops.linear_static(x, tiles, scale, bias, INPUT_SCALE, epilogue, residual), added(y, residual))
    if case.bits == 1:
        x, tiles, scale, threshold, bias = case.make_xnor()
        y = ops.linear_xnor(x.float(), tiles, scale, threshold, bias, epilogue)
        assert_equal(ops.linear_xnor(x, tiles, scale, threshold, bias, epilogue, residual), added(y, residual))
    if epilogue != "silu":
        assert_equal(ops.linear_dynamic.reference(*case.make()[:4], epilogue, case.bits, residual), want)


@pytest.mark.parametrize("case", GROUPED_CASES[::3], ids=str)
def test_residual_of_groups(case):
    x, tiles, scale, group_scale, bias = case.make_grouped()
    residual = torch.randn(case.m, case.n).to(case.dtype)
    torch.set_num_threads(1)
    y = ops.linear_grouped(x.float(), tiles, scale, group_scale, bias, "relu")
    assert_equal(ops.linear_grouped(x, tiles, scale, group_scale, bias, "relu", residual), added(y, residual))


@pytest.mark.parametrize("dtype", FLOATS)
def test_residual_of_any_strides(dtype):
    _, tiles, scale, bias = Case(1, 37, 50).make()
    x, plain = torch.randn(2, 3, 50).to(dtype), torch.randn(2, 3, 37).to(dtype)
    want = ops.linear_dynamic(x, tiles, scale, bias, "none", 8, plain)
    padded = torch.zeros(2, 3, 64, dtype=dtype)[..., :37]
    padded.copy_(plain)
    turned = plain.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    raw = torch.zeros(plain.numel() * plain.element_size() + 1, dtype=torch.uint8)
    odd = raw[1:].view(torch.uint8)
    odd.copy_(plain.view(torch.uint8).flatten())
    for residual in (padded, turned, plain.flip(-1).flip(-1), plain[0].expand(2, 3, 37)):
        got = ops.linear_dynamic(x, tiles, scale, bias, "none", 8, residual)
        assert_equal(
            got, want if residual is not plain and torch.equal(residual, plain) else added_to(x, tiles, scale, bias, residual)
        )


def added_to(x: Tensor, tiles: Tensor, scale: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return added(ops.linear_dynamic(x.float(), tiles, scale, bias), residual)


def test_residual_does_not_hide_nan_and_is_not_written_to():
    x, tiles, scale, bias = Case(4, 33, 40).make()
    residual = torch.randn(4, 33)
    x[1, 3], residual[2, 5] = torch.inf, torch.nan
    before = residual.clone()
    y = ops.linear_dynamic(x, tiles, scale, bias, "relu", 8, residual)
    nan = y.isnan()
    assert nan[1].all() and nan[2, 5] and int(nan.sum()) == 34
    assert_equal(residual, before)


def test_gradient_of_a_residual():
    x, tiles, scale, bias = Case(4, 33, 40).make()
    residual, x = torch.randn(4, 33, requires_grad=True), x.requires_grad_()
    grad = torch.randn(4, 33)
    y = ops.linear_dynamic(x, tiles, scale, bias, "silu", 8, residual)
    got = torch.autograd.grad(y, (x, residual), grad)
    assert_equal(got[1], grad)
    assert_equal(got[0], torch.autograd.grad(ops.linear_dynamic(x, tiles, scale, bias, "silu"), x, grad)[0])


def test_vmap_over_a_residual():
    _, tiles, scale, bias = Case(1, 33, 40).make()
    x, residual = torch.randn(3, 5, 40), torch.randn(5, 3, 33)
    call = lambda x, r: ops.linear_dynamic(x, tiles, scale, bias, "none", 8, r)  # noqa: E731
    want = call(x, residual.movedim(1, 0).contiguous())
    assert_equal(torch.func.vmap(call, in_dims=(0, 1))(x, residual), want)
    assert_equal(torch.func.vmap(call, in_dims=(None, 1))(x[0], residual)[2], call(x[0], residual[:, 2].contiguous()))


# ---- norm to int8 rows


def norm_arguments(m: int, k: int, dtype, seed: int = 0, mean: float = 0.3, weight_dtype=torch.float32) -> tuple[Tensor, ...]:
    """(x, residual, weight, bias)"""
    g = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(m, k, generator=g) * 2 + mean for _ in range(2))
    weight, bias = (torch.randn(k, generator=g).to(weight_dtype) for _ in range(2))
    return x.to(dtype), residual.to(dtype), weight, bias


def exact_norm(s: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> tuple[Tensor, Tensor]:
    """(y, bound): the norm in float64, and how far a float32 norm in the kernel's order may lie from it.

    A sum in 64 lanes rounds K / 64 times a lane and 6 times in the tree: g = (K / 64 + 7) u of the sum of magnitudes.
    rms: the mean square errs by g + 2 u (the factor 1/K, eps), its root by half of that and u, the quotient by u, the two products
    by 2 u. layer: the mean errs by g mean|s| + 2 u |mean|. The sum of squares less total * mean errs by (3 g + 5 u) of the squares,
    which are at most 8 times the difference (else there is a second pass around the mean, with less than that); the inverse by half
    of it and 2 u. shift = mean * inverse rounds once more, then come two fma.
    """
    k = s.shape[-1]
    s = s.double()
    g = (k / 64 + 7) * U
    w = 1.0 if weight is None else weight.double()
    if kind == "rms":
        y = s / (s.square().mean(-1, keepdim=True) + eps).sqrt() * w
        return y, y.abs() * ((g + 2 * U) / 2 + 4 * U) * 1.01
    mean = s.mean(-1, keepdim=True)
    inverse = 1 / (s.var(-1, correction=0, keepdim=True) + eps).sqrt()
    z = (s - mean) * inverse
    y = z * w + (0.0 if bias is None else bias.double())
    of_inverse = 8 * (3 * g + 5 * U) / 2 + 2 * U
    of_mean = g * s.abs().mean(-1, keepdim=True) + 3 * U * mean.abs()
    bound = (z.abs() * (of_inverse + U) + inverse * of_mean) * (w if weight is None else w.abs()) + U * y.abs()
    return y, bound * 1.01


def check_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float = 1e-5
) -> None:
    q, scale, row_sum, s, y = ops.norm_quantize(x, residual, weight, bias, eps, kind, True, True)
    assert_equal(s, x.contiguous() if residual is None else (x.float() + residual.float()).to(x.dtype))
    want, float32_bound = exact_norm(s, weight, bias, eps, kind)
    bound = (
        float32_bound
        + EPS[x.dtype] * (want.abs() + float32_bound) * (x.dtype != torch.float32)
        + (2.0**-25 if x.dtype == torch.float16 else 0)
    )
    assert_within(y, want, bound)
    for got, rows in zip((q, scale, row_sum), ops.quantize_rows(y), strict=True):
        assert_equal(got, rows)  # class I, of its own y
    for got, rows in zip(
        (q, scale, row_sum), ops.norm_quantize(x, residual, weight, bias, eps, kind, False, False)[:3], strict=True
    ):
        assert_equal(got, rows)  # whatever else is asked for
    theirs = ops.norm_quantize.reference(x, residual, weight, bias, eps, kind, True, True)
    assert_equal(s, theirs[3])
    # Two values within the bound round to neighbours where it is less than half a step (a neighbouring bfloat16 may be a step away,
    # and so may the largest, which makes the scale). It is not where y is nothing but rounding: a constant row without a bias.
    small = 2 * float32_bound.amax(-1) * 127 < 0.4 * want.abs().amax(-1)
    assert small.all() or x.shape[-1] == 1 or float(x.double().mean().abs()) > 1
    most = 2 if x.dtype == torch.bfloat16 else 1
    assert not ((q.int() - theirs[0].int()).abs() > most)[small].any()


@pytest.mark.exact
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("k", SIZES)
def test_norm_quantize(k: int, kind: str, dtype):
    for m in (1, 2, 5):
        x, residual, weight, bias = norm_arguments(m, k, dtype)
        bias = None if kind == "rms" else bias
        check_norm(x, None, weight, bias, kind)
        check_norm(x, residual, weight, bias, kind)
    check_norm(x, residual, None, None, kind)
    if kind == "layer":
        check_norm(x, None, None, bias, kind)
        check_norm(x, None, weight.to(torch.bfloat16), bias.to(torch.float16), kind, eps=1e-12)


@pytest.mark.parametrize("mean", [0.0, 3.0, -50.0, 1e4])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_quantize_far_from_zero(mean: float, with_residual: bool):
    """Squares around 0 cancel: the second pass, and rows on either side of where it begins."""
    x, residual, weight, bias = norm_arguments(9, 384, torch.float32, mean=mean)
    x[3] = x[3] * 1e-3 + mean
    x[4, 0] = 1e6
    x[5] = mean
    check_norm(x, residual if with_residual else None, weight, bias, "layer")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_quantize_nan_and_inf_stay_in_their_row(kind: str, dtype):
    x, residual, weight, bias = norm_arguments(7, 100, dtype)
    bias = None if kind == "rms" else bias
    want = ops.norm_quantize(x, residual, weight, bias, 1e-5, kind, True, True)
    x[1, 99], x[3, 0], residual[4, 50] = torch.nan, torch.inf, -torch.inf
    got = ops.norm_quantize(x, residual, weight, bias, 1e-5, kind, True, True)
    broken = torch.tensor([1, 3, 4])
    assert got[1][broken].isnan().all() and not got[0][broken].any() and not got[2][broken].any()
    assert got[4][broken].isnan().any(-1).all()
    for g, w in zip(got, want, strict=True):
        keep = torch.tensor([0, 2, 5, 6])
        assert_equal(g[keep], w[keep])
    weight[5] = torch.nan
    assert ops.norm_quantize(x, residual, weight, bias, 1e-5, kind, False, False)[1].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_norm_quantize_any_strides(dtype):
    x, residual, weight, bias = norm_arguments(12, 65, dtype)
    want = ops.norm_quantize(x, residual, weight, bias, 1e-5, "layer", True, True)
    wide = torch.zeros(12, 130, dtype=dtype)
    wide[:, ::2] = residual
    turned = x.t().contiguous().t()
    for a, r in ((turned, residual), (x, wide[:, ::2]), (turned, turned_of(residual)), (sliced(x), sliced(residual))):
        for got, w in zip(ops.norm_quantize(a, r, weight, bias, 1e-5, "layer", True, True), want, strict=True):
            assert_equal(got, w)
            assert got.is_contiguous()
    for got, w in zip(
        ops.norm_quantize(x.view(3, 4, 65), residual.view(3, 4, 65), weight, bias, 1e-5, "layer", True, True), want, strict=True
    ):
        assert_equal(got.reshape(w.shape), w)
    # rows do not depend on each other, nor on how many there are
    for i in range(12):
        for got, w in zip(ops.norm_quantize(x[i], residual[i], weight, bias, 1e-5, "layer", True, True), want, strict=True):
            assert_equal(got, w[i])


def turned_of(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def sliced(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], x.shape[1] + 7), torch.nan, dtype=x.dtype)
    wide[:, 3:-4] = x
    return wide[:, 3:-4]


def test_norm_quantize_aliases_nothing():
    x, residual, weight, bias = norm_arguments(4, 32, torch.float32)
    out = ops.norm_quantize(x, None, weight, bias, 1e-5, "layer", True, True)
    pointers = {t.untyped_storage().data_ptr() for t in (x, *out)}
    assert len(pointers) == 6
    assert [t.shape for t in ops.norm_quantize(x, None, weight, bias, 1e-5, "layer", False, False)[3:]] == [(0,), (0,)]
    for shape in ((0, 32), (2, 0, 32), (3, 0)):
        empty = torch.zeros(shape)
        for op in (ops.norm_quantize, ops.norm_quantize.reference):
            q, scale, row_sum, s, y = op(empty, empty, None, None, 1e-5, "rms", True, True)
            assert q.shape == s.shape == y.shape == shape and scale.shape == row_sum.shape == shape[:-1]
            assert not scale.any() and not row_sum.any()


def test_vmap_where_an_output_is_not_wanted():
    x = torch.randn(3, 5, 32)
    got = torch.func.vmap(lambda x: ops.norm_quantize(x, None, None, None, 1e-5, "rms", False, True)[:3])(x)
    for g, w in zip(got, ops.norm_quantize(x, None, None, None, 1e-5, "rms", False, False), strict=False):
        assert_equal(g, w)


# ---- gated linear units


def glu_case(case: Case) -> tuple[Tensor, tuple, tuple, tuple]:
    """(x, gate, up, both): stored tensors of two layers and of the two in one."""
    x, *gate = case.make()
    _, *up = case.make(seed=1)
    return x, tuple(gate), tuple(up), tuple(ops.interleave_glu(g, u) for g, u in zip(gate, up, strict=True))


GLU_CASES = [
    *(Case(m, n, 67) for m in (1, 2, 3, 4, 5, 8, 9, 17, 65) for n in (16, 48)),
    *(Case(5, 32, k, bits=bits) for bits in ops.CODES for k in (1, 33, 127)),
    *(Case(3, 64, 40, dtype) for dtype in FLOATS[1:]),
    Case(70, 1536, 130),  # more than one block of rows and of tiles
    Case(1, 6400, 20),
]


@pytest.mark.exact
@pytest.mark.parametrize("activation", ops.EPILOGUES)
@pytest.mark.parametrize("case", GLU_CASES, ids=str)
def test_linear_glu(case: Case, activation: str):
    x, gate, up, both = glu_case(case)
    rows = ops.quantize_rows(x)
    act = ops.linear_s8(*rows, *gate, activation, torch.float32, case.bits)
    factor = ops.linear_s8(*rows, *up, "none", torch.float32, case.bits)
    want = (act * factor).to(case.dtype)
    assert_equal(ops.linear_glu(x, *both, activation, case.bits), want)
    assert_equal(ops.linear_glu_s8(*rows, *both, activation, case.dtype, case.bits), want)
    quantized = ops.quantize_rows(want)
    for got, w in zip(ops.linear_glu_quantize(x, *both, activation, case.bits), quantized, strict=True):
        assert_equal(got, w)
    for got, w in zip(ops.linear_glu_s8_quantize(*rows, *both, activation, case.dtype, case.bits), quantized, strict=True):
        assert_equal(got, w)
    before = ops.linear_s8(*rows, *gate, "none", torch.float32, case.bits)
    # the bound of the activation times the other factor, the product rounded, and rounded again to the dtype
    bound = epilogue_bound(Case(1, 1, 1), before, activation) * 2 * factor.abs() + 2 * U * (act * factor).abs() + 2.0**-149
    bound = bound + (EPS[case.dtype] * (want.abs().double() + bound) * 2 + 2.0**-24 if case.dtype != torch.float32 else 0)
    if activation in ("none", "relu"):
        bound = torch.zeros_like(bound)
    assert_within(ops.linear_glu.reference(x, *both, activation, case.bits), want, bound)
    reference = ops.linear_glu_s8_quantize.reference(*rows, *both, activation, case.dtype, case.bits)
    assert int((reference[0].int() - quantized[0].int()).abs().max()) <= (activation not in ("none", "relu"))


def test_linear_glu_on_any_rows():
    x, _, _, both = glu_case(Case(12, 32, 40))
    x[5, 7] = torch.nan
    want = ops.linear_glu(x, *both, "silu")
    assert want[5].isnan().all() and not want[[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]].isnan().any()
    assert_equal(ops.linear_glu(turned_of(x), *both, "silu"), want)
    assert_equal(ops.linear_glu(x.view(2, 6, 40), *both, "silu"), want.view(2, 6, 32))
    q, scale, row_sum = ops.linear_glu_quantize(x, *both, "silu")
    assert scale[5].isnan() and not q[5].any() and row_sum[5] == 0
    none = (*both[:2], None)
    assert_equal(ops.linear_glu(x[:0], *none, "gelu"), torch.zeros(0, 32))
    assert [t.shape for t in ops.linear_glu_quantize(x[:0], *none, "gelu")] == [(0, 32), (0,), (0,)]
    nothing = (both[0][:0], both[1][:0], None)
    assert ops.linear_glu(x, *nothing, "silu").shape == (12, 0)
    assert ops.linear_glu_quantize(x, *nothing, "silu")[0].shape == (12, 0)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_fused_ops_do_not_depend_on_threads(threads: int):
    x, _, _, both = glu_case(Case(40, 160, 256))
    residual, weight = torch.randn(40, 256), torch.randn(256)
    big = torch.randn(400, 256)

    def run() -> list[Tensor]:
        return [
            ops.linear_glu(x, *both, "silu"),
            ops.linear_glu(x[:1], *both, "silu"),
            *ops.linear_glu_quantize(x.repeat(5, 1), *both, "gelu"),
            *ops.norm_quantize(big, big, weight, None, 1e-5, "rms", True, True),
            *ops.norm_quantize(x, residual, weight, weight, 1e-5, "layer", True, True),
        ]

    torch.set_num_threads(1)
    want = run()
    torch.set_num_threads(threads)
    for got, w in zip(run(), want, strict=True):
        assert_equal(got, w)


# ---- bad input


def bad_inputs():
    x, residual, weight, bias = norm_arguments(3, 20, torch.float32)
    norm = (x, residual, weight, bias, 1e-5, "layer", False, False)

    def spoiled(args: tuple, at: int, value) -> tuple:
        return (*args[:at], value, *args[at + 1 :])

    for at, value, error, message in (
        (0, x.double(), TypeError, "x is torch.float64"),
        (0, torch.tensor(1.0), ValueError, "x is 0-dimensional"),
        (0, torch.zeros(1, 132105), ValueError, "K=132105 is above 132104"),
        (1, residual.half(), ValueError, r"residual is torch.float16 \[3, 20\], expected torch.float32 \[3, 20\]"),
        (1, residual[:2], ValueError, r"residual is torch.float32 \[2, 20\], expected torch.float32 \[3, 20\]"),
        (1, residual[0], ValueError, r"residual is torch.float32 \[20\], expected"),
        (1, residual.to("meta"), ValueError, "residual is on meta"),
        (2, weight[1:], ValueError, r"weight is torch.float32 \[19\], expected float \[20\]"),
        (2, weight.double(), ValueError, r"weight is torch.float64 \[20\], expected float \[20\]"),
        (2, weight[None], ValueError, r"weight is torch.float32 \[1, 20\], expected"),
        (3, bias[:1], ValueError, r"bias is torch.float32 \[1\], expected float \[20\]"),
        (5, "batch", ValueError, "kind is 'batch', expected one of: layer, rms"),
        (5, "rms", ValueError, "bias is given, expected None for kind='rms'"),
    ):
        yield "norm_quantize", spoiled(norm, at, value), error, "norm_quantize: " + message
    x, tiles, scale, bias = Case(3, 32, 24).make()
    q, x_scale, row_sum = ops.quantize_rows.reference(x)
    for name in ("linear_glu", "linear_glu_quantize"):
        args = (x, tiles, scale, bias, "silu")
        for at, value, error, message in (
            (0, x.long(), TypeError, "x is torch.int64"),
            (0, x[:, :20], ValueError, r"x has K=20, but weight_packed \[2, 6, 64\]"),
            (1, tiles[:1], ValueError, r"weight_packed is \[1, 6, 64\], expected \[2, 6, 64\] for N=32"),
            (2, scale[:17], ValueError, "bias is"),
            (4, "swish", ValueError, "epilogue is 'swish', expected one of: none, relu"),
        ):
            yield name, spoiled(args, at, value), error, name + ": " + message
        short = (x, tiles, scale[:20], bias[:20], "silu")
        yield name, short, ValueError, name + ": weight_scale has 20 channels, expected a multiple of 32: gate and up in turn"
    for name in ("linear_glu_s8", "linear_glu_s8_quantize"):
        args = (q, x_scale, row_sum, tiles, scale, bias, "silu", torch.float32)
        for at, value, error, message in (
            (0, x, TypeError, "q is torch.float32, expected torch.int8"),
            (1, x_scale[:1], ValueError, r"scale is torch.float32 \[1\]"),
            (2, row_sum.long(), ValueError, "row_sum is torch.int64"),
            (7, torch.int8, TypeError, "dtype is torch.int8, expected float32"),
        ):
            yield name, spoiled(args, at, value), error, name + ": " + message
        yield name, (*args, 3), ValueError, name + ": bits is 3"
    for name, args in (
        ("linear_dynamic", (x, tiles, scale, bias, "none", 8)),
        ("linear_static", (x, tiles, scale, bias, INPUT_SCALE, "none")),
        ("linear_s8", (q, x_scale, row_sum, tiles, scale, bias, "none", torch.float32, 8)),
    ):
        good = torch.zeros(3, 32)
        for wrong in (good.half(), good[:2], good[:, :31], good[None], good.long()):
            yield name, (*args, wrong), ValueError, rf"{name}: residual is {wrong.dtype} .*, expected torch.float32 \[3, 32\]"
        yield name, (*args, good.to("meta")), ValueError, f"{name}: residual is on meta"


@pytest.mark.parametrize(("name", "args", "error", "message"), list(bad_inputs()))
def test_bad_input(name: str, args: tuple, error: type, message: str):
    op = ops.OPS[name]
    for call in (op, op.reference):
        with pytest.raises(error, match=message):
            call(*args)
    # the raw op is the second line: any clear exception, never a crash
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        op.raw(*args)


def test_gradients_are_refused():
    x, tiles, scale, bias = Case(3, 32, 24).make()
    x.requires_grad_()
    calls = {
        "norm_quantize": lambda: ops.norm_quantize(x, None, None, None, 1e-5, "rms", False, False),
        "linear_glu": lambda: ops.linear_glu(x, tiles, scale, bias, "silu"),
        "linear_glu_quantize": lambda: ops.linear_glu_quantize(x, tiles, scale, bias, "silu"),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: there are no gradients of this op; call it under torch.no_grad()"):
            call()
        with torch.no_grad():
            call()


def test_interleave_glu_checks():
    tiles, scale = torch.zeros(2, 3, 64, dtype=torch.uint8), torch.ones(32)
    assert ops.interleave_glu(tiles, tiles).shape == (4, 3, 64)
    order = ops.interleave_glu(torch.arange(32), torch.arange(32) + 100)
    assert order[:17].tolist() == [*range(16), 100] and order[32:49].tolist() == [*range(16, 32), 116]
    for gate, up, message in (
        (tiles, tiles[:1], r"up is torch.uint8 \[1, 3, 64\], expected the same of both"),
        (scale, scale.half(), "expected the same of both"),
        (scale[:20], scale[:20], "gate has 20 channels, expected a multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.interleave_glu(gate, up)
