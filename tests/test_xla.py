"""The references through torchax on JAX CPU: eager, jitted, differentiated, exported, sharded. Needs the extra tersor[xla]."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import EPS, FORMATS, SPARSE_FLOAT, Case, assert_equal, assert_within, epilogue_bound, fitting
from test_ops import arguments
from test_sparse import pruned
from torch import nn
from xla_common import JIT, called, env, jax, torchax, xla

import tersor
import tersor.ops as ops
from tersor.ops.sparse_storage import storage_of

pytestmark = pytest.mark.xla

EXACT = ("quantize_rows", "quantize_static", "binarize_rows", "linear_acc")  # class I
EPS32 = EPS[torch.float32]


# Every format; the share of weights that are not zero decides how SparseInt8 is stored.
LAYERS = [(fmt, None) for fmt in FORMATS if not isinstance(fmt, tersor.SparseInt8)]
LAYERS += [(tersor.SparseInt8(), 1.0), (tersor.SparseInt8(), 0.5), (tersor.SparseInt8(), 0.1), (SPARSE_FLOAT, 0.2)]
STORAGE = {1.0: "tiles", 0.1: "windows"}  # masks: test_xla_ops.py


def linear(k: int, n: int, density: float | None) -> nn.Linear:
    layer = nn.Linear(k, n)
    if density is not None:
        layer.weight = nn.Parameter(pruned(n, k, density))
    return layer


def test_layers_cover_the_chosen_storages_of_sparse_int8():
    for density, storage in STORAGE.items():
        layer = tersor.QuantLinear.from_linear(linear(70, 37, density), tersor.SparseInt8())
        assert storage_of(layer.weight_packed, layer.weight_index) == storage


def float_bound(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Two float32 evaluations of sum(x w) + bias, K terms in any order, with or without fma: each within (K + 4) eps of the sum of
    absolute terms, and the result's own store."""
    terms = x.double().abs() @ w.double().abs().t() + bias.double().abs()
    return 2 * (x.shape[-1] + 4) * EPS32 * terms + 2 * EPS[want.dtype] * want.double().abs()


@JIT
@pytest.mark.parametrize("name", ops.OPS)
def test_every_op_gives_what_its_reference_gives(env, name: str, jit: bool):
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments(name, Case(5, 37, 70).make())]
    want = ops.OPS[name].reference(*args)
    want = want if isinstance(want, tuple) else (want,)
    got = called(env, ops.OPS[name], args, jit)
    for g, w in zip(got, want, strict=True):
        if name in EXACT:
            assert_equal(g, w)
            continue
        assert g.dtype == w.dtype
        if not w.is_floating_point():
            # int8 rows of a float result, which may lie on either side of a tie, and their sums
            assert (g.int() - w.int()).abs().amax() <= (1 if w.dtype == torch.int8 else 2)
            continue
        # Class E and F with inputs of about 1 and weights below 2.7: sums of 96 terms at most, and XLA may contract to fma. An
        # activation has slope at most 1.13, and epilogue_bound of its own (float32, or the bfloat16 of linear_s8).
        scale = w.double().abs().amax() + 1
        assert_within(g, w, (2 * (96 + 4) * EPS32 + 2 * EPS[w.dtype]) * scale * 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ops.OPS)
def test_every_op_where_jax_has_64_bits(env, name: str):
    """Where a sum of int8 is int64 unless it is told otherwise (torchax.enable_accuracy_mode)."""
    with jax.enable_x64(True):
        test_every_op_gives_what_its_reference_gives(env, name, False)


@JIT
@pytest.mark.parametrize("bits", ops.CODES)
def test_integers_are_equal_for_every_width(env, bits: int, jit: bool):
    for case in (
        Case(7, 37, 1300, bits=bits),
        Case(3, 16, 132104, values="extreme", bits=bits),
        Case(2, 5, 33, torch.bfloat16, bits=bits),
    ):
        x, tiles, _, _ = case.make()
        q, scale, row_sum = ops.quantize_rows(x)
        for g, w in zip(called(env, ops.quantize_rows, [x], jit), (q, scale, row_sum), strict=True):
            assert_equal(g, w)
        (acc,) = called(env, ops.linear_acc, [q, row_sum, tiles, case.n, bits], jit)
        assert_equal(acc, ops.linear_acc(q, row_sum, tiles, case.n, bits))


def test_a_row_with_nan_touches_no_other(env):
    x, tiles, scale, bias = Case(4, 20, 50).make()
    x[1, 3] = torch.nan
    x[2, 0] = torch.inf
    (y,) = called(env, ops.linear_dynamic, [x, tiles, scale, bias], True)
    assert y[1:3].isnan().all()
    assert y[0].isfinite().all()
    assert y[3].isfinite().all()


def test_the_product_is_one_dot_of_int8_into_int32(env):
    x, tiles, scale, bias = Case(4, 20, 50).make()
    layer = nn.Linear(50, 20)
    layer = tersor.QuantLinear.from_linear(layer)
    text = str(xla.export(layer, (x,), platforms=("tpu",)).mlir_module())  # a dot for each platform otherwise
    dots = [line for line in text.splitlines() if " = stablehlo.dot_general" in line]
    assert len(dots) == 1
    assert "xi8>" in dots[0] and "xi32>" in dots[0] and "f32" not in dots[0]


