"""Sparse formats: SparseInt8 against Int8Dynamic bit for bit, SparseFloat within its bound, what is stored, and what is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from cases import EPS, assert_equal, assert_within
from torch import Tensor, nn
from torch.library import opcheck

import tersor
import tersor.numpy as tn
import tersor.ops as ops
from tersor import Int8Dynamic, QuantLinear, SparseFloat, SparseInt8
from tersor.ops import sparse_storage
from tersor.ops.linear_sparse_float import FloatParts, check_float_structure
from tersor.parallel import ColwiseParallel

STORAGES = ("tiles", "masks", "windows")
SHAPES = [
    *((m, 37, 70) for m in (1, 2, 3, 4, 5, 8, 9, 17, 65)),
    *((3, n, 67) for n in (1, 15, 16, 17, 53)),
    *((2, 20, k) for k in (1, 3, 4, 5, 31, 63, 64, 65, 127, 128, 129, 1000)),
]


def pruned(n: int, k: int, density: float, seed: int = 0) -> Tensor:
    """float [N, K]; every third n tile is empty, one column and one row are."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) < density)
    w[32:48] = 0
    w[:, k // 2] = 0
    w[n // 2] = 0
    return w


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight)
    return layer


def blocks(n: int, k: int, density: float) -> Tensor:
    kept = torch.rand(-(-n // 16), -(-k // 4)) < density
    return torch.randn(n, k) * kept.repeat_interleave(16, 0).repeat_interleave(4, 1)[:n, :k]


def storage(layer: QuantLinear) -> str:
    return sparse_storage.storage_of(layer.weight_packed, layer.weight_index)


@pytest.mark.exact
@pytest.mark.parametrize("density", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("how", STORAGES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_dense_int8(m: int, n: int, k: int, how: str, density: float):
    q, scale, _ = ops.quantize_rows(pruned(n, k, density))
    parts = ops.pack_sparse(q, how)
    sparse_storage.check_structure("test", parts, n, k)
    assert sparse_storage.storage_of(*parts[:2]) == how
    assert_equal(ops.sparse_rows(*parts[:3], n, k), q)
    x, bias = torch.randn(m, k), torch.randn(n)
    for epilogue in ("none", "silu"):
        got = ops.linear_sparse(x, *parts, scale, bias, epilogue)
        assert_equal(got, ops.linear_dynamic(x, ops.from_rows(q), scale, bias, epilogue))
    assert_equal(
        ops.linear_sparse.reference(x, *parts, scale, bias), ops.linear_dynamic.reference(x, ops.from_rows(q), scale, bias)
    )


@pytest.mark.exact
@pytest.mark.parametrize("how", STORAGES)
def test_extreme_values(how: str):
    """Every product as large as it gets, of either sign: nothing saturates."""
    q = torch.where(torch.rand(40, 259) < 0.5, 127, -127).to(torch.int8)
    q[:, ::3] = 0
    x = torch.where(torch.rand(5, 1) < 0.5, 1.0, -1.0).expand(5, 259)
    scale = torch.full((40,), 0.01)
    assert_equal(ops.linear_sparse(x, *ops.pack_sparse(q, how), scale, None), ops.linear_dynamic(x, ops.from_rows(q), scale, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_strides_and_bad_rows(dtype: torch.dtype):
    dense = QuantLinear.from_linear(layer := linear(pruned(53, 131, 0.1)).to(dtype), Int8Dynamic())
    sparse = QuantLinear.from_linear(layer, SparseInt8())
    x = torch.randn(2, 131, 7).to(dtype).transpose(1, 2)
    x[0, 3, 5] = torch.nan
    x[1, 2] = 0
    assert_equal(sparse(x), dense(x))
    assert_equal(sparse(x[0, 0]), dense(x[0, 0]))


def test_storage_follows_the_zeros():
    n, k = 256, 4096
    found = {}
    for name, weight in {
        "block 80": blocks(n, k, 0.2),
        "90": torch.randn(n, k) * (torch.rand(n, k) < 0.1),
        "80": torch.randn(n, k) * (torch.rand(n, k) < 0.2),
        "50": torch.randn(n, k) * (torch.rand(n, k) < 0.5),
        "dense": torch.randn(n, k),
        "zeros": torch.zeros(n, k),
    }.items():
        layer = QuantLinear.from_linear(linear(weight), SparseInt8())
        stored = sum(t.numel() * t.element_size() for name, t in layer.state_dict().items() if name.startswith("weight"))
        found[name] = (storage(layer), stored / (n * k + 4 * n))
    assert [found[name][0] for name in found] == ["tiles", "windows", "windows", "masks", "tiles", "tiles"]
    bounds = {"block 80": 0.22, "90": 0.24, "80": 0.46, "50": 0.64, "dense": 1.05, "zeros": 0.02}
    for name, bound in bounds.items():
        assert found[name][1] <= bound, (name, found[name])


def test_windows_fill_and_shift():
    """A channel with many non-zeros, beside empty ones, needs an entry for each four; far apart ones need an entry each."""
    q = torch.zeros(16, 4096, dtype=torch.int8)
    q[3] = 1
    parts = ops.pack_sparse(q, "windows")
    assert parts.weight_packed.shape == (1024, 128)
    q[3] = 0
    q[5, ::500] = 7
    parts = ops.pack_sparse(q, "windows")
    assert parts.weight_packed.shape == (9, 128)
    assert_equal(ops.sparse_rows(*parts[:3], 16, 4096), q)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (64, 16, 4096), (33, 18, 9000), (40, 17, 65536)])
def test_sparse_float(m: int, n: int, k: int, density: float):
    w = pruned(n, k, density)
    layer = QuantLinear.from_linear(linear(w), SparseFloat())
    assert_equal(layer.dequantize().weight.detach(), w)
    x = torch.randn(m, k)
    want = x.double() @ w.double().t() + layer.bias.detach()
    # At most Z products and as many sums are rounded in a channel of Z non-zeros, then the bias.
    magnitude = x.abs().double() @ w.abs().double().t() + layer.bias.detach().abs()
    bound = 1.01 * (2 * int((w != 0).sum(1).max()) + 2) * EPS[torch.float32] * magnitude
    assert_within(layer(x).detach(), want, bound)
    stored = tuple(layer._parameters[name] for name in FloatParts._fields)
    assert_within(ops.linear_sparse_float.reference(x, *stored, layer.bias).detach(), want, bound)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        want = half.double() @ w.double().t() + layer.bias.detach()
        slack = EPS[dtype] * want.abs() + (2.0**-25 if dtype == torch.float16 else 0)
        assert_within(layer(half).detach(), want, 1.2 * bound + 1.01 * slack)


@pytest.mark.parametrize("fmt", [SparseInt8(), SparseFloat()], ids=repr)
@pytest.mark.parametrize("target", ["float", "meta", "same sizes", "other sizes"])
@pytest.mark.parametrize("mmap", [True, False])
def test_files(tmp_path, fmt, target, mmap):
    model = nn.Sequential(linear(pruned(100, 300, 0.1)), nn.ReLU(), linear(blocks(40, 100, 0.2)))
    tersor.quantize_(model, fmt)
    path = tmp_path / "m.safetensors"
    tersor.save(model, path)
    with torch.device("meta" if target == "meta" else "cpu"):
        other = nn.Sequential(nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 40))
    if "sizes" in target:
        seed, density = (0, 0.1) if target == "same sizes" else (5, 0.7)
        other[0] = QuantLinear.from_linear(linear(pruned(100, 300, density, seed)), fmt)
    x = torch.randn(5, 300)
    tersor.load_(other, path, mmap=mmap)
    assert_equal(other(x).detach(), model(x).detach())
    fresh = nn.Sequential(QuantLinear(300, 100, format=fmt), nn.ReLU(), QuantLinear(100, 40, format=fmt))
    assert_equal(fresh(x).detach(), torch.zeros(5, 40))  # never loaded: its bias
    for assign in (False, True):
        fresh.load_state_dict(model.state_dict(), assign=assign)
        assert_equal(fresh(x).detach(), model(x).detach())
    half = fresh.to(torch.bfloat16)
    assert_equal(half[0].weight_packed.detach(), model[0].weight_packed.detach())
    back = tersor.dequantize_(model)
    want = torch.randn(3, 300)
    assert back(want).shape == (3, 40)


def bad_structures(fmt) -> list[tuple[str, dict[str, Tensor], str]]:
    """(what, changed tensors, message) for a layer of `fmt`: its structure is wrong, its dtypes are right."""
    layer = QuantLinear.from_linear(linear(pruned(100, 300, 0.1)), fmt)
    offset, packed, index = layer.weight_offset.detach(), layer.weight_packed.detach(), layer.weight_index.detach()
    falling = offset.clone()
    falling[2] = offset[3] + 1
    cases = [
        ("falls", {"weight_offset": falling}, "does not rise from 0"),
        ("below 0", {"weight_offset": torch.cat([offset[:1] - 5, offset[1:]])}, "does not rise from 0"),
        ("past the end", {"weight_offset": torch.cat([offset[:-1], offset[-1:] + 1])}, "does not rise from 0"),
        ("huge", {"weight_offset": torch.full_like(offset, 2**62)}, "does not rise from 0"),
        ("short", {"weight_packed": packed[:-1]}, r"expected \[|does not rise|expected up to"),
        ("wider", {"weight_packed": packed.repeat(1, 2)}, r"expected \["),
        ("flat", {"weight_packed": packed.reshape(-1)}, r"expected \["),
    ]
    if isinstance(fmt, SparseFloat):
        cases.append(("k", {"weight_index": torch.full_like(index, 255)}, "weight_index holds 65535, expected up to 299"))
    else:
        begin = packed.clone()
        begin[7, :16] |= 128
        cases.append(("window", {"weight_packed": begin}, "holds a window that begins at 2097120, expected up to 299"))
    return cases


@pytest.mark.parametrize("fmt", [SparseInt8(), SparseFloat()], ids=repr)
@pytest.mark.parametrize("at", range(8))
def test_wrong_structures_are_refused(tmp_path, fmt, at):
    _, changed, message = bad_structures(fmt)[at]
    model = nn.Sequential(QuantLinear.from_linear(linear(pruned(100, 300, 0.1)), fmt))
    state = model.state_dict() | {f"0.{name}": t for name, t in changed.items()}
    other = nn.Sequential(nn.Linear(300, 100))
    before = other[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        tersor.load_(other, state)
    assert_equal(other[0].weight.detach(), before)
    with pytest.raises(RuntimeError, match=message):
        nn.Sequential(QuantLinear(300, 100, format=fmt)).load_state_dict(state)
    # The op itself takes what has fitting shapes, and reads nothing outside.
    stored = {name: state[f"0.{name}"] for name in model[0]._parameters if name != "bias"}
    if at < 4 or at == 7:
        scale = () if isinstance(fmt, SparseFloat) else (model[0].weight_scale,)
        assert fmt.op.raw(torch.randn(3, 300), *stored.values(), *scale, None).shape == (3, 100)


def test_wrong_masks_and_tiles_are_refused():
    q = ops.quantize_rows(pruned(100, 300, 0.5))[0]
    masks = ops.pack_sparse(q, "masks")
    extra = masks.weight_index.clone()
    extra[0, 0, 0] ^= 1
    with pytest.raises(ValueError, match="other numbers of bits"):
        sparse_storage.check_structure("f", masks._replace(weight_index=extra), 100, 300)
    slack = masks.weight_packed.clone()
    slack[-1] = 1
    with pytest.raises(ValueError, match="does not end with 64 zeros"):
        sparse_storage.check_structure("f", masks._replace(weight_packed=slack), 100, 300)
    tiles = ops.pack_sparse(q, "tiles")
    far = tiles.weight_index.clone()
    far[3, 1] = 1
    with pytest.raises(ValueError, match="weight_index holds k step .*, expected up to 74"):
        sparse_storage.check_structure("f", tiles._replace(weight_index=far), 100, 300)
    parts = ops.pack_sparse_float(pruned(10, 300, 0.5))
    with pytest.raises(ValueError, match=r"weight_offset is \[11\], expected \[12\]"):
        check_float_structure("f", parts, 11, 300)


@pytest.mark.parametrize("name", ["linear_sparse", "linear_sparse_float"])
@pytest.mark.parametrize("epilogue", ops.EPILOGUES)
def test_gradients(name: str, epilogue: str):
    fmt = SparseInt8() if name == "linear_sparse" else SparseFloat()
    layer = QuantLinear.from_linear(linear(pruned(21, 40, 0.3)), fmt)
    stored = [p for n, p in layer._parameters.items() if n != "bias"] + list(layer._buffers.values())
    x, bias = torch.randn(6, 40, requires_grad=True), torch.randn(21, requires_grad=True)
    y = ops.OPS[name](x, *stored, bias, epilogue)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), grad)
    w = layer.dequantize().weight.detach()
    x2, bias2 = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    flat = x2 @ w.t() + bias2
    before = ops.OPS[name](x.detach(), *stored, bias.detach())
    want = torch.autograd.grad(ops.EPILOGUES[epilogue](flat + (before - flat).detach()), (x2, bias2), grad)
    for a, b in zip(got, want, strict=True):
        # float32 sums over 21 channels or 6 rows, in another order
        assert_within(a, b, 100 * EPS[torch.float32] * (grad.abs().sum() * (w.abs().max() + 1)).item())


@pytest.mark.parametrize("fmt", [SparseInt8(), SparseFloat()], ids=repr)
def test_transforms_and_graphs(fmt):
    layer = QuantLinear.from_linear(linear(pruned(37, 70, 0.1)), fmt).eval()
    x = torch.randn(4, 3, 70)
    with torch.no_grad():
        # One call for the batch: as many rows at once, in another order of float sums where the format is a float one.
        want = layer(x)
        bound = 0.0 if isinstance(fmt, SparseInt8) else 1e-5
        assert_within(torch.func.vmap(layer)(x), want, bound)
        assert_within(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want, bound)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=2)},))
        assert_within(exported.module()(x[:2]), want[:2], bound)
    grad = torch.func.grad(lambda v: layer(v).square().sum())(x)
    assert grad.shape == x.shape and torch.isfinite(grad).all()


