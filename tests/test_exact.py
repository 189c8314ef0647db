"""Classes I and E of docs/numerics.md: integer results bit for bit on every variant, thread count and stride; float epilogues
within a derived bound of the reference. Run once per instruction set by TERSOR_ISA."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from cases import ALL_WIDTHS, CASES, EPS, LARGE_K, Case, assert_equal, assert_within, epilogue_bound
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
import tersor.ops as ops

pytestmark = pytest.mark.exact
THREADS = (1, 2, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def each_thread_count(f):
    """f() under 1, 2 and 3 threads; all results must be the same bits."""
    results = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        results.append(f())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_equal(b, a)
    return results[0]


@pytest.mark.parametrize("case", ALL_WIDTHS, ids=str)
def test_integer_results(case: Case):
    x, tiles, _, _ = case.make()
    got = each_thread_count(lambda: ops.quantize_rows(x))
    want = ops.quantize_rows.reference(x)
    for g, w in zip(got, want, strict=True):
        assert_equal(g, w)
    q, _, row_sum = got
    (acc,) = each_thread_count(lambda: (ops.linear_acc(q, row_sum, tiles, case.n, case.bits),))
    assert_equal(acc, ops.linear_acc.reference(q, row_sum, tiles, case.n, case.bits))
    exact = q.long() @ ops.to_rows(tiles, case.n, case.k, case.bits).long().t()
    assert torch.equal(acc.long(), exact)  # the reference itself, against plain integers


@pytest.mark.parametrize("epilogue", ops.EPILOGUES)
@pytest.mark.parametrize("case", ALL_WIDTHS[::3], ids=str)
def test_epilogues(case: Case, epilogue: str):
    x, tiles, scale, bias = case.make()
    (y,) = each_thread_count(lambda: (ops.linear_dynamic(x, tiles, scale, bias, epilogue, case.bits),))
    q, x_scale, row_sum = ops.quantize_rows(x)
    assert_equal(ops.linear_s8(q, x_scale, row_sum, tiles, scale, bias, epilogue, case.dtype, case.bits), y)
    before = ops.linear_s8(q, x_scale, row_sum, tiles, scale, bias, bits=case.bits)
    # scale and bias: the same roundings in the same order as the reference, so the same bits
    assert_equal(before, ops.linear_s8.reference(q, x_scale, row_sum, tiles, scale, bias, bits=case.bits))
    exact, bound = ops.EPILOGUES[epilogue](before.double()), epilogue_bound(case, before, epilogue)
    assert_within(y, exact, bound)
    assert_within(ops.linear_dynamic.reference(x, tiles, scale, bias, epilogue, case.bits), exact, bound)
    no_bias = ops.linear_dynamic(x, tiles, scale, None, epilogue, case.bits)
    assert_equal(no_bias, ops.linear_dynamic(x, tiles, scale, torch.zeros(case.n), epilogue, case.bits))


# one step of q: usual, saturating, coarse, a sign that does not count, too small, none, and no numbers
INPUT_SCALES = (0.03, 0.001, 10.0, -0.03, 2.0**-100, 2.0**-101, 0.0, torch.inf, torch.nan)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_one_known_scale(case: Case):
    x, tiles, scale, bias = case.make()
    if case.m > 2 and case.values == "normal":
        x[1, case.k // 2] = torch.nan
        x[2, -1] = -torch.inf
    for step in INPUT_SCALES:
        input_scale = torch.tensor(step)
        rows = each_thread_count(lambda s=input_scale: ops.quantize_static(x, s))
        for got, want in zip(rows, ops.quantize_static.reference(x, input_scale), strict=True):
            assert_equal(got, want)
        (y,) = each_thread_count(lambda s=input_scale: (ops.linear_static(x, tiles, scale, bias, s),))
        assert_equal(y, ops.linear_s8(*rows, tiles, scale, bias, "none", case.dtype))
        assert_equal(y, ops.linear_static.reference(x, tiles, scale, bias, input_scale))
        if case.m > 2 and case.values == "normal":
            assert y[1:3].isnan().all()
    if case.values == "normal" and case.dtype == torch.float32:
        # against plain arithmetic, not our own reference
        q = torch.clamp(torch.round(x[:1] * torch.div(torch.tensor(1.0), torch.tensor(0.03))), -127, 127)
        assert torch.equal(ops.quantize_static(x[:1], torch.tensor(0.03))[0], q.to(torch.int8))


@pytest.mark.parametrize("case", LARGE_K, ids=str)
def test_largest_k(case: Case):
    # 128 * 127 * 132104 is 0.02 % below 2^31: a partial sum of codes (up to 255) wraps on the way, the result does not
    x, tiles, _, _ = case.make()
    q, _, row_sum = ops.quantize_rows(x)
    acc = ops.linear_acc(q, row_sum, tiles, case.n, case.bits)
    assert torch.equal(acc.long(), q.long() @ ops.to_rows(tiles, case.n, case.k, case.bits).long().t())


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(0, 150),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["rows", "columns", "every_other", "expanded", "offset", "3d", "3d_permuted"]),
    seed=st.integers(0, 2**31),
)
def test_any_strides(m: int, n: int, k: int, dtype: torch.dtype, layout: str, seed: int):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g).to(dtype)
    plain = x
    if layout == "columns":
        x = x.t().contiguous().t()
    elif layout == "every_other":
        wide = torch.randn(m, 2 * k + 3, generator=g).to(dtype)
        x = wide[:, 1 : 2 * k + 1 : 2]
        plain = x.contiguous()
    elif layout == "expanded":
        x = x[:1].expand(m, k) if m else x
        plain = x.contiguous()
    elif layout == "offset":
        x = torch.cat([torch.zeros(1, dtype=dtype), x.flatten()])[1:].view(m, k)
    elif layout == "3d":
        x = x.view(m, 1, k)
        plain = plain.view(m, 1, k)
    elif layout == "3d_permuted":
        x = torch.randn(k, m, 2, generator=g).to(dtype).permute(2, 1, 0)
        plain = x.contiguous()
    w = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    tiles, scale = ops.from_rows(w), torch.rand(n, generator=g)
    for got, want in zip(ops.quantize_rows(x), ops.quantize_rows.reference(plain), strict=True):
        assert_equal(got, want)
    assert_equal(ops.linear_dynamic(x, tiles, scale, None), ops.linear_dynamic(plain, tiles, scale, None))
    got, want = ops.linear_weight_only(x, tiles, scale, None), ops.linear_weight_only(plain, tiles, scale, None)
    if ops.NATIVE:
        assert_equal(got, want)  # the kernels sum in one order whatever the layout
    else:
        # torch.mm takes another order for other strides and alignments: class F on both sides, and two stores
        size = plain.double().abs() @ w.double().abs().t() * scale.double()
        assert_within(got, want, 2 * (k + 4) * EPS[torch.float32] * size + 2 * EPS[dtype] * want.double().abs() + 1e-30)
    q, _, row_sum = ops.quantize_rows.reference(x)
    padded = torch.full((*q.shape[:-1], k + 5), 77, dtype=torch.int8)[..., :k]  # rows with a stride of their own
    padded.copy_(q)
    assert_equal(ops.linear_acc(padded, row_sum, tiles, n), ops.linear_acc.reference(q, row_sum, tiles, n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_special(dtype: torch.dtype):
    k = 70
    x = torch.randn(12, k)
    x[0, 3] = torch.nan
    x[1, 69] = torch.inf
    x[2, 0] = -torch.inf
    x[3] = 0.0
    x[4] = 1e-45  # denormal in float32
    x[5] *= 2.0**-103
    x[6, :] = 0.0
    x[6, 5] = 2.0**-100
    x[7] = torch.linspace(-1, 1, k) * torch.finfo(dtype).max
    x[8] = torch.arange(k) - 35 + 0.5  # ties
    x = x.to(dtype)
    for got, want in zip(ops.quantize_rows(x), ops.quantize_rows.reference(x), strict=True):
        assert_equal(got, want)
    q, scale, row_sum = ops.quantize_rows(x)
    assert torch.isnan(scale[:3]).all()
    assert (scale[3:6] == 0).all() or dtype == torch.float16
    assert torch.isfinite(scale[3:]).all()
    tiles, w_scale = ops.from_rows(torch.randint(-127, 128, (20, k), dtype=torch.int8)), torch.rand(20) * 1e-4
    for epilogue in ops.EPILOGUES:
        y = ops.linear_dynamic(x, tiles, w_scale, None, epilogue)
        assert torch.isnan(y[:3]).all(), epilogue  # relu keeps NaN
        assert not torch.isnan(y[3:].float()).any(), epilogue
    zero_rows = ops.from_rows(torch.zeros(20, k, dtype=torch.int8))  # how an all-zero weight is stored: codes 128, scale 0
    y = ops.linear_dynamic(x, zero_rows, torch.zeros(20), None)
    assert torch.isnan(y[:3]).all()
    assert (y[3:] == 0).all()


def test_given_absmax():
    x = torch.randn(6, 33)
    absmax = torch.tensor([0.5, 100.0, 0.0, torch.nan, torch.inf, 1e-38])
    for got, want in zip(ops.quantize_rows(x, absmax), ops.quantize_rows.reference(x, absmax), strict=True):
        assert_equal(got, want)
    q = ops.quantize_rows(x, absmax)[0]
    assert q[0].abs().max() == 127  # saturates at the given absmax
    assert q[0].min() >= -127
    x[1, 2] = torch.nan
    assert torch.isnan(ops.quantize_rows(x, absmax)[1][1])


@given(seed=st.integers(0, 2**31), k=st.integers(1, 200), power=st.integers(-60, 60))
def test_quantisation_error(seed: int, k: int, power: int):
    x = torch.randn(4, k, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    q, scale, _ = ops.quantize_rows(x)
    # half a step, and the roundings of x * inv and of scale: each 2^-24 of at most 127 steps
    bound = scale.double().unsqueeze(1) * (0.5 + 127 * 4 * EPS[torch.float32])
    assert_within(q.double() * scale.double().unsqueeze(1), x, bound)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_weight_only(case: Case):
    x, tiles, scale, bias = case.make()
    w = ops.to_rows(tiles, case.n, case.k).double()
    exact = x.double() @ w.t() * scale.double() + bias.double()
    size = x.double().abs() @ w.abs().t() * scale.double()
    # K roundings of partial sums, each at most the sum of magnitudes, then scale and bias, then the store (class F)
    bound = (case.k + 4) * EPS[torch.float32] * (size + bias.double().abs()) + 2 * EPS[case.dtype] * exact.abs() + 1e-30
    for threads in THREADS:
        torch.set_num_threads(threads)
        assert_within(ops.linear_weight_only(x, tiles, scale, bias), exact, bound)
    assert_within(ops.linear_weight_only.reference(x, tiles, scale, bias), exact, bound)
    poisoned = x.clone()
    poisoned[0, 0] = torch.nan
    y = ops.linear_weight_only(poisoned, tiles, scale, bias)
    assert torch.isnan(y[0]).all()
    assert not torch.isnan(y[1:]).any()


def sparse_and_fused(case: Case) -> list[torch.Tensor]:
    """Results of the ops that derive from int8 layers: every sparse storage, a residual, gate and up in one, a norm."""
    x, tiles, scale, bias = case.make()
    g = torch.Generator().manual_seed(3)
    rows = ops.to_rows(tiles, case.n, case.k)
    rows = torch.where(torch.rand(rows.shape, generator=g) < 0.3, rows, 0).to(torch.int8)
    results = [ops.linear_sparse(x, *ops.pack_sparse(rows, how), scale, bias, "silu") for how in ("tiles", "masks", "windows")]
    residual = torch.randn(case.m, case.n, generator=g).to(case.dtype)
    results.append(ops.linear_dynamic(x, tiles, scale, bias, "gelu", case.bits, residual))
    weight = torch.randn(case.k, generator=g).to(case.dtype)
    results += ops.norm_quantize(x, None, weight, None, 1e-5, "rms", False, True)
    if case.n % 16 == 0:
        both = [ops.interleave_glu(t, t) for t in (tiles, scale, bias)]
        results += [ops.linear_glu(x, *both, "silu"), *ops.linear_glu_quantize(x, *both, "gelu")]
    return results


def digest() -> str:
    """Hash of every class I and E result of the case list, and of norms; equal on all native variants."""
    h = hashlib.sha256()
    for case in ALL_WIDTHS:
        x, tiles, scale, bias = case.make()
        q, x_scale, row_sum = ops.quantize_rows(x)
        results = [q, x_scale, row_sum, ops.linear_acc(q, row_sum, tiles, case.n, case.bits)]
        results += [ops.linear_dynamic(x, tiles, scale, bias, epilogue, case.bits) for epilogue in ops.EPILOGUES]
        if case.bits == 1:
            x, tiles, scale, threshold, bias = case.make_xnor()
            results += ops.binarize_rows(x, threshold)
            results += [ops.linear_xnor(x, tiles, scale, threshold, bias, epilogue) for epilogue in ops.EPILOGUES]
        if case.bits == 8:
            results += sparse_and_fused(case)
        for t in results:
            h.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


@pytest.mark.native
def test_variants_agree_bit_for_bit():
    here = digest()
    for name, runnable, missing in tersor.info().variants:
        if not runnable:
            print(f"{name}: not seen on this CPU (no {missing})")
            continue
        env = {**os.environ, "TERSOR_ISA": name}
        code = "import test_exact; print(test_exact.digest())"
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == here, name