@pytest.mark.parametrize(("fmt", "density"), LAYERS, ids=str)
def test_a_layer_moves_there_and_back(env, fmt, density: float | None):
    k = fitting(fmt, 70)
    model = nn.Sequential(linear(k, 37, density), nn.ReLU(), nn.Linear(37, 10))
    tersor.quantize_(model, {"0": fmt})
    stored = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    x = torch.randn(3, 5, k)
    with torch.no_grad():
        want = model(x)
        hidden = model[0](x).relu()
        weight = model[0].dequantize().weight.detach()
    bound = 2 * (k + 8) * EPS32 * (hidden.double().abs() @ model[2].weight.double().abs().t() + 1)
    with env:
        model.to("jax")
        assert model[0].plain
        assert model[0].weight_packed.dtype == (torch.float32 if fmt == SPARSE_FLOAT else torch.int8)
        assert tuple(model[0].weight_packed.shape) == (37, k)
        assert_equal(model[0].dequantize().weight.torch().detach(), weight)
        assert_within(model(x.to("jax")).torch().detach(), want, bound)
        assert_within(torchax.interop.JittableModule(model)(x.to("jax")).torch().detach(), want, bound)
        with pytest.raises(ValueError, match="JAX device"):
            tersor.save(model, "never.safetensors")
        with pytest.raises(ValueError, match="JAX device"):
            tersor.load_(model, stored)
        model.to(torch.bfloat16)
        assert all(getattr(model[0], spec.name).dtype == spec.dtype for spec in model[0].specs())
        model.to(torch.float32).to("cpu")
    assert not model[0].plain
    for name, t in model[0].state_dict().items():
        if name != "bias":  # which went through bfloat16
            assert_equal(t, stored["0." + name])


def test_training_a_head_on_frozen_layers(env):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 5))
    tersor.quantize_(model, {"0": tersor.Int8Dynamic()})
    x, target = torch.randn(16, 32), torch.randint(0, 5, (16,))
    names = ["2.weight", "2.bias", "0.bias"]
    want = torch.autograd.grad(nn.functional.cross_entropy(model(x), target), [dict(model.named_parameters())[n] for n in names])
    one_hot = nn.functional.one_hot(target, 5).float()
    with env:
        model.to("jax")
        trained = {n: p for n, p in model.named_parameters() if n in names}
        xj = x.to("jax")
        one_hot = one_hot.to("jax")

        def loss(trained):
            y = torch.func.functional_call(model, trained, (xj,))
            return -(torch.log_softmax(y, -1) * one_hot).sum() / 16

        first, grads = torchax.interop.jax_value_and_grad(loss)(trained)
        for name, w in zip(names, want, strict=True):
            assert_within(grads[name].torch(), w, 2 * (48 + 16 + 32) * EPS32 * 16)
        stepped = {n: p - 0.1 * grads[n] for n, p in trained.items()}
        assert loss(stepped).item() < first.item()


def test_export_runs_without_torch_and_without_this_package(env, tmp_path):
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 10))
    tersor.quantize_(model, tersor.Int8Dynamic())
    path = tmp_path / "model.stablehlo"
    exported = xla.export(model, (torch.randn(3, 64),), path)
    assert exported.platforms == ("cpu", "tpu")
    assert not model[0].plain  # a copy was taken
    code = (
        "import sys, jax, numpy as np\n"
        f"call = jax.export.deserialize(bytearray(open({str(path)!r}, 'rb').read())).call\n"
        f"for m in (1, 7): np.save({str(tmp_path)!r} + f'/y{{m}}.npy', call(np.load({str(tmp_path)!r} + f'/x{{m}}.npy')))\n"
        "assert not {'torch', 'tersor', 'torchax'} & set(sys.modules)\n"
    )
    import numpy

    inputs = {m: torch.randn(m, 64) for m in (1, 7)}
    for m, x in inputs.items():
        numpy.save(tmp_path / f"x{m}.npy", x.numpy())
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    for m, x in inputs.items():
        with torch.no_grad():
            want = model(x)
            hidden = model[1](model[0](x))
        # The hidden rows may be one step of int8 apart where an ulp of GELU crosses a tie.
        step = hidden.abs().amax(-1, keepdim=True).double() / 127 * model[2].dequantize().weight.abs().amax().double()
        assert_within(torch.from_numpy(numpy.load(tmp_path / f"y{m}.npy")), want, 1.01 * step)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_layer_made_there_is_the_one_made_here(env, fmt):
    linear = nn.Linear(96, 37)
    here = tersor.QuantLinear.from_linear(linear, fmt)
    with env:
        there = tersor.QuantLinear.from_linear(linear.to("jax"), fmt)
        assert there.plain
        there.to("cpu")
    for name, t in here.state_dict().items():
        got = there.state_dict()[name]
        if isinstance(fmt, tersor.Ternary | tersor.Binary) and name == "weight_scale":  # a mean of 96 terms, in any order
            assert_within(got, t, 2 * (96 + 2) * EPS32 * t.double())
        else:
            assert_equal(got, t)


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "density"), LAYERS, ids=str)
def test_export_of_every_format_with_any_batch(env, fmt, density: float | None):
    layer = tersor.QuantLinear.from_linear(linear(64, 48, density), fmt)
    exported = xla.export(layer, (torch.randn(3, 2, 64),))
    w = layer.dequantize().weight.detach()
    for m in (1, 5):
        x = torch.randn(m, 2, 64)
        with torch.no_grad():
            want = layer(x)
        bound = float_bound(x, w, layer.bias.detach(), want) + 8 * EPS32 * (x.abs().amax() * w.abs().sum(1).amax()).double()
        assert_within(torch.from_dlpack(exported.call(jax.numpy.asarray(x.numpy()))), want, bound)