@pytest.mark.parametrize("how", ["tiles", "masks"])
def test_opcheck_of_other_storages(how: str):
    q, scale, _ = ops.quantize_rows(pruned(37, 70, 0.1))
    opcheck(ops.linear_sparse.raw, (torch.randn(5, 70), *ops.pack_sparse(q, how), scale, None))


def test_numpy():
    layer = QuantLinear.from_linear(linear(pruned(37, 70, 0.1)), SparseInt8())
    x = torch.randn(5, 70)
    stored = [getattr(layer, spec.name).detach().numpy() for spec in layer.specs()]
    got = tn.linear_sparse(x.numpy(), *stored, layer.bias.detach().numpy())
    assert_equal(torch.from_numpy(got), layer(x).detach())
    layer = QuantLinear.from_linear(linear(pruned(37, 70, 0.1)), SparseFloat())
    stored = [getattr(layer, spec.name).detach().numpy() for spec in layer.specs()]
    got = tn.linear_sparse_float(x.numpy(), *stored, layer.bias.detach().numpy(), "relu")
    assert_equal(torch.from_numpy(got), layer(x).detach().relu())
    with pytest.raises(ValueError, match="weight_offset"):
        tn.linear_sparse_float(x.numpy(), stored[0], stored[1], np.zeros((2, 2), np.int64))


