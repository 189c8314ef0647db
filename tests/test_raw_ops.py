"""torch.ops.tersor.* called past the Python checks: the bindings are the second line, and must refuse what a kernel would read or
write out of bounds."""

from __future__ import annotations

import fuzz_raw_ops
import pytest
import torch
from cases import Case, GroupedCase

import tersor.ops as ops

N, K = 20, 24


@pytest.mark.native
def test_raw_ops_check_again():
    """torch.ops.tersor.* without the Python checks: sizes, dtypes, devices and layouts that would be read out of bounds."""
    x, tiles, scale, bias = Case(3, N, K).make()
    q, x_scale, row_sum = ops.quantize_rows(x)
    raw = torch.ops.tersor
    wide = torch.zeros(2, 6, 128, dtype=torch.uint8)[..., ::2]
    for tiles_, message in ((tiles[:1], r"weight_packed is \[1, 6, 64\], expected \[2, 6, 64\]"),
                            (tiles[:, :5], r"weight_packed is \[2, 5, 64\]"), (tiles[..., :63], r"weight_packed is \[2, 6, 63\]"),
                            (tiles.view(-1), r"weight_packed is \[768\]"), (tiles.char(), "weight_packed has dtype Char, expected Byte"),
                            (wide, "weight_packed is not contiguous"), (tiles.transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
                            (tiles[:1].expand(2, 6, 64), "weight_packed is not contiguous")):  # fmt: skip
        for call in (lambda t: raw.linear_dynamic(x, t, scale, bias), lambda t: raw.linear_weight_only(x, t, scale, bias),
                     lambda t: raw.linear_acc(q, row_sum, t, N), lambda t: raw.linear_s8(q, x_scale, row_sum, t, scale, bias)):  # fmt: skip
            with pytest.raises((RuntimeError, ValueError), match=message):
                call(tiles_)
    for call, message in (
        (lambda: raw.linear_dynamic(x, tiles, scale[:5], bias), r"weight_packed is \[2, 6, 64\], expected \[1, 6, 64\]"),
        (lambda: raw.linear_dynamic(x, tiles, torch.ones(2 * N)[::2], bias), "weight_scale is not contiguous"),
        (lambda: raw.linear_dynamic(x, tiles, scale.double(), bias), "weight_scale has dtype Double, expected Float"),
        (lambda: raw.linear_dynamic(x, tiles, scale[None], bias), "weight_scale has 2 dimensions"),
        (lambda: raw.linear_dynamic(x, tiles, scale, bias[:-1]), r"bias is \[19\], expected \[20\]"),
        (lambda: raw.linear_dynamic(x, tiles, scale, bias.double()), "bias has dtype Double"),
        (lambda: raw.linear_dynamic(x, tiles, scale, bias, "swish"), "epilogue is 'swish', expected one of: none relu"),
        (lambda: raw.linear_dynamic(x.double(), tiles, scale, bias), "x has dtype Double"),
        (lambda: raw.linear_dynamic(x[0, 0], tiles, scale, bias), "x is 0-dimensional"),
        (lambda: raw.linear_acc(q, row_sum[:2], tiles, N), r"row_sum must be contiguous Int \[3\]"),
        (lambda: raw.linear_acc(q, row_sum[None], tiles, N), r"row_sum must be contiguous Int \[3\]"),
        (lambda: raw.linear_acc(q, row_sum.long(), tiles, N), r"row_sum must be contiguous Int \[3\]"),
        (lambda: raw.linear_acc(q, row_sum[:1].expand(3), tiles, N), r"row_sum must be contiguous Int \[3\]"),
        (lambda: raw.linear_acc(q, row_sum, tiles, -1), "out_features is -1"),
        (lambda: raw.linear_acc(q, row_sum, tiles, 2**63 - 1), "out_features is 9223372036854775807"),
        (lambda: raw.linear_acc(q.byte(), row_sum, tiles, N), "q must be int8"),
        (lambda: raw.linear_s8(q, x_scale[:2], row_sum, tiles, scale, bias), r"scale must be contiguous Float \[3\]"),
        (lambda: raw.linear_s8(q, x_scale, row_sum, tiles, scale, bias, "none", torch.int8), "out_dtype has dtype Char"),
        (lambda: raw.quantize_rows(x, torch.ones(4)), r"absmax must be contiguous Float \[3\]"),
        (lambda: raw.quantize_rows(x, torch.ones(3, 1)), r"absmax must be contiguous Float \[3\]"),
        (lambda: raw.quantize_rows(x, torch.ones(3).double()), r"absmax must be contiguous Float \[3\]"),
        (lambda: raw.quantize_rows(torch.zeros(1, 132105)), "K=132105 is above 132104"),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()


@pytest.mark.native
def test_raw_ops_of_few_bits_check_again():
    """The same for widths, groups and thresholds: what would make a kernel read beyond its tensors."""
    raw = torch.ops.tersor
    calls = []
    for bits in (4, 2, 1):
        x, tiles, scale, bias = Case(3, N, 70, bits=bits).make()
        q, x_scale, row_sum = ops.quantize_rows(x)
        other = 4 if bits == 1 else bits // 2
        calls += [
            lambda x=x, t=tiles, s=scale, o=other: raw.linear_dynamic(x, t, s, None, "none", o),
            lambda q=q, r=row_sum, t=tiles, o=other: raw.linear_acc(q, r, t, N, o),
            lambda q=q, a=x_scale, r=row_sum, t=tiles, s=scale, o=other: raw.linear_s8(
                q, a, r, t, s, None, "none", torch.float32, o
            ),
            lambda x=x, t=tiles[:, :-1], s=scale, b=bits: raw.linear_dynamic(x, t, s, None, "none", b),
            lambda x=x, t=tiles[..., ::2], s=scale, b=bits: raw.linear_dynamic(x, t, s, None, "none", b),
        ]
    x, tiles, scale, bias = Case(3, N, 70).make()
    calls += [
        lambda b=bits: raw.linear_dynamic(x, tiles, scale, bias, "none", b)
        for bits in (0, 3, 5, 7, -1, -8, 16, 32, 2**40, -(2**63))
    ]
    x, tiles, scale, groups, bias = GroupedCase(3, N, 128).make_grouped()
    for wrong in (groups[:1], groups[:, :3], groups[:, :0], groups[..., :16], groups.char(), groups[0], groups[None],
                  groups.repeat(1, 2, 1), groups.transpose(0, 1).contiguous().transpose(0, 1), groups[:, :1].expand(2, 4, 32),
                  torch.zeros(2, 4, 64, dtype=torch.uint8)[..., ::2], groups.to("meta"), groups.to_sparse(),
                  torch.zeros((), dtype=torch.uint8).expand(2, 2**40, 32)):  # fmt: skip
        calls.append(lambda g=wrong: raw.linear_grouped(x, tiles, scale, g, bias))
    calls.append(lambda: raw.linear_grouped(x[:, :96], tiles, scale, groups, bias))
    calls.append(lambda: raw.linear_grouped(x, tiles[:, :8], scale, groups, bias))
    calls.append(lambda: raw.linear_grouped(x, tiles, scale[:16], groups, bias))
    y, signs, y_scale, threshold, y_bias = Case(3, N, 70).make_xnor()
    for wrong in (threshold[:69], threshold.double(), threshold.half(), threshold[None], torch.tensor(0.0), torch.zeros(140)[::2],
                  torch.zeros(1).expand(70), threshold.to("meta"), threshold.to_sparse()):  # fmt: skip
        calls.append(lambda t=wrong: raw.binarize_rows(y, t))
        calls.append(lambda t=wrong: raw.linear_xnor(y, signs, y_scale, t, y_bias))
    calls.append(lambda: raw.linear_xnor(y, signs[:, :2], y_scale, threshold, y_bias))
    calls.append(lambda: raw.linear_xnor(y.long(), signs, y_scale, threshold, y_bias))
    calls.append(lambda: raw.binarize_rows(torch.zeros(1, 132105), torch.zeros(132105)))
    for i, call in enumerate(calls):
        with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
            pytest.fail(f"call {i} was taken: {call()}")


@pytest.mark.native
@pytest.mark.filterwarnings("ignore")
def test_fuzz_raw_ops():
    """make test-full runs more of it, under AddressSanitizer and on each instruction set."""
    outcomes = fuzz_raw_ops.run(0, 0, 2000)
    assert outcomes["refused"] > 300 and outcomes["returned"] > 300 and outcomes["checked"] > 100
