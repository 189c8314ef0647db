"""What test_parallel.py runs in each spawned process. Every check is a function of (mesh, folder) that runs on all ranks alike."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from cases import EPS, assert_equal, assert_within
from parallel_common import DTYPES, EVERY_WORLD, TWO_RANKS, Mlp, check, expect, layer, reference, shard, split
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import tersor
import tersor.ops as ops
from tersor.formats import Format, TensorSpec
from tersor.parallel import ColwiseParallel, RowwiseParallel

# ---- tensor parallel


@check(EVERY_WORLD)
def two_layers_bit_for_bit(mesh: DeviceMesh, folder: Path) -> None:
    for dtype in DTYPES:
        for bias in (True, False):
            model = Mlp((96, 192, 96), nn.ReLU() if bias else nn.GELU(), tersor.Int8Dynamic(), bias).to(dtype)
            parallel = split(model, mesh)
            for shape in ((1, 96), (7, 96), (2, 5, 96), (96,), (0, 96)):
                x = (3 * torch.randn(shape)).to(dtype)
                y = parallel(x)
                with torch.no_grad():
                    assert_equal(parallel(x), y)
                    assert type(y) is Tensor
                    assert_equal(y.detach(), model(x))
                    assert_equal(y.detach(), reference(model.down, model.act(reference(model.up, x))))


@check(EVERY_WORLD)
@torch.no_grad()
def minilm_feed_forward_bit_for_bit(mesh: DeviceMesh, folder: Path) -> None:
    model = Mlp((384, 1536, 384), nn.GELU(), tersor.Int8Dynamic())
    parallel = split(model, mesh)
    x = torch.randn(33, 384)
    hidden = model.up(x)
    assert_equal(parallel.up(x), shard(hidden, mesh))
    assert_equal(parallel(x), model(x))
    assert_equal(parallel(x), reference(model.down, model.act(reference(model.up, x))))
    # rows whose absmax lies on one rank only, and rows that are zero on all ranks but one
    x = model.act(hidden)
    x[0, 3], x[1, -5], x[2, : 1536 // mesh.size()] = 1e4, -1e4, 0.0
    x[3] = 0.0
    assert_equal(parallel.down(shard(x, mesh)), model.down(x))
    # every product as large as it gets: the sum of all ranks is the largest there is
    model.down.weight_packed.fill_(255)
    parallel.down.weight_packed.to_local().fill_(255)
    x = torch.ones(4, 1536)
    assert_equal(parallel.down(shard(x, mesh)), model.down(x))


@check(EVERY_WORLD)
@torch.no_grad()
def layouts(mesh: DeviceMesh, folder: Path) -> None:
    world = mesh.size()
    model = Mlp((96, 192, 96), nn.ReLU(), tersor.Int8Dynamic())
    x = torch.randn(4 * world, 96)
    want, hidden = model(x), model.act(model.up(x))
    # whole x in, rows of y out
    row = split(model, mesh, down=RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)))
    assert_equal(row.down(hidden), shard(want, mesh, 0))
    # rows of x in, whole y out
    column = split(model, mesh, up=ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()))
    assert_equal(column(shard(x, mesh, 0)), want)
    # DTensors in between
    both = split(model, mesh, up=ColwiseParallel(use_local_output=False), down=RowwiseParallel(use_local_output=False))
    between = both.up(x)
    assert isinstance(between, DTensor)
    assert between.placements == (Shard(1),)
    y = both(x)
    assert isinstance(y, DTensor)
    assert y.placements == (Replicate(),)
    assert_equal(y.to_local(), want)
    assert "RowwiseParallel(input_layouts" in repr(both.down)


@check(EVERY_WORLD)
@torch.no_grad()
def not_finite_rows(mesh: DeviceMesh, folder: Path) -> None:
    """A NaN or inf on one rank poisons its row on all, and no other."""
    for dtype, fmt in itertools.product(DTYPES, (tersor.Int8Dynamic(), tersor.Int8Static(0.03))):
        model = layer(192, 96, fmt).to(dtype)
        x = torch.randn(9, 192).to(dtype)
        x[0, 0], x[1, -1], x[2, 0], x[3, -1] = torch.nan, torch.nan, torch.inf, -torch.inf
        x[4, 0], x[4, -1] = torch.inf, torch.nan
        x[5, 0], x[5, -1] = torch.nan, -torch.inf
        want = model.l(x)
        assert want[:6].isnan().all()
        assert want[6:].isfinite().all()
        assert_equal(split(model, mesh, l=RowwiseParallel()).l(shard(x, mesh)), want)
        assert_equal(split(model, mesh, l=ColwiseParallel()).l(x), shard(want, mesh))


@check(EVERY_WORLD)
def gradients(mesh: DeviceMesh, folder: Path) -> None:
    """Of x and bias, against one process. The sums run in another order: 2 eps for each of the terms of a dot product."""
    eps, sizes = EPS[torch.float32], (96, 192, 96)
    model = Mlp(sizes, nn.ReLU(), tersor.Int8Dynamic())
    parallel = split(model, mesh)
    x, seed = torch.randn(2, 5, 96), torch.randn(2, 5, 96)

    whole = x.clone().requires_grad_()
    model(whole).backward(seed)
    mine = x.clone().requires_grad_()
    parallel(mine).backward(seed)
    w_up, w_down = model.up.dequantize().weight.abs(), model.down.dequantize().weight.abs()
    hidden_bound = 2 * eps * (sizes[2] + 4) * (seed.abs() @ w_down)
    bound = hidden_bound @ w_up + 2 * eps * (sizes[1] + 4) * (seed.abs() @ w_down @ w_up)
    assert_within(mine.grad, whole.grad, bound.detach())
    assert_equal(parallel.down.bias.grad.full_tensor(), model.down.bias.grad)  # whole on every rank: the same sum
    assert_within(
        parallel.up.bias.grad.full_tensor(),
        model.up.bias.grad,
        (hidden_bound.sum((0, 1)) + 20 * eps * (seed.abs() @ w_down).sum((0, 1))).detach(),
    )

    # the row-parallel layer alone: grad_x of a rank is its slice
    mine, whole = shard(x, mesh).clone().requires_grad_(), x.clone().requires_grad_()
    one = layer(96, 96)
    split(one, mesh, l=RowwiseParallel()).l(mine).backward(seed)
    one.l(whole).backward(seed)
    bound = 2 * eps * 100 * (seed.abs() @ one.l.dequantize().weight.abs())
    assert_within(mine.grad, shard(whole.grad, mesh), shard(bound, mesh).detach())

    # a frozen bias, or none, gets no gradient, and nothing that needs one makes y need one
    one.l.bias.requires_grad_(False)
    assert not split(one, mesh, l=RowwiseParallel()).l(shard(x, mesh)).requires_grad
    split(layer(96, 96, bias=False), mesh, l=ColwiseParallel()).l(x.clone().requires_grad_()).sum().backward()


@check(EVERY_WORLD)
@torch.no_grad()
def weight_only_within_bound(mesh: DeviceMesh, folder: Path) -> None:
    """Class F: |error| <= 2 (K + 4) eps sum_k |x w|, once for either side, and a last rounding in the dtype of x."""
    eps = EPS[torch.float32]
    for dtype in DTYPES:
        model = layer(192, 96, tersor.Int8WeightOnly()).to(dtype)
        x = torch.randn(7, 192).to(dtype)
        want = reference(model.l, x)
        weight = ops.to_rows(model.l.weight_packed, 96, 192).float() * model.l.weight_scale.unsqueeze(1)
        size = x.float().abs() @ weight.abs().t() + model.l.bias.float().abs()
        bound = 4 * 196 * eps * size + (2 * EPS[dtype] * size if dtype != torch.float32 else 0)
        assert_within(split(model, mesh, l=RowwiseParallel()).l(shard(x, mesh)), want, bound)
        assert_within(split(model, mesh, l=ColwiseParallel()).l(x), shard(want, mesh), shard(bound, mesh))


@check(EVERY_WORLD)
@torch.no_grad()
def casts_and_autocast(mesh: DeviceMesh, folder: Path) -> None:
    model = Mlp((96, 192, 96), nn.ReLU(), tersor.Int8Dynamic())
    parallel = split(model, mesh)
    x = torch.randn(5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        y = parallel(x)
        assert y.dtype == torch.bfloat16
        assert_equal(y, model(x))
        hidden = torch.randn(5, 192)
        assert_equal(parallel.down(shard(hidden, mesh)), model.down(hidden))  # float32 in, bfloat16 out
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        parallel.to(dtype)
        model.to(dtype)
        if dtype != torch.float64:
            assert_equal(parallel(x.to(dtype)), model(x.to(dtype)))
    assert parallel.up.weight_scale.dtype == torch.float32


@check(EVERY_WORLD)
def state_and_checkpoint(mesh: DeviceMesh, folder: Path) -> None:
    """Names, sizes and tags are those of one process; torch's own distributed checkpoints store and load the DTensors."""
    world = mesh.size()
    model = Mlp((96, 192, 96), nn.ReLU(), tersor.Int8Dynamic())
    parallel = split(model, mesh)
    up, down = parallel.up, parallel.down
    assert up.weight_packed.to_local().shape == (12 // world, 24, 64)
    assert up.weight_scale.to_local().shape == up.bias.to_local().shape == (192 // world,)
    assert down.weight_packed.to_local().shape == (6, 48 // world, 64)
    assert down.weight_scale.to_local().shape == down.bias.to_local().shape == (96,)
    assert not up.weight_packed.requires_grad
    assert up.bias.requires_grad
    assert [name for name, _ in parallel.named_parameters()] == [name for name, _ in model.named_parameters()]

    state = model.state_dict()
    full = get_model_state_dict(parallel, options=StateDictOptions(full_state_dict=True))
    assert full.keys() == state.keys()
    for name, value in full.items():
        assert_equal(value, state[name])

    # saved by all ranks, loaded by a model of one process and by another split, made without weights
    dcp.save(parallel.state_dict(), checkpoint_id=folder / "checkpoint")
    one = Mlp((96, 192, 96), nn.ReLU(), tersor.Int8Dynamic())
    loaded = one.state_dict()
    dcp.load(loaded, checkpoint_id=folder / "checkpoint", no_dist=True)
    one.load_state_dict(loaded)
    with torch.device("meta"):
        bare = Mlp((96, 192, 96), nn.ReLU(), tersor.Int8Dynamic())
    rows = {"up": RowwiseParallel(input_layouts=Replicate()), "down": RowwiseParallel(input_layouts=Replicate())}
    bare = parallelize_module(bare, mesh, rows)
    bare.to_empty(device="cpu")
    loaded = bare.state_dict()
    dcp.load(loaded, checkpoint_id=folder / "checkpoint")
    bare.load_state_dict(loaded)
    x = torch.randn(5, 96)
    with torch.no_grad():
        assert_equal(one(x), model(x))
        assert_equal(bare(x), model(x))


@check(EVERY_WORLD)
def source_rank(mesh: DeviceMesh, folder: Path) -> None:
    """As with torch's styles rank 0 has the say; with src_data_rank=None each rank cuts its own copy."""
    torch.manual_seed(mesh.get_rank())
    model = layer(96, 96)
    parallel = parallelize_module(copy.deepcopy(model), mesh, {"l": ColwiseParallel()})
    torch.manual_seed(0)
    assert_equal(parallel.l.weight_packed.full_tensor(), layer(96, 96).l.weight_packed)
    parallel = parallelize_module(copy.deepcopy(model), mesh, {"l": ColwiseParallel()}, src_data_rank=None)
    assert_equal(parallel.l.weight_packed.to_local(), shard(model.l.weight_packed, mesh, 0))


class Unsplittable(Format):
    """Stands for a format whose tensors do not follow N or K."""

    tag: ClassVar[str] = "sparse-int8"
    op = ops.linear_dynamic

    def tensors(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("values", torch.uint8, (n * k // 2,), True, 0),)


@check(EVERY_WORLD)
def errors(mesh: DeviceMesh, folder: Path) -> None:
    world = mesh.size()
    unit = 16 * world
    for style, name, model in (
        (ColwiseParallel(), "out_features", layer(96, 5 * unit + 16)),
        (RowwiseParallel(), "in_features", layer(5 * unit + 16, 96)),
    ):
        before = {key: value.clone() for key, value in model.l.named_parameters()}
        fits = (str(5 * unit), str(6 * unit), f"{name}={5 * unit + 16} fits")
        expect(ValueError, type(style).__name__, *fits, call=lambda s=style, m=model: parallelize_module(m, mesh, {"l": s}))
        assert type(model.l) is tersor.QuantLinear
        for key, value in model.l.named_parameters():
            assert_equal(value.detach(), before[key].detach())
    expect(ValueError, f"{unit}", "no number", call=lambda: parallelize_module(layer(96, 7), mesh, {"l": ColwiseParallel()}))

    sparse = tersor.QuantLinear(96, 96, format=Unsplittable())
    for style in (ColwiseParallel(), RowwiseParallel()):
        expect(ValueError, "Unsplittable", "int8-dynamic", call=lambda s=style: parallelize_module(sparse, mesh, s))
        float_layer = nn.Linear(96, 96)
        expect(TypeError, "Linear", "torch.distributed", call=lambda s=style, f=float_layer: parallelize_module(f, mesh, s))
    grid = init_device_mesh("cpu", (world, 1), mesh_dim_names=("tp", "dp"))
    expect(ValueError, "2 dimensions", call=lambda: parallelize_module(layer(96, 96), grid, {"l": ColwiseParallel()}))

    parallel = split(layer(96, 96), mesh, l=RowwiseParallel())
    expect(TypeError, "once", call=lambda: parallelize_module(parallel, mesh, {"l": RowwiseParallel()}))
    expect(ValueError, "[..., 96]", "input_layouts", call=lambda: parallel.l(torch.randn(3, 96)))  # whole x, a slice was due
    expect(ValueError, "dequantize", call=lambda: tersor.dequantize_(parallel))
    column = split(layer(96, 96), mesh, l=ColwiseParallel())
    expect(ValueError, "[..., 96]", call=lambda: column.l(torch.randn(3, 48)))


# ---- data parallel: an adapter is trained on frozen int8 layers


class LoraLinear(nn.Module):
    """A frozen int8 layer and a trained update of rank 4."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.base = tersor.QuantLinear.from_linear(nn.Linear(k, n)).requires_grad_(False)
        self.down = nn.Linear(k, 4, bias=False)
        self.up = nn.Linear(4, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted() -> nn.Module:
    # 48 channels are 3 tiles: FSDP2 gives rank 0 two of them
    return nn.Sequential(LoraLinear(64, 48), nn.ReLU(), LoraLinear(48, 64))


def train_step(model: nn.Module, x: Tensor, target: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    nn.functional.mse_loss(model(x), target).backward()
    optimizer.step()


class Sent(TorchDispatchMode):
    """Counts what goes to the process group, from C++ too: (operation, dtype, elements) of each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            flat = torch.utils._pytree.tree_leaves((args, kwargs))
            self.calls += [(func._opname, t.dtype, t.numel()) for t in flat if isinstance(t, Tensor)]
        return func(*args, **(kwargs or {}))

    def elements(self, operation: str) -> int:
        return sum(n for name, _, n in self.calls if operation in name)


def one_process_step() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """(model before the step, after it, x, target)"""
    before = adapted()
    x, target = torch.randn(8, 64), torch.randn(8, 64)
    after = copy.deepcopy(before)
    train_step(after, x, target)
    return before, after, x, target


def assert_trained(model: nn.Module, before: nn.Module, after: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        y, want = model(x), after(x)
        assert (want - before(x)).abs().max() > 1e-2  # the step is no small matter
        # Gradients differ in the last bits (half batches, averaged); no quantised value of this seed lies on the edge.
        assert (y - want).abs().max() <= 1e-5


@check(TWO_RANKS)
def ddp(mesh: DeviceMesh, folder: Path) -> None:
    before, after, x, target = one_process_step()
    model = DistributedDataParallel(copy.deepcopy(before))
    with Sent() as sent:
        train_step(model, shard(x, mesh, 0), shard(target, mesh, 0))
    assert sent.elements("allreduce") == sum(p.numel() for p in before.parameters() if p.requires_grad)  # the counter sees C++
    assert sent.elements("broadcast") == 48 + 64  # the weight_scale of the two layers, and nothing else
    assert {dtype for _, dtype, _ in sent.calls} == {torch.float32}
    limit = sum(q.out_features + q.in_features for q in before.modules() if isinstance(q, tersor.QuantLinear))
    assert all(n <= limit for name, _, n in sent.calls if "broadcast" in name)
    assert_trained(model, before, after, x)


@check(TWO_RANKS)
def fsdp2(mesh: DeviceMesh, folder: Path) -> None:
    before, after, x, target = one_process_step()
    model = copy.deepcopy(before)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    rank = mesh.get_rank()
    for part, tiles in ((model[0], (2, 1)), (model[2], (2, 2))):
        packed = part.base.weight_packed
        assert packed.placements == (Shard(0),)
        assert packed.to_local().dtype == torch.uint8
        assert packed.to_local().shape == (tiles[rank], *packed.shape[1:])  # whole n tiles, even where 3 go to 2 ranks
        assert isinstance(part.base, tersor.QuantLinear)
    train_step(model, shard(x, mesh, 0), shard(target, mesh, 0))
    assert_trained(model, before, after, x)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, value in full.items():
        if "base" in name:
            assert_equal(value, after.state_dict()[name])


@check(TWO_RANKS)
@torch.no_grad()
def fsdp2_sparse(mesh: DeviceMesh, folder: Path) -> None:
    """Stored tensors of sparse layers are sharded wherever they are long, and gathered whole."""
    linear = nn.Linear(64, 48)
    linear.weight[torch.rand(linear.weight.shape) < 0.9] = 0
    for fmt in (tersor.SparseInt8(), tersor.SparseFloat()):
        before = nn.Sequential(tersor.QuantLinear.from_linear(linear, fmt))
        model = fully_shard(copy.deepcopy(before), mesh=mesh)
        assert model[0].weight_packed.to_local().numel() < before[0].weight_packed.numel()
        x = torch.randn(8, 64)
        assert_equal(model(x), before(x))


@check(TWO_RANKS)
@torch.no_grad()
def fsdp2_mixed_precision(mesh: DeviceMesh, folder: Path) -> None:
    """param_dtype casts the float parameters and leaves tiles and scales alone."""
    before = adapted()
    model = copy.deepcopy(before)
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x = torch.randn(8, 64)
    y = model(x)
    assert y.dtype == torch.bfloat16
    assert_equal(y, before.to(torch.bfloat16)(x.to(torch.bfloat16)))


@check(TWO_RANKS)
def tensor_parallel_then_compile(mesh: DeviceMesh, folder: Path) -> None:
    model = Mlp((96, 192, 96), nn.ReLU(), tersor.Int8Dynamic()).requires_grad_(False)
    parallel = split(model, mesh)
    compiled = torch.compile(parallel, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 96)
    assert_equal(compiled(x), model(x))
