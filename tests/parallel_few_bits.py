"""Tensor parallelism of the formats of few bits, each check in every process of a group (see parallel_common.py)."""

from __future__ import annotations

from pathlib import Path

import torch
from cases import EPS, assert_equal, assert_within
from parallel_common import DTYPES, EVERY_WORLD, Mlp, check, expect, layer, shard, split
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import tersor
from tersor.parallel import ColwiseParallel, RowwiseParallel


@check(EVERY_WORLD)
def few_bits(mesh: DeviceMesh, folder: Path) -> None:
    x = torch.randn(7, 192)
    for fmt in (tersor.Int4(), tersor.Ternary(), tersor.Ternary("tensor"), tersor.Binary(), tersor.Int4(32), tersor.Int4(64)):
        model = Mlp((192, 384, 192), nn.ReLU(), fmt)
        parallel = split(model, mesh)
        for dtype in DTYPES:
            model.to(dtype), parallel.to(dtype)
            ours, whole = x.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()
            y, want = parallel(ours), model(whole)
            if fmt.tag == "int4" and fmt.group_size:
                hidden = model.act(model.up(x.to(dtype))).detach()
                assert_equal(model.act(parallel.up(x.to(dtype))).detach(), shard(hidden, mesh))
                # The sum over groups in another order: 2 G + 2 roundings of the sum of magnitudes each way, then the store.
                size = hidden.double().abs() @ model.down.dequantize().weight.double().abs().t()
                groups = 384 // fmt.group_size
                bound = 2 * (2 * groups + 2) * EPS[torch.float32] * 1.02 * size + 2 * EPS[dtype] * want.detach().double().abs()
                assert_within(y.detach(), want.detach(), bound + 1e-6)
            else:
                assert_equal(y.detach(), want.detach())
            if dtype == torch.float32:
                y.square().sum().backward()
                want.square().sum().backward()
                assert_within(ours.grad, whole.grad, 1e-4 * whole.grad.abs().max().item())
    rows = torch.randn(6, 384)
    rows[1, 3], rows[2, -1] = torch.nan, torch.inf
    y = split(layer(384, 192, tersor.Int4(32)), mesh, l=RowwiseParallel()).l(shard(rows, mesh))
    assert y[1:3].isnan().all() and not y[[0, 3, 4, 5]].isnan().any()

    signs = layer(384, 192, tersor.BinaryXnor())
    signs.l.threshold.uniform_(-0.5, 0.5)
    column = split(signs, mesh, l=ColwiseParallel())
    assert_equal(column.l(rows).detach(), shard(signs.l(rows), mesh).detach())
    assert_equal(column.l.threshold.full_tensor(), signs.l.threshold)
    expect(ValueError, "RowwiseParallel: BinaryXnor()", "ColwiseParallel can", call=lambda: split(signs, mesh, l=RowwiseParallel()))
    # whole groups only: a multiple of the 16 of a tile is not enough
    wrong = layer(32 * mesh.size() + 32, 96, tersor.Int4(32))
    expect(ValueError, "in_features", f"{32 * mesh.size()}", call=lambda: split(wrong, mesh, l=RowwiseParallel()))
