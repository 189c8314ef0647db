"""Shapes, values and comparisons shared by the tests. One oracle per op: its reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

import tersor
import tersor.ops as ops

# One of every format; test_formats_are_all_covered sees to it.
GROUPED = tersor.Int4(32)
INT8 = [tersor.Int8Dynamic(), tersor.Int8Static(0.03), tersor.Int8WeightOnly()]
SPARSE_FLOAT = tersor.SparseFloat()  # has no weight_scale, which many tests read: test_sparse.py has its own
FORMATS = [*INT8, tersor.Int4(), GROUPED, tersor.Ternary(), tersor.Ternary("tensor"), tersor.Binary(), tersor.BinaryXnor()]
FEW_BITS = [fmt for fmt in FORMATS if fmt not in INT8]
FORMATS += [tersor.SparseInt8()]
ANY_K = [fmt for fmt in FORMATS if fmt != GROUPED]


def fitting(fmt: tersor.formats.Format, k: int) -> int:
    """The least K from k on that the format can hold: a multiple of its groups."""
    unit = getattr(fmt, "group_size", None) or 1
    return -(-k // unit) * unit


def values_of(layer: tersor.QuantLinear) -> Tensor:
    """int8 [N, K]: the values of the codes that a layer stores."""
    n, k = layer.out_features, layer.in_features
    if isinstance(layer.format, tersor.SparseInt8):
        return ops.sparse_rows(layer.weight_packed, layer.weight_index, layer.weight_offset, n, k)
    return ops.to_rows(layer.weight_packed, n, k, layer.format.bits)


INPUT_SCALE = torch.tensor(0.03)  # of the static ops


def linear_op(name: str):
    """ops.<name> as a function of (x, weight_packed, weight_scale, bias, epilogue); a static one gets INPUT_SCALE."""
    op = ops.OPS[name]
    if "static" not in name:
        return op
    return lambda x, tiles, scale, bias, epilogue="none": op(x, tiles, scale, bias, INPUT_SCALE, epilogue)


EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp, relative


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and its input. `values`: normal, extreme (every product as large as it gets), one_hot, or zeros."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    bits: int = 8

    def __str__(self) -> str:
        width = "" if self.bits == 8 else f"-w{self.bits}"
        return f"{self.m}x{self.n}x{self.k}-{str(self.dtype).removeprefix('torch.')}-{self.values}{width}"

    def make(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x, weight_packed, weight_scale, bias)"""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.m, self.k, generator=g)
        _, _, lowest, highest = ops.CODES[self.bits]
        w = torch.randint(max(lowest, -127), highest + 1, (self.n, self.k), generator=g, dtype=torch.int8)
        if self.bits == 1:
            w = torch.where(w < 0, -1, 1).to(torch.int8)
        if self.values == "extreme":
            w = torch.where(torch.rand(self.n, 1, generator=g) < 0.5, highest, lowest).to(torch.int8).expand(self.n, self.k)
            x = torch.where(torch.rand(self.m, 1, generator=g) < 0.5, 1.0, -1.0).expand(self.m, self.k)
        elif self.values == "one_hot":
            x = torch.zeros(self.m, self.k)
            x[torch.arange(self.m), torch.arange(self.m) % self.k] = 3.0
        elif self.values == "zeros":
            x = torch.zeros(self.m, self.k)
        scale = torch.rand(self.n, generator=g) * 0.02 + 0.001
        bias = torch.randn(self.n, generator=g)
        return x.to(self.dtype), ops.from_rows(w.contiguous(), self.bits), scale, bias.to(self.dtype)

    def make_xnor(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x, weight_packed, weight_scale, threshold, bias); a tenth of x lies at its threshold, and counts as positive."""
        x, tiles, scale, bias = dataclasses.replace(self, bits=1).make(seed)
        g = torch.Generator().manual_seed(seed + 1)
        threshold = torch.randn(self.k, generator=g).to(self.dtype).float() * (self.values != "zeros")
        if self.values == "normal":
            x = torch.where(torch.rand(x.shape, generator=g) < 0.1, threshold.to(self.dtype), x)
        return x, tiles, scale, threshold, bias


@dataclasses.dataclass(frozen=True)
class GroupedCase(Case):
    """A layer with group scales. K is a multiple of group_size, a multiple of 32."""

    bits: int = 4
    group_size: int = 32

    def __str__(self) -> str:
        return f"{super().__str__()}-g{self.group_size}"

    def make_grouped(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(x, weight_packed, weight_scale, group_scale, bias)"""
        x, tiles, scale, bias = self.make(seed)
        relative = torch.rand(self.n, self.k // self.group_size, generator=torch.Generator().manual_seed(seed + 2))
        return x, tiles, scale, ops.group_scale_bytes(relative), bias


def _cases() -> Iterator[Case]:
    # 1, tile - 1, tile, tile + 1, primes; every M up to the tallest register block and beyond
    for m in (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 33, 65):
        yield Case(m, 48, 64)
    for n in (1, 15, 16, 17, 31, 53, 64, 100):
        yield Case(5, n, 67)
        yield Case(1, n, 33)
    for k in (1, 2, 3, 4, 5, 31, 63, 127, 1023):
        yield Case(3, 37, k)
        yield Case(9, 20, k)
    for dtype in (torch.bfloat16, torch.float16):
        yield Case(1, 33, 130, dtype)
        yield Case(11, 50, 129, dtype)
    for values in ("extreme", "one_hot", "zeros"):
        yield Case(1, 40, 259, values=values)
        yield Case(10, 40, 259, values=values)
    yield Case(130, 384, 1536)  # a feed-forward layer of MiniLM
    yield Case(64, 1000, 384, torch.bfloat16)


def _grouped_cases() -> Iterator[GroupedCase]:
    for m in (1, 2, 3, 4, 5, 8, 9, 17, 33):
        yield GroupedCase(m, 48, 128)
        yield GroupedCase(m, 37, 384, group_size=128)
    for n in (1, 15, 16, 17, 53, 100):
        yield GroupedCase(5, n, 96)
        yield GroupedCase(1, n, 64)
    for k, size in ((32, 32), (64, 64), (1024, 32), (320, 64), (128, 128), (1280, 128), (192, 192), (2048, 1024)):
        yield GroupedCase(1, 37, k, group_size=size)
        yield GroupedCase(9, 20, k, group_size=size)
    for dtype in (torch.bfloat16, torch.float16):
        yield GroupedCase(1, 33, 128, dtype)
        yield GroupedCase(11, 50, 128, dtype, group_size=64)
    for values in ("extreme", "one_hot", "zeros"):
        yield GroupedCase(1, 40, 256, values=values)
        yield GroupedCase(10, 40, 256, values=values, group_size=128)
    yield GroupedCase(130, 384, 1536, group_size=128)


CASES = list(_cases())
ALL_WIDTHS = [dataclasses.replace(case, bits=bits) for bits in ops.CODES for case in CASES]
GROUPED_CASES = list(_grouped_cases())
LARGE_K = [Case(2, 17, 66312, values="extreme"), Case(3, 16, 132104, values="extreme"), Case(2, 5, 132103)]
LARGE_K += [Case(3, 16, k, values="extreme", bits=bits) for bits in (4, 2, 1) for k in (132103, 132104)]


def assert_equal(got: Tensor, want: Tensor) -> None:
    """Every bit; NaN equals NaN."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if not torch.equal(got, want):
        differ = ~((got == want) | ((got != got) & (want != want)))
        assert not differ.any(), f"{int(differ.sum())} of {got.numel()} differ, first at {differ.nonzero()[0].tolist()}"


def assert_within(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """|got - want| <= bound element by element; the caller derives the bound."""
    error = (got.double() - want.double()).abs()
    worst = (error - bound).max().item() if error.numel() else -1.0
    assert worst <= 0, f"error exceeds its bound by {worst:.3g}; largest error {error.max().item():.3g}"


def epilogue_bound(case: Case, before: Tensor, epilogue: str) -> Tensor:
    """How far a float32 epilogue, native or torch's own, may lie from the exact function of its float32 input `before`.

    none, relu: not at all.
    gelu: Abramowitz & Stegun 7.1.26 errs by 1.5e-7 in erfc, halved and times |x| <= 12 where it matters; h = poly * exp carries
    about 16 roundings, and max(x, 0) - |x| h one more: |x| (0.75e-7 + 16 eps h) + eps |x|, taken with h <= 1/2.
    gelu_tanh, silu: x / (1 + exp(-u)): exp errs by 2 ulp + |u| eps (its argument is rounded), the rest by 4 roundings:
    |y| (8 + 2 |u|) eps. torch computes (1 + tanh) instead, whose cancellation costs |x| 2 eps.
    The store rounds once more in the output dtype (float16 below 2^-14: to a multiple of 2^-24).
    """
    eps = EPS[torch.float32]
    x = before.double().abs()
    y = ops.EPILOGUES[epilogue](before.double()).abs()
    if epilogue in ("none", "relu"):
        bound = torch.zeros_like(y)
    elif epilogue == "gelu":
        bound = x.clamp(max=12) * (0.75e-7 + 8 * eps) + 2 * eps * x
    else:
        u = 2 * 0.798 * (x + 0.0447 * x**3) if epilogue == "gelu_tanh" else x
        bound = y * (8 + 2 * u.clamp(max=88)) * eps + 2 * eps * x.clamp(max=12)
    if case.dtype != torch.float32:
        bound = bound + EPS[case.dtype] * (y + bound) + (2.0**-25 if case.dtype == torch.float16 else 0)
    return bound