@pytest.mark.parametrize("style", ["column", "row"])
@pytest.mark.parametrize(("fmt", "density"), LAYERS, ids=str)
def test_sharded_over_a_mesh(env, fmt, density: float | None, style: str):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 JAX devices: XLA_FLAGS=--xla_force_host_platform_device_count=4 before JAX starts")
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = tersor.QuantLinear.from_linear(linear(128, 64, density), fmt)
    x = torch.randn(6, 128)
    with torch.no_grad():
        want = layer(x)
        terms = float_bound(x, layer.dequantize().weight, layer.bias, want)
    with env:
        layer.to("jax")
        xla.shard_(layer, mesh, "model", style)
        n, k = layer.weight_packed.shape
        shards = {shard.data.shape for shard in layer.weight_packed.jax().addressable_shards}
        assert shards == {(n // 4, k) if style == "column" else (n, k // 4)}
        xj = x.to("jax")
        if style == "row":
            xj.apply_jax_(jax.device_put, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model")))
        else:
            xj.apply_jax_(jax.device_put, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        got = torchax.interop.JittableModule(layer)(xj).torch().detach()
    # Integer sums and maxima are exact however they are split; the float steps after them are 2 products and a sum, and the
    # mean of XNOR's scale (128 terms) may be added in another order. Float layers add 128 terms in another order.
    is_float = isinstance(fmt, tersor.Int8WeightOnly | tersor.SparseFloat)
    assert_within(got, want, terms if is_float else 2 * (128 + 4) * EPS32 * (want.double().abs() + 1))
    with env:
        odd = tersor.QuantLinear.from_linear(nn.Linear(33, 33)).to("jax")
    with pytest.raises(ValueError, match="not a multiple of the 4 devices"):
        xla.shard_(odd, mesh, "model", style)


def test_importing_the_package_imports_neither_jax_nor_torchax():
    code = (
        "import sys, tersor, tersor.ops, tersor.nn, tersor.backends.xla; tersor.info(); "
        "assert not {'jax', 'torchax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_again_changes_nothing(env):
    registry = torchax.ops.ops_registry.all_aten_ops
    before = {raw: (registry[raw], env._ops[raw]) for raw in (op.raw for op in ops.OPS.values())}
    size = len(registry), len(env._ops)
    args = Case(4, 20, 50).make()
    (want,) = called(env, ops.linear_dynamic, args, False)
    xla.register()
    assert (len(registry), len(env._ops)) == size
    assert before.keys() <= registry.keys()
    (got,) = called(env, ops.linear_dynamic, args, False)
    assert_equal(got, want)


def test_an_environment_made_before_or_after_has_the_ops():
    # In a process of its own: an environment copies torchax's table when it is made, and here is one already.
    code = (
        "import torch, torchax, tersor\n"
        "if {early}: torchax.default_env()\n"
        "{register}\n"
        "env = torchax.default_env()\n"
        "assert all(op.raw in env._ops for op in tersor.ops.OPS.values())\n"
    )
    explicitly = "import tersor.backends.xla; tersor.backends.xla.register()"
    by_a_layer = "with torchax.default_env(): tersor.QuantLinear.from_linear(torch.nn.Linear(8, 4)).to('jax')"
    for early, register in ((True, explicitly), (False, explicitly), (False, by_a_layer)):
        subprocess.run([sys.executable, "-c", code.format(early=early, register=register)], check=True)


def test_an_old_torchax_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torchax, "__version__", "0.0.13")
    with pytest.raises(ImportError, match=r"0.0.13 is too old.*pip install"):
        xla.register()


@pytest.mark.parametrize("module", ["jax", "torchax"])
def test_a_missing_module_is_an_error_that_says_what_to_install(monkeypatch, module: str):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install"):
        xla.register()


def test_bounds_are_tight_enough_to_see_a_wrong_scale():
    case = Case(5, 37, 70)
    x, _, _, bias = case.make()
    assert (epilogue_bound(case, x, "none") == 0).all()
    assert float_bound(x, torch.ones(37, 70), bias, torch.ones(5, 37)).max() < 1e-2
