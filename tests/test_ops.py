"""The ops as torch sees them: registration, compile, gradients, autocast, and messages for bad input."""

from __future__ import annotations

import pytest
import torch
from cases import INPUT_SCALE, Case, GroupedCase, assert_equal, assert_within, linear_op
from torch.library import opcheck

import tersor.ops as ops

LINEAR = ["linear_dynamic", "linear_static", "linear_weight_only"]


@pytest.fixture
def layer():
    return Case(5, 37, 70).make()


def arguments(name: str, layer) -> tuple:
    x, tiles, scale, bias = layer
    if name.startswith("linear_grouped"):
        x, tiles, scale, group_scale, bias = GroupedCase(5, 37, 96).make_grouped()
        grad = name.endswith("_differentiable")
        return (x.requires_grad_(grad), tiles, scale, group_scale, bias.requires_grad_(grad), "silu")
    if name.startswith(("linear_xnor", "binarize_rows")):
        x, tiles, scale, threshold, bias = Case(5, 37, 70).make_xnor()
        if name == "binarize_rows":
            return (x, threshold)
        grad = name.endswith("_differentiable")
        return (x.requires_grad_(grad), tiles, scale, threshold, bias.requires_grad_(grad), "silu")
    if name.startswith("linear_sparse"):
        grad = name.endswith("_differentiable")
        weight = torch.randn(37, 70) * (torch.rand(37, 70) < 0.1)
        values, w_scale, _ = ops.quantize_rows(weight)
        stored = ops.pack_sparse_float(weight) if "float" in name else (*ops.pack_sparse(values), w_scale)
        return (x.requires_grad_(grad), *stored, bias.requires_grad_(grad), "silu")
    q, x_scale, row_sum = ops.quantize_rows(x)
    if name == "quantize_rows":
        return (x,)
    if name == "linear_acc":
        return (q, row_sum, tiles, 37)
    if name in ("linear_s8", "linear_s8_quantize"):
        return (q, x_scale, row_sum, tiles, scale, bias, "gelu", torch.bfloat16)
    if name == "norm_quantize":
        return (x, torch.randn(5, 70), torch.randn(70), torch.randn(70), 1e-5, "layer", True, True)
    if name.startswith("linear_glu"):
        x, tiles, scale, bias = Case(5, 64, 70).make()
        rows = (*ops.quantize_rows(x),) if "s8" in name else (x,)
        return (*rows, tiles, scale, bias, "silu", *((torch.float16,) if "s8" in name else ()))
    if name == "input_grad":
        return (torch.randn(5, 37), tiles, scale, 70)
    if name == "input_grad_differentiable":
        return (torch.randn(5, 37, requires_grad=True), tiles, scale, 70)
    if name.endswith("_differentiable"):
        extra = (INPUT_SCALE,) if "static" in name else ()
        return (x.requires_grad_(), tiles, scale, bias.requires_grad_(), *extra, "silu")
    if name == "quantize_static":
        return (x, INPUT_SCALE)
    if name == "linear_static":
        return (x, tiles, scale, bias, INPUT_SCALE, "relu")
    return (x, tiles, scale, bias, "relu")


@pytest.mark.parametrize("name", ops.OPS)
def test_opcheck(name: str, layer):
    # every op of the list: a new one without arguments here fails
    opcheck(ops.OPS[name].raw, arguments(name, layer))


@pytest.mark.parametrize("bits", [4, 2, 1])
@pytest.mark.parametrize("name", ["linear_dynamic", "linear_acc", "linear_s8", "linear_dynamic_differentiable"])
def test_opcheck_of_every_width(name: str, bits: int):
    args = arguments(name, Case(5, 37, 70, bits=bits).make())
    opcheck(ops.OPS[name].raw, args, {"bits": bits})


def test_opcheck_of_the_gradient_of_groups():
    _, tiles, scale, group_scale, _ = GroupedCase(5, 37, 96).make_grouped()
    grad = torch.randn(5, 37)
    opcheck(ops.input_grad.raw, (grad, tiles, scale, 96, group_scale, 4))
    opcheck(ops.input_grad_differentiable.raw, (grad.requires_grad_(), tiles, scale, 96, group_scale, 4))


