"""The ops and QuantLinear under torch.func: vmap in one call, reverse mode in any order, a clear no to forward mode."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import EPS, INPUT_SCALE, Case, GroupedCase, assert_equal, assert_within
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import tersor
import tersor.ops as ops
from tersor import Binary, Int4, Int8Dynamic, Int8WeightOnly, QuantLinear

M, N, K, B = 5, 37, 70, 3
# Float sums whose order torch.mm chooses by the number of rows, so that one large call may round unlike several small ones.
ORDER_DEPENDS_ON_M = ("input_grad", *([] if ops.NATIVE else ["linear_weight_only"]))


class Calls(TorchDispatchMode):
    """The calls of our ops that reach a kernel; what a kernel calls in turn is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tersor":
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def arguments(name: str, lead: tuple[int, ...]) -> tuple[list[Tensor], list]:
    """(arguments with leading dims, the others)"""
    _, tiles, scale, bias = Case(1, N, K).make()
    x = torch.randn(*lead, K)
    q, x_scale, row_sum = ops.quantize_rows.reference(x)
    if name == "quantize_rows":
        return [x, torch.rand(lead) + 2], []
    if name == "linear_acc":
        return [q, row_sum], [tiles, N]
    if name in ("linear_s8", "linear_s8_quantize"):
        return [q, x_scale, row_sum], [tiles, scale, bias, "relu", torch.bfloat16]
    if name == "norm_quantize":
        return [x, torch.randn(*lead, K)], [torch.randn(K), None, 1e-5, "rms", True, True]
    if name.startswith("linear_glu"):
        _, tiles, scale, bias = Case(1, 64, K).make()
        return (
            ([q, x_scale, row_sum], [tiles, scale, bias, "relu", torch.float16])
            if "s8" in name
            else ([x], [tiles, scale, bias, "relu"])
        )
    if name.startswith("linear_sparse"):
        weight = torch.randn(N, K) * (torch.rand(N, K) < 0.3)
        values, w_scale, _ = ops.quantize_rows.reference(weight)
        stored = ops.pack_sparse_float(weight) if "float" in name else (*ops.pack_sparse(values), w_scale)
        return [x], [*stored, bias, "gelu"]
    if name.startswith("input_grad"):
        return [torch.randn(*lead, N)], [tiles, scale, K]
    if name == "quantize_static":
        return [x], [INPUT_SCALE]
    if name.startswith(("binarize_rows", "linear_xnor")):
        _, tiles, scale, threshold, bias = Case(1, N, K).make_xnor()
        return [x], [threshold] if name == "binarize_rows" else [tiles, scale, threshold, bias, "gelu"]
    if name.startswith("linear_grouped"):
        _, tiles, scale, group_scale, bias = GroupedCase(1, N, 64).make_grouped()
        return [x[..., :64]], [tiles, scale, group_scale, bias, "gelu"]
    if name.startswith("linear_static"):
        return [x], [tiles, scale, bias, INPUT_SCALE, "gelu"]
    return [x], [tiles, scale, bias, "gelu"]


