"""Group scales and binary activations: every integer sum exact (class I), XNOR layers equal between variants (class E), sums of groups
within a derived bound (class F). Run once per instruction set by TERSOR_ISA."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, EPS, GROUPED_CASES, Case, GroupedCase, assert_equal, assert_within, epilogue_bound
from test_exact import DTYPES, each_thread_count

import tersor.ops as ops

pytestmark = pytest.mark.exact


def sums_of_groups(case: GroupedCase, q: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """int64 [G, M, N], by plain integers."""
    groups = case.k // case.group_size
    w = ops.to_rows(tiles, case.n, case.k, 4).long().view(case.n, groups, case.group_size)
    return torch.einsum("mgk,ngk->gmn", q.long().view(case.m, groups, case.group_size), w)


@pytest.mark.parametrize("case", GROUPED_CASES, ids=str)
def test_every_sum_of_a_group(case: GroupedCase):
    """One group scale 1 and the others 0, the other scales powers of two: y is the integer itself, which is below 2^24."""
    _, tiles, _, _, _ = case.make_grouped()
    groups = case.k // case.group_size
    x = torch.randint(-127, 128, (case.m, case.k), generator=torch.Generator().manual_seed(5)).float()
    if case.values == "extreme":
        x = x.sign() * 127
    x[:, 0] = 127.0  # absmax 127: quantised to itself
    q, scale, _ = ops.quantize_rows(x)
    assert torch.equal(q.float(), x)
    want = sums_of_groups(case, q, tiles)
    ones = torch.ones(case.n)
    for g in range(groups) if groups <= 8 else (0, 1, groups // 2, groups - 1):
        relative = torch.zeros(case.n, groups)
        relative[:, g] = 1.0
        (y,) = each_thread_count(lambda r=relative: (ops.linear_grouped(x, tiles, ones, ops.group_scale_bytes(r), None),))
        assert_equal(y, want[g].float() * scale.unsqueeze(1))  # scale = 127 * (1/127f), 1 but for a rounding
        # the way back: the integer exactly
        assert torch.equal((y.double() / scale.double().unsqueeze(1)).round().long(), want[g])


@pytest.mark.parametrize("epilogue", ops.EPILOGUES)
@pytest.mark.parametrize("case", GROUPED_CASES, ids=str)
def test_grouped_layer(case: GroupedCase, epilogue: str):
    x, tiles, scale, group_scale, bias = case.make_grouped()
    groups = case.k // case.group_size
    q, x_scale, _ = ops.quantize_rows(x)
    relative = ops.group_scales(group_scale, case.n).double()
    parts = sums_of_groups(case, q, tiles).double() * relative.t().unsqueeze(1)
    both = x_scale.double().unsqueeze(1) * scale.double()
    before, size = parts.sum(0) * both + bias.double(), parts.abs().sum(0) * both
    # A rounding of each product, of each sum (none of the first), of f32(acc) above 2^24, two of the scales, one of the bias:
    # (2 G + 2) of the sum of magnitudes, and one of the result.
    bound = (2 * groups + 2) * EPS[torch.float32] * size + EPS[torch.float32] * before.abs()
    exact = ops.EPILOGUES[epilogue](before)
    # The slope of an epilogue is below 1.13 (gelu).
    bound = 1.13 * bound + epilogue_bound(case, before.float(), epilogue) + EPS[case.dtype] * exact.abs()
    (y,) = each_thread_count(lambda: (ops.linear_grouped(x, tiles, scale, group_scale, bias, epilogue),))
    assert_within(y, exact, bound)
    assert_within(ops.linear_grouped.reference(x, tiles, scale, group_scale, bias, epilogue), exact, bound)


def test_equal_group_scales_are_no_groups():
    case = GroupedCase(7, 50, 256)
    x, tiles, scale, bias = case.make()
    group_scale = ops.group_scale_bytes(torch.full((case.n, 8), 0.5))
    got = ops.linear_grouped(x, tiles, scale, group_scale, bias)
    assert_equal(got, ops.linear_dynamic(x, tiles, scale * 0.5, bias, "none", 4))  # sums below 2^24, halves: nothing is rounded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_binarised_rows(case: Case):
    x, _, _, threshold, _ = case.make_xnor()
    bits, scale = each_thread_count(lambda: ops.binarize_rows(x, threshold))
    for got, want in zip((bits, scale), ops.binarize_rows.reference(x, threshold), strict=True):
        assert_equal(got, want)  # the sum too: the reference adds in the kernels' order
    # against plain Python: element k of a row at bit 8 b + j of its word, k = 32 word + 4 j + b
    positive = x[0].float() >= threshold
    words = [0] * bits.shape[1]
    for k in range(case.k):
        words[k // 32] |= int(positive[k]) << (8 * (k % 4) + k % 32 // 4)
    assert [int(word) & 0xFFFFFFFF for word in bits[0]] == words
    distance = (x.double() - threshold.double()).abs()
    # a rounding of x - threshold, of the product, of 1/K, and K - 1 of partial sums, each at most the whole
    bound = (case.k + 2) * EPS[torch.float32] * distance.mean(1)
    assert_within(scale, distance.mean(1), bound)


@pytest.mark.parametrize("epilogue", ops.EPILOGUES)
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_xnor_layer(case: Case, epilogue: str):
    x, tiles, scale, threshold, bias = case.make_xnor()
    (y,) = each_thread_count(lambda: (ops.linear_xnor(x, tiles, scale, threshold, bias, epilogue),))
    signs = torch.where(x.float() >= threshold, 1, -1)
    acc = signs.long() @ ops.to_rows(tiles, case.n, case.k, 1).long().t()
    before = acc.float() * ops.binarize_rows(x, threshold)[1].unsqueeze(1) * scale + bias.float()
    if epilogue in ("none", "relu"):
        assert_equal(y, ops.EPILOGUES[epilogue](before).to(case.dtype))  # the integers exactly, and each rounding
    exact, bound = ops.EPILOGUES[epilogue](before.double()), epilogue_bound(case, before, epilogue)
    assert_within(y, exact, bound)
    assert_within(ops.linear_xnor.reference(x, tiles, scale, threshold, bias, epilogue), exact, bound)


def test_xnor_sums_at_the_largest_k():
    k, n = 132104, 3
    w = torch.ones(n, k, dtype=torch.int8)
    w[1] = -1
    w[2, 1::2] = -1
    x = torch.ones(2, k)
    x[1, ::3] = -1
    tiles, ones, zeros = ops.from_rows(w, 1), torch.ones(n), torch.zeros(k)
    acc = x.long() @ w.long().t()
    y = ops.linear_xnor(x, tiles, ones, zeros, None)
    assert_equal(y, acc.float() * ops.binarize_rows(x, zeros)[1].unsqueeze(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_special(dtype: torch.dtype):
    k = 70
    x = torch.randn(10, k)
    x[0, 3] = torch.nan
    x[1, 69] = torch.inf
    x[2, 0] = -torch.inf
    x[3] = 0.0
    x[4] = -0.0
    x[5] = 1e-45  # denormal in float32
    x[6] = torch.linspace(-1, 1, k) * torch.finfo(dtype).max
    x = x.to(dtype)
    zeros = torch.zeros(k)
    bits, scale = ops.binarize_rows(x, zeros)
    assert_equal(bits, ops.binarize_rows.reference(x, zeros)[0])
    assert scale[:3].isnan().all()
    assert (bits[:3] == 0).all()
    assert torch.isfinite(scale[3:]).all()  # half of the largest float, though the sum of the row is not
    assert (scale[3:5] == 0).all()
    assert_equal(bits[3], bits[4])  # -0.0 is positive too
    full = ops.binarize_rows(torch.ones(1, k), zeros)[0]
    assert_equal(bits[3:4], full)
    tiles, scales = ops.from_rows(torch.where(torch.rand(20, k) < 0.5, 1, -1).to(torch.int8), 1), torch.rand(20) * 1e-4
    for epilogue in ops.EPILOGUES:
        y = ops.linear_xnor(x, tiles, scales, zeros, None, epilogue)
        assert y[:3].isnan().all(), epilogue
        assert not y[3:].float().isnan().any(), epilogue
    grouped = torch.randn(4, 64)
    grouped[1, 33] = torch.nan
    tiles = ops.from_rows(torch.ones(20, 64, dtype=torch.int8), 4)
    y = ops.linear_grouped(grouped.to(dtype), tiles, scales, ops.group_scale_bytes(torch.ones(20, 2)), None)
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2, 3]]).all()


@pytest.mark.parametrize("layout", ["columns", "every_other", "expanded", "offset", "3d_permuted"])
@pytest.mark.parametrize("m", [1, 13])
def test_any_strides(layout: str, m: int):
    k, n = 96, 21
    x = torch.randn(m, k)
    if layout == "columns":
        x = x.t().contiguous().t()
    elif layout == "every_other":
        x = torch.randn(m, 2 * k + 3)[:, 1 : 2 * k + 1 : 2]
    elif layout == "expanded":
        x = x[:1].expand(m, k)
    elif layout == "offset":
        x = torch.cat([torch.zeros(1), x.flatten()])[1:].view(m, k)
    else:
        x = torch.randn(k, m, 2).permute(2, 1, 0)
    plain = x.contiguous()
    _, tiles, scale, threshold, _ = Case(1, n, k).make_xnor()
    for got, want in zip(ops.binarize_rows(x, threshold), ops.binarize_rows(plain, threshold), strict=True):
        assert_equal(got, want)
    assert_equal(ops.linear_xnor(x, tiles, scale, threshold, None), ops.linear_xnor(plain, tiles, scale, threshold, None))
    for bits in (4, 2, 1):
        _, tiles, scale, _ = Case(1, n, k, bits=bits).make()
        assert_equal(
            ops.linear_dynamic(x, tiles, scale, None, "none", bits), ops.linear_dynamic(plain, tiles, scale, None, "none", bits)
        )
    _, tiles, scale, group_scale, _ = GroupedCase(1, n, k).make_grouped()
    assert_equal(ops.linear_grouped(x, tiles, scale, group_scale, None), ops.linear_grouped(plain, tiles, scale, group_scale, None))


@pytest.mark.native
@pytest.mark.parametrize("offset", [0, 1, 16, 32])
def test_misaligned_weights(offset: int):
    def moved(t: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros(t.numel() + offset, dtype=torch.uint8)
        return buffer[offset:].view(t.shape).copy_(t)

    for bits in (4, 2, 1):
        x, tiles, scale, bias = Case(9, 50, 100, bits=bits).make()
        assert_equal(
            ops.linear_dynamic(x, moved(tiles), scale, bias, "none", bits), ops.linear_dynamic(x, tiles, scale, bias, "none", bits)
        )
    x, tiles, scale, threshold, bias = Case(9, 50, 100).make_xnor()
    assert_equal(ops.linear_xnor(x, moved(tiles), scale, threshold, bias), ops.linear_xnor(x, tiles, scale, threshold, bias))
    x, tiles, scale, group_scale, bias = GroupedCase(9, 50, 96).make_grouped()
    got = ops.linear_grouped(x, moved(tiles), scale, moved(group_scale), bias)
    assert_equal(got, ops.linear_grouped(x, tiles, scale, group_scale, bias))