def test_refusals():
    with pytest.raises(ValueError, match="in_features=65537 is above 65536, what its two bytes of index reach"):
        QuantLinear(65537, 1, format=SparseFloat(), device="meta")
    assert SparseInt8().tag not in tersor.parallel.SPLITTABLE and SparseFloat().tag not in tersor.parallel.SPLITTABLE
    with pytest.raises(ValueError, match=r"SparseInt8\(\) cannot be split over ranks"):
        tersor.parallel._check_format(ColwiseParallel.__name__, SparseInt8(), "N")
    layer = linear(pruned(20, 30, 0.5))
    with torch.no_grad():
        layer.weight[3, 4] = torch.inf
    for fmt in (SparseInt8(), SparseFloat()):
        with pytest.raises(ValueError, match="weight holds NaN or inf in rows 0 to 19"):
            QuantLinear.from_linear(layer, fmt)


def test_only_if_faster_may_choose_dense_int8(monkeypatch, caplog):
    """The faster of sparse and dense int8, or neither."""
    seconds = {"Linear": 3.0, "SparseInt8()": 2.0, "Int8Dynamic()": 1.0}

    def measure(float_layer, packed, m):
        return seconds["Linear"], seconds[repr(packed.format)]

    monkeypatch.setattr("tersor.choice._measure", measure)
    model = nn.Sequential(linear(pruned(40, 64, 0.1)))
    with caplog.at_level(logging.INFO, "tersor"):
        tersor.quantize_(model, SparseInt8(), only_if_faster=1)
    assert repr(model[0].format) == "Int8Dynamic()" and model[0].speedup == {1: 3.0}
    assert "becomes Int8Dynamic(), which is faster here than SparseInt8()" in caplog.text
    seconds["SparseInt8()"] = 0.5
    assert (
        repr(tersor.quantize_(nn.Sequential(linear(pruned(40, 64, 0.1))), SparseInt8(), only_if_faster=1)[0].format)
        == "SparseInt8()"
    )
    seconds["Linear"] = 0.1
    assert isinstance(tersor.quantize_(nn.Sequential(linear(pruned(40, 64, 0.1))), SparseInt8(), only_if_faster=1)[0], nn.Linear)
