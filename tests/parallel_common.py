"""What the checks in several processes share: how they are found and run, layers, and comparisons with one process."""

from __future__ import annotations

import copy
import datetime
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import tersor
from tersor.formats import Format
from tersor.parallel import ColwiseParallel, RowwiseParallel

EVERY_WORLD: list[str] = []
TWO_RANKS: list[str] = []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


CHECKS: dict[str, Callable[..., None]] = {}


def check(names: list[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(f: Callable[..., None]) -> Callable[..., None]:
        names.append(f.__name__)
        CHECKS[f.__name__] = f
        return f

    return add


def run(rank: int, world: int, folder: str, names: list[str]) -> None:
    """Runs the checks in turn; folder/<rank>.json says which passed. Stops at a failure: the ranks may be out of step."""
    import parallel_few_bits  # noqa: F401  they fill CHECKS
    import parallel_workers  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=20)
    )
    mesh = init_device_mesh("cpu", (world,))
    results = {}
    for name in names:
        torch.manual_seed(0)
        try:
            CHECKS[name](mesh, Path(folder))
            results[name] = "ok"
        except Exception:
            results[name] = f"rank {rank}:\n{traceback.format_exc()}"
            break
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


# ---- layers, and the one process they are compared with


class Mlp(nn.Module):
    def __init__(self, sizes: tuple[int, int, int], act: nn.Module, fmt: Format, bias: bool = True) -> None:
        super().__init__()
        self.up = tersor.QuantLinear.from_linear(nn.Linear(sizes[0], sizes[1], bias=bias), fmt)
        self.act = act
        self.down = tersor.QuantLinear.from_linear(nn.Linear(sizes[1], sizes[2], bias=bias), fmt)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def split(model: nn.Module, mesh: DeviceMesh, **plan: Any) -> nn.Module:
    """A copy of the model, split over the mesh."""
    return parallelize_module(copy.deepcopy(model), mesh, plan or {"up": ColwiseParallel(), "down": RowwiseParallel()})


def layer(k: int, n: int, fmt: Format | None = None, bias: bool = True) -> nn.Module:
    return nn.ModuleDict({"l": tersor.QuantLinear.from_linear(nn.Linear(k, n, bias=bias), fmt)})


def reference(q: tersor.QuantLinear, x: Tensor) -> Tensor:
    """The layer in plain torch, without any kernel."""
    return q.format.op.reference(x, q.weight_packed, q.weight_scale, q.bias)


def shard(x: Tensor, mesh: DeviceMesh, dim: int = -1) -> Tensor:
    return x.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def expect(kind: type[Exception], *parts: str, call: Callable[[], Any]) -> None:
    message = None
    try:
        call()
    except kind as error:
        message = str(error)
    assert message is not None, f"no {kind.__name__}"
    assert not [part for part in parts if part not in message], message