def parts(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def assert_same(name: str, got, want) -> None:
    for g, w in zip(parts(got), parts(want), strict=True):
        if name.startswith(ORDER_DEPENDS_ON_M):
            # max(N, K) products below 4 * 127 * 0.021 * 4; each order of the sum lies within its bound of the exact one
            assert_within(g, w, 2 * max(N, K) ** 2 * EPS[torch.float32] * 4 * 127 * 0.021 * 4)
        else:
            assert_equal(g, w)


def stacked(results: list) -> tuple[Tensor, ...]:
    return tuple(torch.stack(each) for each in zip(*map(parts, results), strict=True))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("name", ops.OPS)
def test_vmap_over_rows_is_one_call(name: str, dim: int):
    op = ops.OPS[name]
    rows, rest = arguments(name, (B, M))
    want = stacked([op(*(t[i] for t in rows), *rest) for i in range(B)])
    moved = [t.movedim(0, dim) for t in rows]
    in_dims = (dim,) * len(rows) + (None,) * len(rest)
    for callable in (op, op.raw):
        with Calls() as calls:
            got = vmap(callable, in_dims=in_dims)(*moved, *rest)
        assert_same(name, got, want)
        assert [each.removesuffix("_differentiable") for each in calls.names] == [op.public_name]


@pytest.mark.parametrize("name", ops.OPS)
def test_nested_vmap_is_one_call(name: str):
    op = ops.OPS[name]
    rows, rest = arguments(name, (2, B, M))
    want = op(*rows, *rest)
    nothing = (None,) * len(rest)
    inner = vmap(op.raw, in_dims=(0,) * len(rows) + nothing)
    with Calls() as calls:
        # dim 1 outside, so that the order of the two batches shows
        got = vmap(inner, in_dims=(1,) * len(rows) + nothing, out_dims=1)(*rows, *rest)
    assert_same(name, got, want)
    assert [each.removesuffix("_differentiable") for each in calls.names] == [op.public_name]


@pytest.mark.parametrize("batched", [(0, None), (None, 0)])
def test_vmap_over_some_of_the_rows(batched):
    (x, absmax), _ = arguments("quantize_rows", (B, M))
    args = [t if dim == 0 else t[0] for t, dim in zip((x, absmax), batched, strict=True)]
    with Calls() as calls:
        got = vmap(ops.quantize_rows, in_dims=batched)(*args)
    want = stacked(
        [ops.quantize_rows(*(t if dim is None else t[i] for t, dim in zip(args, batched, strict=True))) for i in range(B)]
    )
    assert_same("quantize_rows", got, want)
    assert calls.names == ["quantize_rows"]
    # without absmax: None is no batched tensor
    assert_same("quantize_rows", vmap(ops.quantize_rows)(x), ops.quantize_rows(x))


def test_vmap_without_rows_to_fold():
    _, tiles, scale, bias = Case(1, N, K).make()
    with pytest.raises(ValueError, match=r"linear_dynamic: x is 0-dimensional, expected \[..., K\]"):
        vmap(ops.linear_dynamic, in_dims=(0, None, None, None))(torch.randn(B), tiles, scale, bias)
    with pytest.raises(ValueError, match=r"linear_dynamic: x is 0-dimensional under vmap, expected \[..., K\]"):
        # K scalars are no row
        vmap(ops.linear_dynamic.raw, in_dims=(0, None, None, None))(torch.randn(K), tiles, scale, bias)
    with pytest.raises(ValueError, match=r"row_sum is torch.int32 \[4\], expected torch.int32 \[5\]"):
        vmap(ops.linear_acc, in_dims=(0, 0, None, None))(
            torch.zeros(3, 5, K, dtype=torch.int8), torch.zeros(3, 4, dtype=torch.int32), tiles, N
        )


# Int8Static is Int8Dynamic with one more stored tensor: `arguments` covers its ops
@pytest.fixture(params=[Int8Dynamic(), Int8WeightOnly(), Int4(), Binary()], ids=repr)
def layer(request):
    return QuantLinear.from_linear(nn.Linear(K, N), request.param)


def name_of(layer: QuantLinear) -> str:
    return layer.format.op.name


def op_of(layer: QuantLinear, raw: bool = False):
    """The layer's op of (x, weight_packed, weight_scale, bias)."""
    op = layer.format.op.raw if raw else layer.format.op
    bits = layer.format.bits
    return op if bits == 8 else lambda *args: op(*args, "none", bits)


@pytest.mark.parametrize("frozen", [False, True])
def test_vmap_over_the_layer(layer, frozen: bool):
    layer.bias.requires_grad_(not frozen)
    x = torch.randn(B, M, K)
    with Calls() as calls:
        got = vmap(layer)(x)
    assert calls.names == [name_of(layer) + "_differentiable"]
    assert_same(name_of(layer), got, layer(x))
    assert got.requires_grad != frozen
    with torch.no_grad():
        want = layer(x)
        with Calls() as calls:
            in_the_middle, chunked = vmap(layer, in_dims=2, out_dims=1)(x.movedim(0, 2)), vmap(layer, chunk_size=2)(x)
        assert_same(name_of(layer), in_the_middle.movedim(1, 0), want)
        assert_same(name_of(layer), chunked, want)
    assert calls.names == [name_of(layer) + "_differentiable"] * 3  # chunks of 2 and 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vmap(layer)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("x_dim", [None, 0])
def test_ensemble(layer, x_dim):
    models = [QuantLinear.from_linear(nn.Linear(K, N), layer.format) for _ in range(B)]
    params, buffers = stack_module_state(models)
    base = copy.deepcopy(layer).to("meta")
    x = torch.randn(B, M, K)

    def f(params, buffers, x):
        return functional_call(base, (params, buffers), (x,))

    got = vmap(f, in_dims=(0, 0, x_dim))(params, buffers, x[0] if x_dim is None else x)
    want = torch.stack([model(x[0 if x_dim is None else i]) for i, model in enumerate(models)])
    assert_same(name_of(layer), got, want)
    got.sum().backward()
    assert_equal(params["bias"].grad, torch.full((B, N), float(M)))


@pytest.mark.parametrize("stored", ["weight_scale", "bias"])
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_over_one_stored_tensor(layer, stored: str, dim: int):
    own = layer.state_dict()
    many = torch.rand(B, N) * own[stored]
    x = torch.randn(M, K)
    got = vmap(lambda t: functional_call(layer, {stored: t}, (x,)), in_dims=dim)(many.movedim(0, dim))
    assert_same(name_of(layer), got, torch.stack([functional_call(layer, {stored: t}, (x,)) for t in many]))


def test_empty_batches(layer):
    tiles, scale, bias = layer.weight_packed, layer.weight_scale, layer.bias
    x = torch.randn(0, M, K)
    assert_equal(vmap(layer)(x), torch.empty(0, M, N))
    got = vmap(op_of(layer), in_dims=(0, 0, None, None))(x, tiles.expand(0, *tiles.shape), scale, bias)
    assert_equal(got, torch.empty(0, M, N))


def float_weight(layer: QuantLinear) -> Tensor:
    return layer.dequantize().weight.detach()


def bound(want: Tensor) -> float:
    # sums of at most K products, taken twice, in any order; 8 for products larger than their sum
    return 8 * 2 * K * EPS[torch.float32] * want.abs().max().item()


def test_jacobians(layer):
    x, bias = torch.randn(2, K), layer.bias.detach().clone()

    def of_x(x):
        return layer(x)

    def of_bias(bias):
        return functional_call(layer, {"bias": bias}, (x,))

    for f, at in ((of_x, x), (of_bias, bias)):
        want = torch.autograd.functional.jacobian(f, at)
        assert want.abs().sum() > 0
        for got in (jacrev(f)(at), jacrev(f, chunk_size=7)(at), torch.autograd.functional.jacobian(f, at, vectorize=True)):
            assert got.shape == want.shape
            assert_within(got, want, bound(want))
    assert_within(jacrev(of_x)(x)[1, :, 1], float_weight(layer), bound(float_weight(layer)))  # straight through: W itself


def test_vjp_and_grad(layer):
    x = torch.randn(M, K)
    cotangent = torch.randn(M, N)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    want_x, want_bias = torch.autograd.grad(y, (leaf, layer.bias), cotangent)

    def f(x, bias):
        return functional_call(layer, {"bias": bias}, (x,))

    bias = layer.bias.detach()
    got, pull_back = vjp(f, x, bias)
    assert_equal(got, y.detach())
    # the same calls on the same shapes: the same bits, also once the transform is over
    assert_equal(pull_back(cotangent)[0], want_x)
    assert_equal(pull_back(cotangent)[1], want_bias)
    got = grad(lambda x, bias: (f(x, bias) * cotangent).sum(), argnums=(0, 1))(x, bias)
    assert_equal(got[0], want_x)
    assert_equal(got[1], want_bias)


@pytest.mark.parametrize("epilogue", ops.EPILOGUES)
@pytest.mark.parametrize("name", ["linear_dynamic", "linear_weight_only"])
def test_grad_of_an_epilogue(name: str, epilogue: str):
    x, tiles, scale, bias = Case(M, N, K).make()
    op = ops.OPS[name]
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(op(leaf, tiles, scale, bias, epilogue).sum(), leaf)
    # torch.func writes the slope of silu with other ops
    assert_within(grad(lambda x: op(x, tiles, scale, bias, epilogue).sum())(x), want, bound(want))


def test_per_sample_gradients(layer):
    x = torch.randn(B, M, K)
    bias = layer.bias.detach()

    def loss(bias, x):
        return functional_call(layer, {"bias": bias}, (x,)).square().sum()

    with Calls() as calls:
        got = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(bias, x)
    want = stacked([grad(loss, argnums=(0, 1))(bias, each) for each in x])
    for g, w in zip(got, want, strict=True):
        assert_within(g, w, bound(w))
    assert calls.names == [name_of(layer) + "_differentiable", "input_grad_differentiable"]


def test_gradient_of_a_vmap(layer):
    """A batched tensor does not say that what it holds needs a gradient: the raw op would be taken, and the gradient be 0."""
    layer.bias.requires_grad_(False)
    x = torch.randn(B, M, K)
    want = grad(lambda x: layer(x).square().sum())(x)
    assert want.abs().sum() > 0
    assert_within(grad(lambda x: vmap(layer)(x).square().sum())(x), want, bound(want))
    raw, stored = op_of(layer, raw=True), (layer.weight_packed, layer.weight_scale, layer.bias)
    assert_within(grad(lambda x: vmap(lambda x: raw(x, *stored))(x).square().sum())(x), want, bound(want))
    # an outer level asks, the inner one does not
    inner = grad(lambda a, x: (a * raw(x, *stored).square()).sum())
    assert_within(grad(lambda x: inner(torch.tensor(2.0), x))(x), want, bound(want))
    leaf = x.clone().requires_grad_()
    vmap(vmap(layer))(leaf).square().sum().backward()
    assert_within(leaf.grad, want, bound(want))


def test_second_derivatives(layer):
    """y is linear in x (straight through): the hessian of sum y^3 is W' diag(6 y) W."""
    x = torch.randn(K)
    w, y = float_weight(layer).double(), layer(x).detach().double()
    want = w.t() @ (6 * y.unsqueeze(1) * w)

    def loss(x):
        return layer(x).pow(3).sum()

    scale = (w.abs().t() @ (6 * y.abs().unsqueeze(1) * w.abs())).max().item()
    limit = 4 * (N + K) * EPS[torch.float32] * scale
    assert_within(jacrev(jacrev(loss))(x), want.float(), limit)
    assert_within(torch.autograd.functional.hessian(loss, x), want.float(), limit)
    # a gradient penalty
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first[3], leaf)
    assert_within(second, want[3].float(), limit)


