"""Every op with its options under JAX, eager and jitted, against the same reference in torch; and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import EPS, INPUT_SCALE, Case, GroupedCase, assert_equal, assert_within, epilogue_bound
from test_sparse import STORAGES, pruned
from torch import Tensor
from xla_common import JIT, called, env, jax, on_jax, xla

import tersor.ops as ops
from tersor.ops import sparse_storage

pytestmark = [pytest.mark.xla, pytest.mark.slow]
EPS32 = EPS[torch.float32]
DTYPES = (torch.float32, torch.bfloat16)
M, N, K = 5, 37, 70
Args = dict[str, Any]


def linear_args(name: str, dtype: torch.dtype, bits: int = 8, storage: str = "", n: int = N) -> Args:
    """The arguments of a linear op by name, without epilogue and residual."""
    case = Case(M, n, K, dtype, bits=bits)
    x, tiles, scale, bias = case.make()
    if name == "linear_grouped":
        x, tiles, scale, group, bias = GroupedCase(M, n, 96, dtype).make_grouped()
        return {"x": x, "weight_packed": tiles, "weight_scale": scale, "group_scale": group, "bias": bias}
    if name == "linear_xnor":
        x, tiles, scale, threshold, bias = case.make_xnor()
        return {"x": x, "weight_packed": tiles, "weight_scale": scale, "threshold": threshold, "bias": bias}
    if name == "linear_sparse_float":
        return {"x": x, **ops.pack_sparse_float(pruned(n, K, 0.3))._asdict(), "bias": bias}
    if name == "linear_sparse":
        values, scale, _ = ops.quantize_rows(pruned(n, K, 0.3))
        return {"x": x, **ops.pack_sparse(values, storage)._asdict(), "weight_scale": scale, "bias": bias}
    stored = {"weight_packed": tiles, "weight_scale": scale, "bias": bias}
    if "s8" in name:
        q, row_scale, row_sum = ops.quantize_rows(x)
        return {"q": q, "scale": row_scale, "row_sum": row_sum, **stored}
    return {"x": x, **stored, **({"bits": bits} if bits != 8 else {}), **({"input_scale": INPUT_SCALE} if "static" in name else {})}


def linear_cases() -> Iterator[Any]:
    """(name, arguments, dtype of the result) of every linear op: each width, storage, epilogue; with residual, without bias."""
    for dtype in DTYPES:
        kinds = [("linear_dynamic", bits, "") for bits in ops.CODES] + [("linear_s8", bits, "") for bits in ops.CODES]
        kinds += [(name, 8, "") for name in ("linear_static", "linear_weight_only", "linear_grouped", "linear_xnor")]
        kinds += [("linear_sparse", 8, storage) for storage in STORAGES] + [("linear_sparse_float", 8, "")]
        for name, bits, storage in kinds:
            args = linear_args(name, dtype, bits, storage)
            if name == "linear_s8":
                args |= {"out_dtype": dtype, "bits": bits}
            label = f"{name}-{bits}{storage}-{str(dtype).removeprefix('torch.')}"
            options = [("none", False, True), ("silu", True, True)]
            if bits == 8 and storage in ("", "masks"):
                options += [("relu", False, False), ("gelu", True, True), ("gelu_tanh", False, True)]
            for epilogue, residual, bias in options:
                with_residual = residual and "residual" in ops.OPS[name].arguments
                given = args | {"epilogue": epilogue} | ({} if bias else {"bias": None})
                if with_residual:
                    given["residual"] = torch.randn(M, N).to(dtype)
                yield pytest.param(name, given, dtype, id=f"{label}-{epilogue}{'-residual' * with_residual}")


def positional(name: str, given: Args) -> list[Any]:
    schema = ops.OPS[name].raw._schema.arguments
    return [given.get(a.name, a.default_value) for a in schema]


def dense(given: Args, k: int) -> Tensor:
    """float64 [N, K]: the absolute values of the stored weights."""
    if "weight_index" in given:
        stored = (given["weight_packed"], given["weight_index"], given["weight_offset"])
        if "weight_scale" not in given:
            return ops.sparse_float_rows(*stored, k).double().abs()
        scale = given["weight_scale"].double().unsqueeze(1)
        return sparse_storage.sparse_rows(*stored, len(scale), k).double().abs() * scale
    n = given["weight_scale"].shape[0]
    bits = given.get("bits", 4 if "group_scale" in given else 1 if "threshold" in given else 8)
    w = ops.to_rows(given["weight_packed"], n, k, bits).double().abs()
    if "group_scale" in given:
        w = (w.reshape(n, -1, 32) * ops.group_scales(given["group_scale"], n).double().unsqueeze(-1)).reshape(n, k)
    return w * given["weight_scale"].double().unsqueeze(1)


def rounded_product(name: str, given: Args, before: Tensor) -> Tensor:
    """How far two float32 evaluations of the value before the activation may be apart: a product's (acc * scale) * weight_scale +
    bias has 3 roundings, or fewer where XLA contracts; groups add one float32 sum for each of 3; float products K of them."""
    bias = 0 if given.get("bias") is None else given["bias"].double().abs()
    if name not in ("linear_grouped", "linear_weight_only", "linear_sparse_float"):
        return 2 * 4 * EPS32 * (before.double().abs() + 2 * bias)
    x = given["x"].double().abs()
    terms = x @ dense(given, x.shape[1]).t() + bias
    steps = 2 * 3 + 4 if name == "linear_grouped" else x.shape[1] + 4
    # activations are rounded to int8 where there are groups: at most absmax / 127 / 2 more than x
    spread = 1.5 if name == "linear_grouped" else 1
    return 2 * steps * EPS32 * terms * spread


@JIT
@pytest.mark.parametrize(("name", "given", "dtype"), list(linear_cases()))
def test_linear_ops(env, name: str, given: Args, dtype: torch.dtype, jit: bool):
    op = ops.OPS[name]
    want = op.reference(*positional(name, given))
    exact = given | {"epilogue": "none", "residual": None}
    exact |= {"x": given["x"].float()} if "x" in given else {"out_dtype": torch.float32}
    before = op.reference(*positional(name, exact))
    (got,) = called(env, op, positional(name, given), jit)
    assert got.dtype == dtype
    # An activation's slope is 1.13 at most.
    bound = 1.13 * rounded_product(name, given, before) + 2 * epilogue_bound(Case(M, N, K, dtype), before, given["epilogue"])
    if given.get("residual") is not None:
        bound = bound + 2 * EPS32 * want.double().abs()
        bound = bound + 2 * EPS[dtype] * given["residual"].double().abs()  # epilogue_bound stored the value before the sum
    if dtype != torch.float32:
        bound = bound + 2 * EPS[dtype] * want.double().abs()
    assert_within(got, want, bound)


def off_by_one(got: Tensor, want: Tensor) -> None:
    """int8 rows of values that differ by roundings: 1 apart at ties, and no more than a few are near one."""
    apart = (got.int() - want.int()).abs()
    assert apart.max() <= 1
    assert (apart != 0).sum() <= max(1, apart.numel() // 50)


@JIT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_quantize(env, kind: str, residual: bool, weighted: bool, dtype: torch.dtype, jit: bool):
    x = torch.randn(M, K).to(dtype)
    weight = torch.randn(K) if weighted else None
    bias = torch.randn(K) if weighted and kind == "layer" else None
    args = [x, torch.randn(M, K).to(dtype) if residual else None, weight, bias, 1e-5, kind, True, True]
    q, scale, row_sum, s, y = called(env, ops.norm_quantize, args, jit)
    q0, scale0, row_sum0, s0, y0 = ops.norm_quantize.reference(*args)
    assert_equal(s, s0)  # one addition
    off_by_one(q, q0)
    assert_equal(row_sum, q.sum(-1, dtype=torch.int32))
    # Each mean is of K terms of at most |s| or s^2, in any order: (K + 8) eps of the largest |s|, over the standard deviation that
    # it is divided by, in each of two evaluations; then the weight, at most 4, and the store.
    deviation = s0.double().std(-1, keepdim=True) if kind == "layer" else s0.double().square().mean(-1, keepdim=True).sqrt()
    largest = s0.double().abs().amax(-1, keepdim=True)
    bound = 2 * (K + 8) * EPS32 * (largest / deviation + 1) * 4 + 2 * EPS[dtype] * y0.double().abs()
    assert_within(y, y0, bound)
    assert_within(scale, scale0, bound.amax(-1) / 127 + 2 * EPS32 * scale0.double())


@JIT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "activation"), [(8, "silu"), (8, "gelu"), (4, "gelu_tanh"), (2, "silu"), (1, "relu")])
@pytest.mark.parametrize("name", ["linear_glu", "linear_glu_s8", "linear_glu_quantize", "linear_glu_s8_quantize"])
def test_gated_units(env, name: str, bits: int, activation: str, dtype: torch.dtype, jit: bool):
    given = linear_args("linear_s8" if "s8" in name else "linear_dynamic", dtype, bits, n=64)
    given |= {"activation": activation, "bits": bits, "dtype": dtype}
    args = positional(name, given)
    want, got = ops.OPS[name].reference(*args), called(env, ops.OPS[name], args, jit)
    # gate and up as a layer's y (4 roundings each of two evaluations), the activation, their product, the store
    rows = given["q"].float() * given["scale"].unsqueeze(-1) if "s8" in name else given["x"].float()
    y = (rows.double().abs() @ dense(given, K).t() + given["bias"].double().abs()) * 1.02
    gate, up = y.reshape(M, 2, 2, 16).unbind(2)
    bound = ((2 * 4 * 1.13 + 2 * 4 + 32) * EPS32 * gate * up).reshape(M, 32) + 1e-6 * up.reshape(M, 32)
    if "quantize" not in name:
        assert got[0].dtype == dtype
        assert_within(got[0], want, bound + 2 * EPS[dtype] * want.double().abs())
        return
    off_by_one(got[0], want[0])
    assert_equal(got[2], got[0].sum(-1, dtype=torch.int32))
    assert_within(got[1], want[1], bound.amax(-1) / 127 + (2 * EPS[dtype] + 4 * EPS32) * want[1].double())


@JIT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(("bits", "epilogue"), [(8, "none"), (8, "gelu"), (4, "gelu_tanh"), (2, "silu"), (1, "relu")])
@pytest.mark.parametrize("name", ["linear_dynamic_quantize", "linear_s8_quantize"])
def test_layers_that_hand_on_rows(env, name: str, bits: int, epilogue: str, bias: bool, dtype: torch.dtype, jit: bool):
    given = linear_args("linear_s8" if "s8" in name else "linear_dynamic", dtype, bits)
    given |= {"epilogue": epilogue, "bits": bits, "out_dtype": dtype} | ({} if bias else {"bias": None})
    args = positional(name, given)
    want, (q, scale, row_sum) = ops.OPS[name].reference(*args), called(env, ops.OPS[name], args, jit)
    off_by_one(q, want[0])
    assert_equal(row_sum, q.sum(-1, dtype=torch.int32))
    # The largest of a row is a layer's y: 4 roundings of two evaluations of what it sums up, the activation's own, its store.
    rows = given["q"].float() * given["scale"].unsqueeze(-1) if "s8" in name else given["x"].float()
    y = rows.double().abs() @ dense(given, K).t() * 1.02 + (given["bias"].double().abs() if bias else 0)
    bound = (2 * 4 * 1.13 + 32) * EPS32 * y.amax(-1) / 127
    assert_within(scale, want[1], bound + (2 * EPS[dtype] + 4 * EPS32) * want[1].double())


@JIT
@pytest.mark.parametrize("bits", [8, 4, 2, 1, "groups"])
def test_input_grad(env, bits: int | str, jit: bool):
    grad = torch.randn(M, N)
    if bits == "groups":
        _, tiles, scale, group, _ = GroupedCase(M, N, 96).make_grouped()
        args = [grad, tiles, scale, 96, group, 4]
        given = {"weight_packed": tiles, "weight_scale": scale, "group_scale": group}
    else:
        given = linear_args("linear_dynamic", torch.float32, int(bits))
        args = [grad, given["weight_packed"], given["weight_scale"], K, None, bits]
    (got,) = called(env, ops.input_grad, args, jit)
    bound = 2 * (N + 4) * EPS32 * (grad.double().abs() @ dense(given, int(args[3])))
    assert_within(got, ops.input_grad.reference(*args), bound)


WITH_GRADIENTS = [op.public_name for op in ops.OPS.values() if op.name.startswith("linear") and op.backward]


def test_gradients_are_of_seven_layers():
    assert len(WITH_GRADIENTS) == 7


@pytest.mark.parametrize(
    ("epilogue", "jit"),
    [(epilogue, False) for epilogue in ops.EPILOGUES] + [("gelu", True)],
    ids=lambda v: {True: "jit", False: ""}.get(v, v),
)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients(env, name: str, epilogue: str, jit: bool):
    op, dtype = ops.OPS[name], torch.float32
    given = linear_args(name, dtype, storage="windows") | {"epilogue": epilogue}
    wanted = ["x", "bias"]
    if "residual" in op.arguments:
        given["residual"] = torch.randn(M, N)
        wanted.append("residual")
    grad = torch.randn(M, N)
    leaves = {key: given[key].clone().requires_grad_() for key in wanted}
    want = torch.autograd.grad(op(*positional(name, given | leaves)), list(leaves.values()), grad)
    args = positional(name, given)
    arrays = env.t2j_iso(on_jax(env, args))
    lowered = env._ops[op.raw].func
    at = [op.arguments.index(key) for key in wanted]

    def f(*leaves):
        whole = list(arrays)
        for i, leaf in zip(at, leaves, strict=True):
            whole[i] = leaf
        return lowered(*whole)

    def pull(grad, *leaves):
        return jax.vjp(f, *leaves)[1](grad)

    pulled = (jax.jit(pull) if jit else pull)(jax.numpy.asarray(grad.numpy()), *(arrays[i] for i in at))
    got = {key: torch.from_dlpack(g) for key, g in zip(wanted, pulled, strict=True)}
    # N (x) or M (bias) terms in another order, and the slope of the activation, 1.13 at most, at values that differ by 4 roundings:
    # abs(value times second derivative) < 1.2, and the slope's own evaluation, 32 roundings in each.
    slopes = 1.13 * grad.double().abs()
    per_row = ops.binarize_rows(given["x"], given["threshold"])[1].double().unsqueeze(-1) if name == "linear_xnor" else 1
    bound = (slopes * per_row) @ dense(given, given["x"].shape[1])
    assert_within(got["x"], want[0], (2 * (N + 4) + 128) * EPS32 * bound)
    assert_within(got["bias"], want[1], (2 * (M + 4) + 128) * EPS32 * slopes.sum(0))
    if "residual" in wanted:
        assert_equal(got["residual"], want[2])


@pytest.mark.parametrize("bits", [8, "groups"])
def test_gradient_of_input_grad(env, bits: int | str):
    case = GroupedCase(M, N, 96).make_grouped() if bits == "groups" else Case(M, N, 96).make()
    stored = [case[1], case[2], 96, *((case[3], 4) if bits == "groups" else (None, 8))]
    grad, outer = torch.randn(M, N, requires_grad=True), torch.randn(M, 96)
    (want,) = torch.autograd.grad(ops.input_grad(grad, *stored), grad, outer)
    arrays = env.t2j_iso(on_jax(env, [grad.detach(), *stored]))
    _, pull = jax.vjp(lambda g: env._ops[ops.input_grad.raw].func(g, *arrays[1:]), arrays[0])
    (got,) = pull(jax.numpy.asarray(outer.numpy()))
    given = {"weight_packed": case[1], "weight_scale": case[2], **({"group_scale": case[3]} if bits == "groups" else {})}
    bound = 2 * (96 + 4) * EPS32 * (outer.double().abs() @ dense(given, 96).t())
    assert_within(torch.from_dlpack(got), want, bound)


def test_viewing_a_tensor_as_another_dtype(env):
    for t, dtype in (
        (torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4), torch.float16),
        (torch.arange(8, dtype=torch.uint8).reshape(2, 4), torch.float32),
        (torch.randn(3, 5), torch.int32),
        (torch.randn(3, 5), torch.uint8),
        (torch.randint(-128, 128, (7,), dtype=torch.int8), torch.uint8),
    ):
        (got,) = called(env, lambda t, dtype=dtype: t.view(dtype), [t], False)
        assert_equal(got.view(torch.uint8), t.view(dtype).view(torch.uint8))


def test_a_sum_has_the_dtype_that_was_asked_for(env):
    (got,) = called(env, lambda t: t.sum(0, dtype=torch.float32), [torch.tensor(3)], False)
    assert_equal(got, torch.tensor(3.0))
    for t, dtype in (
        (torch.randint(-128, 128, (3, 300), dtype=torch.int8), torch.int32),
        (torch.randn(3, 300).bfloat16(), torch.float32),
        (torch.randint(0, 2, (3, 7)), torch.uint8),
    ):
        for dim, keepdim in (((1,), False), ((0, 1), True)):
            want = t.sum(dim, keepdim, dtype=dtype)
            (got,) = called(env, lambda t, dim=dim, keepdim=keepdim, dtype=dtype: t.sum(dim, keepdim, dtype=dtype), [t], False)
            assert got.dtype == dtype
            assert got.shape == want.shape
            if dtype == torch.float32:
                assert_within(got, want, 2 * t.numel() * EPS32 * t.double().abs().sum(dim, keepdim))
            else:
                assert_equal(got, want)
