"""tersor.numpy: the same bits as the torch ops, without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import ALL_WIDTHS, CASES, GROUPED_CASES, Case, GroupedCase

import tersor.numpy as tn
import tersor.ops as ops

pytestmark = pytest.mark.native


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != torch.bfloat16][::2], ids=str)
def test_same_bits_as_torch(case: Case):
    x, tiles, scale, bias = case.make()
    xn, tn_tiles, sn, bn = x.numpy(), tiles.numpy(), scale.numpy(), bias.float().numpy()
    w = tn.unpack(tn_tiles, case.n, case.k)
    assert np.array_equal(w, ops.to_rows(tiles, case.n, case.k).numpy())
    assert np.array_equal(tn.pack(w), tn_tiles)
    q, s, r = tn.quantize_rows(xn)
    for got, want in zip((q, s, r), ops.quantize_rows(x), strict=True):
        assert np.array_equal(got, want.numpy())
    assert np.array_equal(
        tn.linear_acc(q, r, tn_tiles, case.n), ops.linear_acc(*map(torch.from_numpy, (q, r)), tiles, case.n).numpy()
    )
    for epilogue in ops.EPILOGUES:
        got = tn.linear_dynamic(xn, tn_tiles, sn, bn, epilogue)
        assert np.array_equal(got, ops.linear_dynamic(x, tiles, scale, bias.float(), epilogue).numpy())
        got = tn.linear_s8(q, s, r, tn_tiles, sn, bn, epilogue)
        assert np.array_equal(got, ops.linear_s8(*map(torch.from_numpy, (q, s, r)), tiles, scale, bias.float(), epilogue).numpy())
    step = np.float32(0.03)
    for got, want in zip(tn.quantize_static(xn, step), ops.quantize_static(x, torch.tensor(step)), strict=True):
        assert np.array_equal(got, want.numpy())
    got = tn.linear_static(xn, tn_tiles, sn, bn, step, "relu")
    assert np.array_equal(got, ops.linear_static(x, tiles, scale, bias.float(), torch.tensor(step), "relu").numpy())
    torch.set_num_threads(1)  # float sums are in the same order where the split over threads is
    assert np.array_equal(tn.linear_weight_only(xn, tn_tiles, sn, None), ops.linear_weight_only(x, tiles, scale, None).numpy())


@pytest.mark.parametrize("case", [c for c in ALL_WIDTHS if c.dtype != torch.bfloat16 and c.bits != 8][::5], ids=str)
def test_few_bits_have_the_same_bits_as_torch(case: Case):
    x, tiles, scale, bias = case.make()
    xn, tiles_n, sn, bn, bits = x.numpy(), tiles.numpy(), scale.numpy(), bias.float().numpy(), case.bits
    w = tn.unpack(tiles_n, case.n, case.k, bits)
    assert np.array_equal(w, ops.to_rows(tiles, case.n, case.k, bits).numpy())
    assert np.array_equal(tn.pack(w, bits), tiles_n)
    q, s, r = tn.quantize_rows(xn)
    rows = tuple(map(torch.from_numpy, (q, s, r)))
    assert np.array_equal(tn.linear_acc(q, r, tiles_n, case.n, bits), ops.linear_acc(rows[0], rows[2], tiles, case.n, bits).numpy())
    got = tn.linear_dynamic(xn, tiles_n, sn, bn, "silu", bits)
    assert np.array_equal(got, ops.linear_dynamic(x, tiles, scale, bias.float(), "silu", bits).numpy())
    got = tn.linear_s8(q, s, r, tiles_n, sn, bn, "silu", bits)
    assert np.array_equal(got, ops.linear_s8(*rows, tiles, scale, bias.float(), "silu", bits=bits).numpy())
    if bits == 1:
        x, tiles, scale, threshold, bias = case.make_xnor()
        xn, threshold_n = x.numpy(), threshold.numpy()
        for got, want in zip(tn.binarize_rows(xn, threshold_n), ops.binarize_rows(x, threshold), strict=True):
            assert got.dtype == want.numpy().dtype and np.array_equal(got, want.numpy())
        got = tn.linear_xnor(xn, tiles.numpy(), scale.numpy(), threshold_n, bias.float().numpy(), "gelu")
        assert np.array_equal(got, ops.linear_xnor(x, tiles, scale, threshold, bias.float(), "gelu").numpy())


@pytest.mark.parametrize("case", [c for c in GROUPED_CASES if c.dtype != torch.bfloat16][::3], ids=str)
def test_groups_have_the_same_bits_as_torch(case: GroupedCase):
    x, tiles, scale, group_scale, bias = case.make_grouped()
    relative = ops.group_scales(group_scale, case.n).numpy()
    assert np.array_equal(tn.pack_group_scale(relative), group_scale.numpy())
    torch.set_num_threads(1)
    got = tn.linear_grouped(x.numpy(), tiles.numpy(), scale.numpy(), group_scale.numpy(), bias.float().numpy(), "relu")
    assert np.array_equal(got, ops.linear_grouped(x, tiles, scale, group_scale, bias.float(), "relu").numpy())


def test_messages_of_few_bits():
    w = np.zeros((20, 64), np.int8)
    x, ones, zeros = np.zeros((2, 64), np.float32), np.ones(20, np.float32), np.zeros(64, np.float32)
    tiles, groups = tn.pack(w, 4), tn.pack_group_scale(np.ones((20, 2), np.float32))
    for wrong, bits, message in ((8, 4, "-8 to 7"), (2, 2, "-1 to 1"), (0, 1, "-1 and 1")):
        with pytest.raises(
            ValueError, match=f"pack: weight holds values from {wrong} to {wrong}, expected {message} for bits={bits}"
        ):
            tn.pack(np.full((2, 2), wrong, np.int8), bits)
    for call in (
        lambda: tn.pack(w, 3),
        lambda: tn.linear_dynamic(x, tiles, ones, None, "none", 3),
        lambda: tn.packed_shape(1, 1, 0),
    ):
        with pytest.raises(ValueError, match="bits is [03], expected one of: 8, 4, 2, 1"):
            call()
    with pytest.raises(ValueError, match=r"expected uint8 \(2, 4, 64\) for N=20, K=64 at bits=2"):
        tn.linear_dynamic(x, tiles, ones, None, "none", 2)
    for wrong in (groups[:1], groups[..., :16], groups.view(np.int8), groups[0]):
        with pytest.raises(ValueError, match=r"linear_grouped: group_scale is .*, expected uint8 \(2, G, 32\)"):
            tn.linear_grouped(x, tiles, ones, wrong)
    for wrong in (groups[:, :0], np.zeros((2, 4, 32), np.uint8), np.zeros((2, 3, 32), np.uint8)):
        with pytest.raises(ValueError, match=r"holds [043] groups of K=64, K / G must be a multiple of 32"):
            tn.linear_grouped(x, tiles, ones, wrong)
    with pytest.raises(ValueError, match="binarize_rows: threshold has 63 elements, expected K=64"):
        tn.binarize_rows(x, zeros[1:])
    with pytest.raises(ValueError, match="linear_xnor: threshold is float64"):
        tn.linear_xnor(x, tn.pack(w | 1, 1), ones, zeros.astype(np.float64))
    with pytest.raises(ValueError, match="pack_group_scale: scale is int64"):
        tn.pack_group_scale(np.ones((2, 2), np.int64))


@pytest.mark.parametrize("layout", ["fortran", "strided", "reversed", "read_only", "misaligned"])
def test_layouts(layout: str):
    x, tiles, scale, _ = Case(7, 33, 50).make()
    plain = x.numpy()
    if layout == "fortran":
        array = np.asfortranarray(plain)
    elif layout == "strided":
        array = np.zeros((14, 150), np.float32)[::2, ::3]
        array[:] = plain
    elif layout == "reversed":
        array = plain[::-1, ::-1].copy()[::-1, ::-1]
    elif layout == "read_only":
        array = plain.copy()
        array.flags.writeable = False
    else:
        raw = np.zeros(plain.nbytes + 1, np.uint8)
        array = raw[1:].view(np.float32).reshape(plain.shape)
        array[:] = plain
    want = tn.linear_dynamic(plain, tiles.numpy(), scale.numpy())
    assert np.array_equal(tn.linear_dynamic(array, tiles.numpy(), scale.numpy()), want)
    q, _, r = tn.quantize_rows(array)
    assert np.array_equal(tn.linear_acc(np.asfortranarray(q), r, tiles.numpy(), 33), tn.linear_acc(q, r, tiles.numpy(), 33))


def test_weights_and_messages():
    w = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
    tiles, scale = tn.quantize_weight(w)
    assert np.abs(tn.unpack(tiles, 20, 30) * scale[:, None] - w).max() <= scale.max() * 0.5001
    x = np.zeros((2, 30), np.float32)
    with pytest.raises(TypeError, match="linear_dynamic: x is float64, expected float32 or float16"):
        tn.linear_dynamic(x.astype(np.float64), tiles, scale)
    with pytest.raises(ValueError, match="x has 1 dimensions"):
        tn.quantize_rows(x[0])
    with pytest.raises(ValueError, match=r"weight_packed is uint8 \(1, 8, 64\), expected uint8 \(2, 8, 64\) for N=20, K=30"):
        tn.linear_dynamic(x, tiles[:1], scale)
    with pytest.raises(ValueError, match="epilogue is 'swish', expected one of: none relu"):
        tn.linear_dynamic(x, tiles, scale, None, "swish")
    with pytest.raises(ValueError, match=r"bias"):
        tn.linear_dynamic(x, tiles, scale, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="holds NaN or inf"):
        tn.quantize_weight(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(TypeError, match="q is float32"):
        tn.linear_acc(x, np.zeros(2, np.int32), tiles, 20)


def test_runs_with_torch_blocked():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, tersor.numpy as tn\n"
        "w, s = tn.quantize_weight(np.eye(20, dtype=np.float32))\n"
        "x = np.arange(40, dtype=np.float32).reshape(2, 20)\n"
        "print(np.abs(tn.linear_dynamic(x, w, s) - x).max() <= 39 / 127, tn.info()['kernels'])"
    )
    out = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert out.stdout.startswith("True"), out.stderr


@pytest.mark.parametrize("case", [Case(5, 37, 70), Case(9, 64, 33, torch.float16), Case(3, 48, 64, bits=2)], ids=str)
def test_fused_ops_have_the_same_bits_as_torch(case: Case):
    x, tiles, scale, bias = case.make()
    bias = bias.float()
    xn, residual = x.numpy(), torch.randn(case.m, case.n).to(case.dtype)
    stored, bits = (tiles.numpy(), scale.numpy(), bias.numpy()), case.bits
    got = tn.linear_dynamic(xn, *stored, "relu", bits, np.asfortranarray(residual.numpy()))
    assert np.array_equal(got, ops.linear_dynamic(x, tiles, scale, bias, "relu", bits, residual).numpy())
    rows = ops.quantize_rows(x)
    got = tn.linear_s8(*(t.numpy() for t in rows), *stored, "none", bits, residual.float().numpy())
    assert np.array_equal(got, ops.linear_s8(*rows, tiles, scale, bias, "none", torch.float32, bits, residual.float()).numpy())
    for kind in ("layer", "rms"):
        b = None if kind == "rms" else torch.randn(case.k)
        weight, other = torch.randn(case.k), torch.randn(case.m, case.k).to(case.dtype)
        got = tn.norm_quantize(xn.T.copy().T, other.numpy(), weight.numpy(), None if b is None else b.numpy(), 1e-6, kind)
        for g, w in zip(got, ops.norm_quantize(x, other, weight, b, 1e-6, kind, True, True), strict=True):
            assert np.array_equal(g, w.numpy())
    got = tn.linear_dynamic_quantize(xn, *stored, "silu", bits)
    for g, w in zip(got, ops.linear_dynamic_quantize(x, tiles, scale, bias, "silu", bits), strict=True):
        assert np.array_equal(g, w.numpy())
    if case.n % 32 == 0:
        assert np.array_equal(tn.linear_glu(xn, *stored, "gelu", bits), ops.linear_glu(x, tiles, scale, bias, "gelu", bits).numpy())
        got = tn.linear_glu_quantize(xn, *stored, "silu", bits)
        for g, w in zip(got, ops.linear_glu_quantize(x, tiles, scale, bias, "silu", bits), strict=True):
            assert np.array_equal(g, w.numpy())
    else:
        for call in (tn.linear_glu, tn.linear_glu_quantize):
            with pytest.raises(ValueError, match=f"weight_scale has {case.n} channels, expected a multiple of 32"):
                call(xn, *stored, "silu", bits)
    for wrong in (residual.numpy()[:1], residual.double().numpy()):
        with pytest.raises(ValueError, match=r"linear_dynamic: residual is float.*, expected float"):
            tn.linear_dynamic(xn, *stored, "none", bits, wrong)
    with pytest.raises(ValueError, match="kind is 'batch', expected layer or rms"):
        tn.norm_quantize(xn, kind="batch")
    with pytest.raises(ValueError, match="bias is given, expected None"):
        tn.norm_quantize(xn, bias=np.zeros(case.k, np.float32), kind="rms")


def test_other_residuals_have_the_same_bits_as_torch():
    x, tiles, scale, threshold, bias = Case(5, 37, 70).make_xnor()
    residual = torch.randn(5, 37)
    arrays = [t.numpy() for t in (x, tiles, scale, threshold, bias)]
    got = tn.linear_xnor(*arrays, "silu", residual.numpy())
    assert np.array_equal(got, ops.linear_xnor(x, tiles, scale, threshold, bias, "silu", residual).numpy())
    x, tiles, scale, bias = Case(5, 37, 70).make()
    got = tn.linear_static(x.numpy(), tiles.numpy(), scale.numpy(), bias.numpy(), 0.03, "none", residual.numpy())
    assert np.array_equal(got, ops.linear_static(x, tiles, scale, bias, torch.tensor(0.03), "none", residual).numpy())
    x, tiles, scale, groups, bias = GroupedCase(5, 37, 64).make_grouped()
    got = tn.linear_grouped(*(t.numpy() for t in (x, tiles, scale, groups, bias)), "none", residual.numpy())
    assert np.array_equal(got, ops.linear_grouped(x, tiles, scale, groups, bias, "none", residual).numpy())