def test_second_derivative_of_an_epilogue():
    x, tiles, scale, bias = Case(1, N, K).make()
    x = x[0] * 0.02  # where silu bends
    w = ops.to_rows(tiles, N, K).double() * scale.unsqueeze(1)
    before = ops.linear_dynamic(x, tiles, scale, bias).double()
    bend = vmap(grad(grad(nn.functional.silu)))(before)
    want = w.t() @ (bend.unsqueeze(1) * w)
    got = jacrev(jacrev(lambda x: ops.linear_dynamic(x, tiles, scale, bias, "silu").sum()))(x)
    assert_within(got, want.float(), 1e-4 * want.abs().max().item())


@pytest.mark.parametrize("fmt", [Int4(32), tersor.BinaryXnor()], ids=repr)
def test_transforms_of_groups_and_signs(fmt):
    """The layers whose op has one more stored tensor: one call for a batch, gradients through it, and members of an ensemble."""
    layer = QuantLinear.from_linear(nn.Linear(64, N), fmt)
    if "threshold" in dict(layer.named_buffers()):
        layer.threshold.uniform_(-0.5, 0.5)
    x = torch.randn(B, M, 64)
    with Calls() as calls:
        got = vmap(layer)(x)
    assert calls.names == [name_of(layer) + "_differentiable"]
    assert_equal(got, layer(x))
    want = grad(lambda x: layer(x).square().sum())(x)
    assert want.abs().sum() > 0
    assert_within(grad(lambda x: vmap(layer)(x).square().sum())(x), want, bound(want))
    assert_within(vmap(grad(lambda x: layer(x).square().sum()))(x), want, bound(want))
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    assert_within(leaf.grad, want, bound(want))
    hessian = jacrev(jacrev(lambda x: layer(x).pow(3).sum()))(x[0, 0])
    assert torch.isfinite(hessian).all() and hessian.abs().sum() > 0
    models = [QuantLinear.from_linear(nn.Linear(64, N), fmt) for _ in range(B)]
    base = copy.deepcopy(models[0]).to("meta")
    got = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(*stack_module_state(models), x)
    assert_same(name_of(layer), got, torch.stack([model(each) for model, each in zip(models, x, strict=True)]))