@pytest.mark.parametrize("name", ops.OPS)
def test_reference_under_autocast(name: str, layer):
    op = ops.OPS[name]
    if name.endswith("_differentiable"):
        pytest.skip("calls the raw op, which has its own case")
    args = arguments(name, layer)
    want = op.reference(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op.reference(*args)
    for g, w in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, want)), strict=True):
        assert_equal(g, w)


@pytest.mark.parametrize("name", LINEAR)
def test_output_has_the_autocast_dtype(name: str, layer):
    x, tiles, scale, bias = layer
    op = linear_op(name)
    want = op(x, tiles, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, tiles, scale, bias)
        z = op(x.requires_grad_(), tiles, scale, bias)
        compiled = torch.compile(lambda x: op(x, tiles, scale, bias), fullgraph=True, backend="aot_eager")(x.detach())
    assert_equal(y, want.to(torch.bfloat16))  # x was read as it is
    assert_equal(z.detach(), y)
    assert_equal(compiled, y)
    z.float().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("epilogue", ops.EPILOGUES)
@pytest.mark.parametrize("name", LINEAR)
def test_gradients(name: str, epilogue: str):
    """The straight-through gradient: that of the float layer with the stored weights, at the quantised layer's pre-activation."""
    x, tiles, scale, bias = Case(6, 21, 40).make()
    x.requires_grad_()
    bias.requires_grad_()
    op = linear_op(name)
    y = op(x, tiles, scale, bias, epilogue)
    assert_equal(y.detach(), op(x.detach(), tiles, scale, bias.detach(), epilogue))
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), grad)

    w = ops.to_rows(tiles, 21, 40).float() * scale.unsqueeze(1)
    x2, bias2 = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    linear = x2 @ w.t() + bias2
    before = op(x.detach(), tiles, scale, bias.detach())
    shifted = linear + (before - linear).detach()  # the value of the quantised layer, the slope of the float one
    want = torch.autograd.grad(ops.EPILOGUES[epilogue](shifted), (x2, bias2), grad)
    for g, r in zip(got, want, strict=True):
        # 40 products of float32 in a different order
        assert_within(g, r, 1e-5 * r.abs().max().item())


