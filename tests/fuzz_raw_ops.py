"""Fuzz of the raw ops: whatever the arguments, a clear exception or the reference's result; never a crash or a stray read.

    python tests/fuzz_raw_ops.py --cases 60000           make test-full runs it under AddressSanitizer
    python tests/fuzz_raw_ops.py --case 1234             one case again, after a failure that named it

Every buffer is exactly as large as its view needs, so that a sanitizer sees a read of one byte too many.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cases import EPS
from torch import Tensor

import tersor.ops as ops

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)
LINEAR = ("linear_dynamic", "linear_static", "linear_weight_only")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = (
    *("quantize_rows", "quantize_static", "binarize_rows", *LINEAR, "linear_grouped", "linear_xnor"),
    *("linear_acc", "linear_s8", "input_grad", "linear_sparse", "linear_sparse_float"),
    *("norm_quantize", "linear_glu", "linear_glu_s8", "linear_glu_quantize", "linear_glu_s8_quantize"),
    *("linear_dynamic_quantize", "linear_s8_quantize"),
)
ON_ROWS = {
    "linear_acc": 1,
    "linear_s8": 2,
    "linear_glu_s8": 2,
    "linear_glu_s8_quantize": 2,
    "linear_s8_quantize": 2,
}  # -> where row_sum is
BITS = (8, 4, 2, 1)
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33, 40, 70)
SIZES_N = (0, 1, 2, 15, 16, 17, 31, 33, 48, 65, 100)
SIZES_K = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130, 259, 520)
NUMBERS = (-1, 0, 1, 16, 17, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
TEXTS = ("", "swish", "Relu", "relu\0", "x" * 5000, "\u212a")


class Fuzz:
    """One case: the arguments of a call, made from a seed and a number alone."""

    def __init__(self, seed: int, case: int) -> None:
        self.rng = np.random.default_rng([seed, case])
        self.generator = torch.Generator().manual_seed(int(self.rng.integers(1 << 60)))
        self.name = self.pick(NAMES)
        self.valid = bool(self.rng.random() < 0.5)
        self.garbage = False  # whether sparse tensors hold what no weight gives: the kernel and the reference differ on it
        self.args = self.arguments()
        if not self.valid:
            # Wrong bytes of sparse weights are enough: the shapes may stay good, so that a kernel sees them.
            for _ in range(0 if self.garbage and self.chance(0.7) else self.pick((1, 1, 1, 2))):
                self.spoil()

    def pick(self, values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    # ---- tensors

    def view(self, t: Tensor) -> Tensor:
        """The values of t (or of a few of its elements) through other strides, in a buffer that ends with its last element."""
        how = self.pick(("plain", "plain", "offset", "columns", "steps", "expanded", "overlap", "padded", "negative", "odd"))
        if t.numel() == 0 or t.dim() == 0 or how == "plain" or not t.is_contiguous():
            return t
        if how == "negative":
            return torch._neg_view(t) if t.dtype.is_floating_point else t
        if how == "odd":
            return self.moved(t)
        strides = list(t.stride())
        offset = 0
        if how == "offset":
            offset = self.pick((1, 2, 3, 7, 16))
        elif how == "columns":
            order = self.rng.permutation(t.dim())
            step = 1
            for d in order:
                strides[d] = step
                step *= t.shape[d]
        elif how == "steps":
            factor = self.pick((2, 3, 5))
            strides = [s * factor for s in strides]
        elif how == "padded" and t.dim() > 1:
            pad = self.pick((1, 3, 61))
            step = t.shape[-1] + pad
            for d in reversed(range(t.dim() - 1)):
                strides[d] = step
                step *= t.shape[d]
        elif how == "expanded":
            strides[self.pick(range(t.dim()))] = 0
        elif how == "overlap":
            strides = [self.pick((0, 1, 2, s)) for s in strides]
        last = sum((size - 1) * s for size, s in zip(t.shape, strides, strict=True))
        buffer = torch.zeros(offset + last + 1, dtype=t.dtype)
        out = buffer.as_strided(t.shape, strides, offset)
        if how in ("expanded", "overlap"):
            buffer.copy_(t.reshape(-1)[torch.arange(buffer.numel()) % t.numel()])
        else:
            out.copy_(t)
        return out

    def floats(self, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=self.generator)
        if x.numel() and self.chance(0.3):
            flat = x.view(-1)
            # sums that overflow depend on their order (class F)
            in_float = ("linear_weight_only", "linear_grouped", "linear_xnor", "linear_sparse_float")
            limit = 1e30 if self.name in in_float else 1e15 if "_quantize" in self.name or "glu" in self.name else 3.4e38
            for _ in range(self.pick((1, 2, 5))):
                special = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 1e-39, 2.0**-100, limit, -limit)
                flat[int(self.rng.integers(flat.numel()))] = self.pick(special)
        return x.to(self.pick(FLOATS))

    def integers(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype)

    def moved(self, t: Tensor) -> Tensor:
        """t at an odd address: what a mapped file gives."""
        if t.numel() == 0 or self.chance(0.5):
            return t
        raw = t.resolve_neg().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        at = self.pick((1, 2, 4, 16, 32))
        buffer = np.empty(raw.numel() + at, np.uint8)
        buffer[at:] = raw.numpy()
        return torch.from_numpy(buffer[at:].view(_numpy_dtype(t.dtype))).view(t.dtype).view(t.shape)

    # ---- arguments

    def arguments(self) -> list[Any]:
        m, n, k = self.pick(ROWS), self.pick(SIZES_N), self.pick(SIZES_K)
        lead = self.pick(((m,), (m,), (m,), (), (2, m), (m, 1), (1, m, 2), (0, m)))
        bits = {"linear_grouped": 4, "linear_xnor": 1, "linear_static": 8, "linear_weight_only": 8}.get(self.name, self.pick(BITS))
        if self.name == "linear_grouped":
            k = 32 * self.pick((0, 1, 2, 3, 4, 8, 12))
        if "glu" in self.name:
            n = 32 * self.pick((0, 1, 2, 3))
        tiles = self.moved(ops.pack(self.integers(0, 2**bits, (n, k), torch.uint8), bits))
        scale = self.moved(torch.rand(n, generator=self.generator) * 0.02)
        bias = None if self.chance(0.3) else self.moved(torch.randn(n, generator=self.generator).to(self.pick(FLOATS)))
        epilogue = self.pick(list(ops.EPILOGUES))
        if self.name == "quantize_rows":
            absmax = torch.randn(lead, generator=self.generator) if self.chance(0.3) else None
            return [self.view(self.floats((*lead, k))), absmax]
        input_scale = self.moved(torch.tensor(self.pick((0.03, -0.5, 0.0, 2.0**-101, torch.inf, torch.nan))))
        if self.name == "quantize_static":
            return [self.view(self.floats((*lead, k))), input_scale]
        threshold = self.moved(torch.randn(k, generator=self.generator))
        if self.name == "binarize_rows":
            return [self.view(self.floats((*lead, k))), threshold]
        if self.name == "linear_xnor":
            return [self.view(self.floats((*lead, k))), tiles, scale, threshold, bias, epilogue]
        if self.name == "linear_grouped":
            groups = self.pick([g for g in range(1, k // 32 + 1) if k // 32 % g == 0] or [0])
            relative = self.moved(ops.group_scale_bytes(torch.rand((n, groups), generator=self.generator)))
            return [self.view(self.floats((*lead, k))), tiles, scale, relative, bias, epilogue]
        if self.name.startswith("linear_sparse"):
            return [self.view(self.floats((*lead, k))), *self.sparse(n, k), bias, epilogue]
        if self.name in LINEAR:
            extra = [input_scale] if self.name == "linear_static" else []
            x = self.view(self.floats((*lead, k)))
            width = [bits, self.residual((*lead, n), x.dtype)] if self.name == "linear_dynamic" else []
            return [x, tiles, scale, bias, *extra, epilogue, *width]
        if self.name in ("linear_glu", "linear_glu_quantize", "linear_dynamic_quantize"):
            return [self.view(self.floats((*lead, k))), tiles, scale, bias, epilogue, bits]
        if self.name == "norm_quantize":
            x, kind = self.view(self.floats((*lead, k))), self.pick(("layer", "rms"))
            weight = self.pick((None, self.moved(torch.randn(k, generator=self.generator).to(self.pick(FLOATS)))))
            bias = None if kind == "rms" else self.pick((None, self.moved(torch.randn(k, generator=self.generator))))
            eps = self.pick((1e-5, 1e-12, 0.1))
            return [x, self.residual((*lead, k), x.dtype), weight, bias, eps, kind, self.chance(0.5), self.chance(0.5)]
        if self.name == "input_grad":
            return [torch.randn((*lead, n), generator=self.generator), tiles, scale, k, None, bits]
        q = self.view(self.integers(-127, 128, (*lead, k), torch.int8))
        row_sum = self.moved(q.sum(-1, dtype=torch.int32))
        if self.name == "linear_acc":
            return [q, row_sum, tiles, n, bits]
        x_scale = self.moved(torch.rand(lead, generator=self.generator))
        dtype = self.pick(FLOATS)
        residual = [self.residual((*lead, n), dtype)] if self.name == "linear_s8" else []
        return [q, x_scale, row_sum, tiles, scale, bias, epilogue, dtype, bits, *residual]

    def residual(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return self.view(torch.randn(shape, generator=self.generator).to(dtype)) if self.chance(0.5) else None

    def sparse(self, n: int, k: int) -> list[Tensor]:
        """The stored tensors of a sparse weight; where `valid` is False often with another structure than shapes say."""
        density = self.pick((0.0, 0.05, 0.3, 1.0))
        weight = torch.randn((n, k), generator=self.generator) * (torch.rand((n, k), generator=self.generator) < density)
        if self.name == "linear_sparse_float":
            parts = list(ops.pack_sparse_float(weight))
        else:
            values, scale, _ = ops.quantize_rows(weight)
            parts = [*ops.pack_sparse(values, self.pick((None, "tiles", "masks", "windows"))), scale]
        self.garbage = not self.valid and self.chance(0.6)
        if self.garbage:
            low, high = self.pick(((-3, 200), (-(1 << 62), 1 << 62)))
            parts[2] = self.integers(low, high, tuple(parts[2].shape), torch.int64)
            parts[1] = self.integers(0, 256, tuple(parts[1].shape), torch.uint8)
            if self.chance(0.5):
                parts[0] = self.integers(0, 256, tuple(parts[0].shape), torch.uint8)
        return [self.moved(t) for t in parts]

    def spoil(self) -> None:
        at = self.pick(range(len(self.args)))
        value = self.args[at]
        if isinstance(value, Tensor):
            self.args[at] = self.spoiled(value)
        elif isinstance(value, str):
            self.args[at] = self.pick((*TEXTS, None, 3))
        elif isinstance(value, torch.dtype):
            self.args[at] = self.pick((torch.int8, torch.float64, torch.int32, torch.bool, torch.complex64, None, "float32"))
        elif isinstance(value, int | float):
            self.args[at] = self.pick((*NUMBERS, value + 1, value - 1, None, 1.5, "8"))
        else:
            self.args[at] = self.pick((torch.ones(3), torch.ones(()), torch.ones(17, dtype=torch.int64), 3, "x"))

    def spoiled(self, t: Tensor) -> Any:
        how = self.pick(("dtype", "grow", "shrink", "empty", "flat", "wrap", "meta", "sparse", "nested", "none", "number", "strides",
                         "huge", "grad", "quantized", "list", "garbage"))  # fmt: skip
        if t.is_meta or t.is_sparse or t.is_nested or t.is_quantized or t.numel() > 1 << 24:
            return None
        if how == "dtype":
            return t.to(self.pick((torch.float64, torch.int64, torch.int16, torch.uint8, torch.int8, torch.bool, torch.complex64,
                                   torch.float16, torch.float32, torch.int32, torch.float8_e4m3fn)))  # fmt: skip
        if how in ("grow", "shrink", "empty") and t.dim():
            shape = list(t.shape)
            d = self.pick(range(t.dim()))
            shape[d] = 0 if how == "empty" else max(0, shape[d] + self.pick((1, 4, 16)) * (1 if how == "grow" else -1))
            return torch.zeros(shape, dtype=t.dtype)
        if how == "flat":
            return t.reshape(-1)
        if how == "wrap":
            return t.unsqueeze(self.pick((0, -1)))
        if how == "meta":
            return t.to("meta")
        if how == "sparse":
            return t.to_sparse() if t.dtype != torch.float8_e4m3fn else None
        if how == "nested" and t.dtype == torch.float32 and t.dim() > 1 and t.shape[0]:
            return torch.nested.as_nested_tensor([t[0], t[0]])
        if how == "number":
            return self.pick(NUMBERS)
        if how == "strides":
            return self.view(t)
        if how == "huge":
            shape = [self.pick((1, 3, 1 << 16, 1 << 40)) for _ in t.shape]
            elements = np.prod([float(s) for s in shape])  # few enough to compute, or more than any memory holds
            return torch.zeros((), dtype=t.dtype).expand(shape) if elements < 2**20 or 2**40 <= elements < 2**62 else None
        if how == "grad":
            return t.detach().requires_grad_() if t.dtype.is_floating_point else t
        if how == "quantized":
            return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) if t.dtype == torch.float32 else None
        if how == "list":
            return [t]
        if how == "garbage" and t.dtype in (torch.uint8, torch.int8, torch.int32):
            return self.integers(*((0, 256) if t.dtype == torch.uint8 else (-128, 128)), tuple(t.shape), t.dtype)
        return None


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return {torch.bfloat16: np.int16, torch.float16: np.float16, torch.float32: np.float32, torch.int32: np.int32,
            torch.uint8: np.uint8, torch.int8: np.int8, torch.int64: np.int64}[dtype]  # fmt: skip


def _large(args: list[Any]) -> bool:
    """Whether the result, or a check of it, would take more memory than a test should."""
    return any(isinstance(a, Tensor) and not a.is_nested and a.numel() > 1 << 24 for a in args)


def compare(fuzz: Fuzz, got: Any, want: Any) -> None:
    epilogue_at = {"linear_dynamic": 4, "linear_s8": 6, "linear_xnor": 5, "linear_sparse": 7}.get(fuzz.name)
    exact = fuzz.name in ("quantize_rows", "binarize_rows", "linear_acc") or (
        epilogue_at is not None and fuzz.args[epilogue_at] in ("none", "relu")
    )
    if fuzz.name == "norm_quantize" or fuzz.name.endswith("_quantize"):
        compare_rows(got[:3], want[:3], fuzz)
        got, want = got[3:], want[3:]
    pairs = list(zip(got, want, strict=True)) if isinstance(got, tuple) else [(got, want)]
    for g, w in pairs:
        assert g.dtype == w.dtype and g.shape == w.shape, f"{g.dtype} {list(g.shape)}, reference {w.dtype} {list(w.shape)}"
        a, b = g.detach().double(), w.detach().double()
        if exact:
            same = (a == b) | (a.isnan() & b.isnan())
        else:
            # Bounds are derived and tested in test_exact.py; here a wrong element must show, a rounding must not.
            size = torch.nan_to_num(b, 0, 0, 0).abs().amax() if b.numel() else 0
            if fuzz.name == "norm_quantize" and g.shape == fuzz.args[0].shape:
                size = size + 1e4 * norm_bound(*fuzz.args[:3], fuzz.args[4]).unsqueeze(-1)
            near = (a - b).abs() <= 1e-4 * size + 4 * EPS.get(g.dtype, 1e-3) * b.abs() + 1e-6
            same = near | (a == b) | (a.isnan() & b.isnan())
        assert same.all(), f"{int((~same).sum())} of {same.numel()} elements differ, first at {(~same).nonzero()[0].tolist()}"


def compare_rows(got: tuple[Tensor, ...], want: tuple[Tensor, ...], fuzz: Fuzz) -> None:
    """Int8 rows of values that may differ by two roundings to the dtype they were rounded to, as values: q is 0 or +-127 where a
    row of one number, normalised, is 0 but for roundings."""
    dtype = next((a for a in fuzz.args if isinstance(a, torch.dtype)), fuzz.args[0].dtype)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and g.shape == w.shape, f"{g.dtype} {list(g.shape)}, reference {w.dtype} {list(w.shape)}"
    assert torch.equal(got[0].sum(-1, dtype=torch.int32), got[2]), "row_sum is not the sum of q"
    assert torch.equal(got[1].isnan(), want[1].isnan()), "NaN in other rows"
    a, b = (t[0].double() * t[1].double().nan_to_num().unsqueeze(-1) for t in (got, want))
    near = want[1].double().nan_to_num() * (1.01 + 127 * 2 * EPS[dtype])
    # Roundings of the norm; or of an activation that is all but 0, which are all there is of it.
    near = near + (norm_bound(*fuzz.args[:3], fuzz.args[4]) if fuzz.name == "norm_quantize" else 1e-5)
    assert ((a - b).abs() <= near.unsqueeze(-1) + 1e-30).all(), "rows differ by more than roundings"


def norm_bound(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> Tensor:
    """[...]: how far roundings can move a normalised row in all: they are relative to s, and grow with it over its spread."""
    s = (x if residual is None else (x.float() + residual.float()).to(x.dtype)).double()
    if not s.shape[-1]:
        return torch.zeros(s.shape[:-1], dtype=s.dtype)
    largest = 1 if weight is None else weight.double().abs().max()
    return (8 * EPS[torch.float32] * largest * s.abs().amax(-1) / (s.var(-1, correction=0) + eps).sqrt()).nan_to_num()


def run_case(seed: int, case: int, check_every: int = 4) -> str:
    """'refused', 'returned' or 'checked'; raises AssertionError where the op is wrong."""
    fuzz = Fuzz(seed, case)
    if _large(fuzz.args) and fuzz.valid:
        return "refused"
    op = ops.OPS[fuzz.name]
    call: Callable[..., Any] = op if fuzz.rng.random() < 0.2 else op.raw
    try:
        got = call(*fuzz.args)
    except REFUSALS as error:
        if fuzz.valid or not str(error):
            raise AssertionError(f"refused good arguments, or without a message: {error}") from error
        return "refused"
    first = got[0] if isinstance(got, tuple) else got
    if fuzz.garbage or (not fuzz.valid and fuzz.name.startswith(("linear_sparse", "norm_quantize"))):
        return "returned"
    if fuzz.name in ON_ROWS:
        # The op believes the sums it is given (it repairs with them), the reference makes its own.
        q, row_sum = fuzz.args[0], fuzz.args[ON_ROWS[fuzz.name]]
        if not first.is_meta and not _large(fuzz.args) and not torch.equal(q.sum(-1, dtype=torch.int32), row_sum):
            return "returned"
    if fuzz.name in ("linear_acc", "input_grad") and isinstance(fuzz.args[3], Tensor):
        return "returned"  # torch makes an int of a tensor of one element; a reference called directly does not
    if first.is_meta or case % check_every or _large([*fuzz.args, first]):
        return "returned"
    try:
        want = op.reference(*fuzz.args)
    except REFUSALS as error:
        raise AssertionError(f"the op took what its reference refuses: {error}") from error
    compare(fuzz, got, want)
    return "checked"


def describe(fuzz: Fuzz) -> str:
    def one(a: Any) -> str:
        if not isinstance(a, Tensor):
            return repr(a)[:60]
        if a.is_nested:
            return "nested"
        strides = f" strides {list(a.stride())} at {a.storage_offset()}" if a.layout is torch.strided else f" {a.layout}"
        return f"{str(a.dtype).removeprefix('torch.')} {list(a.shape)}{strides} {a.device}"

    return f"{fuzz.name}({', '.join(one(a) for a in fuzz.args)})"


def run(seed: int, first: int, count: int, check_every: int = 4) -> dict[str, int]:
    outcomes = {"refused": 0, "returned": 0, "checked": 0}
    for case in range(first, first + count):
        try:
            outcomes[run_case(seed, case, check_every)] += 1
        except Exception as error:
            raise AssertionError(
                f"python tests/fuzz_raw_ops.py --seed {seed} --case {case}: {describe(Fuzz(seed, case))}: {error}"
            ) from error
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, printed before it runs")
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")  # of torch, on the odder tensors
    if not ops.NATIVE:
        sys.exit("no native kernels here: there is nothing to fuzz")
    if options.case is not None:
        print(describe(Fuzz(options.seed, options.case)), flush=True)
        options.first, options.cases = options.case, 1
    start = time.monotonic()
    done = 0
    while done < options.cases:
        # Printed ahead, so that a crash, too, can be told from its output.
        count = min(5000, options.cases - done)
        print(f"seed {options.seed}, cases {options.first + done} to {options.first + done + count - 1}", end=": ", flush=True)
        print(run(options.seed, options.first + done, count), flush=True)
        done += count
    print(f"{done} cases, {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