NO_FORWARD_MODE = r": there is no forward-mode derivative \(jvp, jacfwd, hessian\); use reverse mode: torch.func.vjp, grad"


@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_refused(layer, grad_mode: bool):
    x = torch.randn(M, K)
    message = name_of(layer) + NO_FORWARD_MODE
    with torch.set_grad_enabled(grad_mode):
        for transform in (torch.func.jacfwd, torch.func.hessian, lambda f: torch.func.jacfwd(vmap(f))):
            with pytest.raises(NotImplementedError, match=message):
                transform(lambda x: layer(x).pow(2).sum())(x)
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(layer, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match=message):
                layer(torch.autograd.forward_ad.make_dual(x, x))
            assert_equal(layer(x), op_of(layer, raw=True)(x, layer.weight_packed, layer.weight_scale, layer.bias))


def test_forward_mode_of_input_grad_is_refused():
    rows, rest = arguments("input_grad", (M,))
    with pytest.raises(NotImplementedError, match="input_grad" + NO_FORWARD_MODE):
        torch.func.jacfwd(lambda g: ops.input_grad(g, *rest))(*rows)


def test_ops_on_integers_have_no_gradients(layer):
    """As in eager mode, torch's own backward warns; here it then gives zeros."""
    rows = ops.quantize_rows(torch.randn(M, K))
    tiles, scale, bias, bits = layer.weight_packed, layer.weight_scale, layer.bias, layer.format.bits
    with pytest.warns(UserWarning, match="tersor::linear_s8: an autograd kernel was not registered"):
        got = grad(lambda bias: ops.linear_s8(*rows, tiles, scale, bias, bits=bits).sum())(bias.detach())
    assert_equal(got, torch.zeros(N))


def test_functionalize(layer):
    x = torch.randn(M, K)
    assert_equal(torch.func.functionalize(layer)(x), layer(x))


def test_compiled_autograd(layer):
    x = torch.randn(M, K, requires_grad=True)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        layer(x).square().sum().backward()
    assert_within(x.grad, want, bound(want))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_transforms(layer, backend: str):
    torch._dynamo.reset()  # torch allows eight recompilations of a forward
    layer.bias.requires_grad_(False)
    x = torch.randn(B, M, K)
    for f in (vmap(layer), grad(lambda x: layer(x).square().sum()), vmap(grad(lambda x: layer(x).square().sum()))):
        want = f(x)
        got = torch.compile(f, fullgraph=True, backend=backend)(x)
        assert_within(got, want, bound(want))