@pytest.mark.parametrize("epilogue", ["none", "silu"])
@pytest.mark.parametrize("kind", [4, 2, 1, "groups", "signs"])
def test_gradients_of_few_bits(kind, epilogue: str):
    m, n, k = 6, 21, 64
    threshold = None
    if kind == "groups":
        x, tiles, scale, group_scale, bias = GroupedCase(m, n, k).make_grouped()
        relative = ops.group_scales(group_scale, n).repeat_interleave(32, 1)
        op, bits = lambda x, bias, epilogue="none": ops.linear_grouped(x, tiles, scale, group_scale, bias, epilogue), 4
    elif kind == "signs":
        x, tiles, scale, threshold, bias = Case(m, n, k).make_xnor()
        op, bits = lambda x, bias, epilogue="none": ops.linear_xnor(x, tiles, scale, threshold, bias, epilogue), 1
    else:
        x, tiles, scale, bias = Case(m, n, k, bits=kind).make()
        op, bits = lambda x, bias, epilogue="none": ops.linear_dynamic(x, tiles, scale, bias, epilogue, kind), kind
    w = ops.to_rows(tiles, n, k, bits).float() * scale.unsqueeze(1)
    if kind == "groups":
        w = w * relative
    x.requires_grad_()
    bias.requires_grad_()
    y = op(x, bias, epilogue)
    assert_equal(y.detach(), op(x.detach(), bias.detach(), epilogue))
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), grad, create_graph=True)

    before = op(x.detach(), bias.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(ops.EPILOGUES[epilogue](before), before, grad)
    want = slope @ w
    if threshold is not None:
        near = (x.detach() - threshold).abs() <= 1
        want = torch.where(near, want * ops.binarize_rows(x.detach(), threshold)[1].unsqueeze(1), 0.0)
        assert 0.2 < near.float().mean() < 0.8
    # at most 64 products of float32 in a different order
    assert_within(got[0], want, 1e-5 * want.abs().max().item())
    assert_within(got[1], slope.sum(0), 1e-5 * slope.sum(0).abs().max().item())
    if epilogue == "none":
        # grad_x is linear in grad: so is what a second derivative of the layers before it needs
        leaf = grad.clone().requires_grad_()
        first = torch.autograd.grad(op(x, bias), x, leaf, create_graph=True)[0]
        probe = torch.randn_like(first)
        (second,) = torch.autograd.grad(first, leaf, probe)
        if threshold is not None:
            probe = torch.where(near, probe * ops.binarize_rows(x.detach(), threshold)[1].unsqueeze(1), 0.0)
        assert_within(second, probe @ w.t(), 1e-5 * second.abs().max().item())


def test_gradient_only_where_asked(layer):
    x, tiles, scale, bias = layer
    bias.requires_grad_()
    ops.linear_dynamic(x, tiles, scale, bias).sum().backward()
    assert x.grad is None
    assert_equal(bias.grad, torch.full((37,), 5.0))
    with torch.no_grad():
        assert not ops.linear_dynamic(x, tiles, scale, bias).requires_grad


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_without_graph_break(backend: str, layer):
    x, tiles, scale, bias = layer

    def f(x, bias):
        return torch.relu(ops.linear_dynamic(x * 2, tiles, scale, bias)) + ops.linear_weight_only(x, tiles, scale, None)

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    assert_equal(compiled(x, bias), f(x, bias))
    x.requires_grad_()
    compiled(x, bias).sum().backward()
    got = x.grad.clone()
    x.grad = None
    f(x, bias).sum().backward()
    assert_within(got, x.grad, 1e-5 * got.abs().max().item())


def bad_inputs():
    x, tiles, scale, bias = Case(3, 20, 24).make()
    q, x_scale, row_sum = ops.quantize_rows.reference(x)
    yield "linear_dynamic", (x.long(), tiles, scale, bias), TypeError, "x is torch.int64, expected float32, bfloat16 or float16"
    yield "linear_dynamic", (x.to(torch.complex64), tiles, scale, bias), TypeError, "x is torch.complex64"
    yield (
        "linear_dynamic",
        (x.to_sparse(), tiles, scale, bias),
        TypeError,
        r"torch.sparse_coo, expected a dense tensor; call .to_dense",
    )
    yield "linear_dynamic", (torch.tensor(1.0), tiles, scale, bias), ValueError, "x is 0-dimensional"
    yield (
        "linear_dynamic",
        (x[:, :20], tiles, scale, bias),
        ValueError,
        r"x has K=20, but weight_packed \[2, 6, 64\] holds K in \[21, 24\]",
    )
    yield (
        "linear_dynamic",
        (x, tiles[:1], scale, bias),
        ValueError,
        r"weight_packed is \[1, 6, 64\], expected \[2, 6, 64\] for N=20",
    )
    yield "linear_dynamic", (x, tiles.to(torch.int8), scale, bias), ValueError, "weight_packed is torch.int8, expected torch.uint8"
    yield (
        "linear_dynamic",
        (x, tiles, scale.half(), bias),
        ValueError,
        r"weight_scale is torch.float16 \[20\], expected float32 \[N\]",
    )
    yield "linear_dynamic", (x, tiles, scale, bias[:5]), ValueError, r"bias is torch.float32 \[5\], expected float \[20\]"
    yield "linear_dynamic", (x, tiles, scale, bias, "swish"), ValueError, "epilogue is 'swish', expected one of: none, relu"
    yield "linear_dynamic", (x.to("meta"), tiles, scale, bias), ValueError, "weight_packed is on cpu, x on meta"
    yield (
        "linear_dynamic",
        (torch.zeros(1, 132105), torch.zeros(2, 33027, 64, dtype=torch.uint8), scale, bias),
        ValueError,
        "above 132104",
    )
    yield "quantize_static", (x, torch.ones(1)), ValueError, r"input_scale is torch.float32 \[1\], expected float32 \[\]"
    yield "linear_static", (x, tiles, scale, bias, torch.tensor(1)), ValueError, r"input_scale is torch.int64 \[\], expected"
    yield "linear_static", (x, tiles, scale, bias, INPUT_SCALE.to("meta")), ValueError, "input_scale is on meta, x on cpu"
    yield "linear_weight_only", (x.double(), tiles, scale, bias), TypeError, "x is torch.float64"
    yield "quantize_rows", (x, torch.ones(2)), ValueError, r"absmax is torch.float32 \[2\], expected torch.float32 \[3\]"
    yield "linear_acc", (x, row_sum, tiles, 20), TypeError, "q is torch.float32, expected torch.int8; make it with quantize_rows"
    yield "linear_acc", (q, row_sum[:2], tiles, 20), ValueError, r"row_sum is torch.int32 \[2\], expected torch.int32 \[3\]"
    yield "linear_acc", (q, row_sum, tiles, 40), ValueError, r"expected \[3, 6, 64\] for N=40"
    yield "linear_acc", (q, row_sum, tiles, -1), ValueError, "out_features is -1"
    yield "linear_s8", (q, x_scale[:1], row_sum, tiles, scale, bias), ValueError, r"scale is torch.float32 \[1\]"
    yield "linear_s8", (q, x_scale, row_sum, tiles, scale, bias, "none", torch.int32), TypeError, "out_dtype is torch.int32"
    yield "linear_dynamic", (x, tiles, scale, bias, "none", 3), ValueError, "bits is 3, expected one of: 8, 4, 2, 1"
    yield "linear_acc", (q, row_sum, tiles, 20, 0), ValueError, "bits is 0, expected one of: 8, 4, 2, 1"
    yield (
        "linear_s8",
        (q, x_scale, row_sum, tiles, scale, bias, "none", torch.float32, -8),
        ValueError,
        "bits is -8, expected one of",
    )
    yield "input_grad", (torch.zeros(3, 20), tiles, scale, 24, None, 16), ValueError, "bits is 16, expected one of"
    message = r"x has K=24, but weight_packed \[2, 6, 64\] holds K in \[41, 48\] at bits=4"
    yield "linear_dynamic", (x, tiles, scale, bias, "none", 4), ValueError, message
    yield "linear_acc", (q, row_sum, tiles, 20, 2), ValueError, r"expected \[2, 2, 64\] for N=20, K=24 at bits=2"
    x64, tiles4, scale, group_scale, bias = GroupedCase(3, 20, 64).make_grouped()
    for wrong, message in (
        (group_scale.char(), r"group_scale is torch.int8 \[2, 2, 32\], expected torch.uint8 \[2, G, 32\]"),
        (group_scale[:1], r"group_scale is torch.uint8 \[1, 2, 32\], expected torch.uint8 \[2, G, 32\]"),
        (group_scale[..., :16], r"group_scale is torch.uint8 \[2, 2, 16\], expected"),
        (group_scale[0], r"group_scale is torch.uint8 \[2, 32\], expected"),
        (group_scale[:, :0], r"group_scale is \[2, 0, 32\], 0 groups of K=64; .* multiple of 32, G that fit: 1, 2"),
        (torch.zeros(2, 4, 32, dtype=torch.uint8), r"4 groups of K=64; .* G that fit: 1, 2"),
        (group_scale.to("meta"), "group_scale is on meta, x on cpu"),
    ):
        yield "linear_grouped", (x64, tiles4, scale, wrong, bias), ValueError, message
    yield "linear_grouped", (x64[:, :60], tiles4, scale, group_scale, bias), ValueError, "2 groups of K=60; .* G that fit: none"
    yield "linear_grouped", (x64, tiles, scale, group_scale, bias), ValueError, r"weight_packed \[2, 6, 64\] holds K in \[41, 48\]"
    yield "linear_grouped", (x64.long(), tiles4, scale, group_scale, bias), TypeError, "x is torch.int64"
    yield "input_grad", (torch.zeros(3, 20), tiles4, scale, 64, group_scale[:1], 4), ValueError, r"group_scale is torch.uint8 \[1,"
    x70, tiles1, scale, threshold, bias = Case(3, 20, 70).make_xnor()
    yield "binarize_rows", (x70.double(), threshold), TypeError, "x is torch.float64"
    yield "binarize_rows", (x70, threshold.half()), ValueError, r"threshold is torch.float16 \[70\], expected torch.float32 \[70\]"
    yield "binarize_rows", (x70, threshold[:1]), ValueError, r"threshold is torch.float32 \[1\], expected torch.float32 \[70\]"
    yield "binarize_rows", (x70, threshold.to("meta")), ValueError, "threshold is on meta, x on cpu"
    yield "linear_xnor", (x70, tiles1, scale, threshold[1:], bias), ValueError, r"threshold is torch.float32 \[69\], expected"
    yield "linear_xnor", (x70, tiles1, scale, torch.tensor(0.0), bias), ValueError, r"threshold is torch.float32 \[\], expected"
    yield "linear_xnor", (x70, tiles1[:, :2], scale, threshold, bias), ValueError, r"holds K in \[33, 64\] at bits=1"
    yield (
        "input_grad",
        (torch.zeros(3, 19), tiles, scale, 24),
        ValueError,
        r"grad is torch.float32 \[3, 19\], expected float \[..., 20\]",
    )


@pytest.mark.parametrize(("name", "args", "error", "message"), list(bad_inputs()))
def test_bad_input(name: str, args: tuple, error: type, message: str):
    op = ops.OPS[name]
    with pytest.raises(error, match=message):
        op(*args)
    with pytest.raises(error, match=message):
        op.reference(*args)
    # the raw op is the second line: any clear exception, never a crash
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        op.raw(*args)


def test_nested_x():
    _, tiles, scale, bias = Case(3, 20, 24).make()
    x = torch.nested.nested_tensor([torch.randn(2, 24), torch.randn(3, 24)])
    with pytest.raises(TypeError, match="nested tensor, expected a dense one"):
        ops.linear_dynamic(x, tiles, scale, bias)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (24,), (2, 3, 4, 24)])
def test_leading_dimensions(shape: tuple[int, ...]):
    _, tiles, scale, bias = Case(1, 20, 24).make()
    x = torch.randn(shape)
    y = ops.linear_dynamic(x, tiles, scale, bias)
    assert y.shape == (*shape[:-1], 20)
    assert_equal(y, ops.linear_dynamic.reference(x, tiles, scale, bias))
    assert ops.linear_weight_only(x, tiles, scale, bias).shape == y.shape
    _, tiles, scale, threshold, bias = Case(1, 20, 24).make_xnor()
    y = ops.linear_xnor(x, tiles, scale, threshold, bias)
    assert_equal(y, ops.linear_xnor.reference(x, tiles, scale, threshold, bias))
    wide = torch.randn(*shape[:-1], 64)
    _, tiles, scale, group_scale, bias = GroupedCase(1, 20, 64).make_grouped()
    y = ops.linear_grouped(wide, tiles, scale, group_scale, bias)
    assert y.shape == (*shape[:-1], 20)


def test_empty_k_and_n():
    x = torch.zeros(3, 0)
    tiles = torch.zeros(2, 0, 64, dtype=torch.uint8)
    bias = torch.randn(20)
    assert_equal(ops.linear_dynamic(x, tiles, torch.ones(20), bias), bias.expand(3, 20).contiguous())
    assert_equal(ops.linear_weight_only(x, tiles, torch.ones(20), bias), bias.expand(3, 20).contiguous())
    for bits in (4, 2, 1):
        assert_equal(ops.linear_dynamic(x, tiles, torch.ones(20), bias, "none", bits), bias.expand(3, 20).contiguous())
    assert_equal(ops.linear_xnor(x, tiles, torch.ones(20), torch.zeros(0), bias), bias.expand(3, 20).contiguous())
    no_groups = torch.zeros(2, 0, 32, dtype=torch.uint8)
    assert_equal(ops.linear_grouped(x, tiles, torch.ones(20), no_groups, bias), bias.expand(3, 20).contiguous())
    assert ops.binarize_rows(x, torch.zeros(0))[0].shape == (3, 0)
    assert ops.linear_dynamic(torch.randn(3, 8), torch.zeros(0, 2, 64, dtype=torch.uint8), torch.zeros(0), None).shape == (3, 0)


@pytest.mark.native
@pytest.mark.parametrize("offset", [0, 1, 16, 32])
def test_misaligned_weights(offset: int):
    x, tiles, scale, bias = Case(9, 50, 100).make()
    buffer = torch.zeros(tiles.numel() + offset, dtype=torch.uint8)
    moved = buffer[offset:].view(tiles.shape)
    moved.copy_(tiles)
    assert_equal(ops.linear_dynamic(x, moved, scale, bias), ops.linear_dynamic(x, tiles, scale, bias))
    assert_equal(ops.linear_weight_only(x, moved, scale, bias), ops.linear_weight_only(x, tiles, scale, bias))
