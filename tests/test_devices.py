"""Devices without kernels run the references: what torch's dispatch table holds for each, and that it gives the right numbers."""

from __future__ import annotations

import pytest
import torch
from cases import Case, assert_equal
from test_ops import arguments

import tersor
import tersor.ops as ops

WITHOUT_KERNELS = ["MPS", "XPU", "HPU", "XLA", "IPU", "VE", "PrivateUse1", "PrivateUse2", "PrivateUse3"]


def first_dispatch(name: str, key: str) -> str:
    """What serves `key` in the op's computed table, as torch prints it."""
    table = torch._C._dispatch_dump_table(ops.OPS[name].raw.name())
    (line,) = [line for line in table.splitlines() if line.startswith(f"{key}:")]
    return line


@pytest.mark.parametrize("key", WITHOUT_KERNELS)
def test_every_op_is_its_reference_there(key: str):
    for name in ops.OPS:
        line = first_dispatch(name, key)
        # the Python function that is registered for every backend at once
        assert "_register.py" in line and "[default backend kernel]" in line, line


@pytest.mark.parametrize("key", WITHOUT_KERNELS)
@pytest.mark.parametrize("name", ops.OPS)
def test_the_table_runs_the_reference(name: str, key: str):
    """The kernel that the table has for the device, on CPU tensors: plain torch does not care where they are."""
    op = ops.OPS[name]
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments(name, Case(5, 37, 70).make())]
    want = (op.reference if not name.endswith("_differentiable") else ops.OPS[op.public_name].raw)(*args)
    with torch.no_grad():
        got = op.raw.redispatch(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)), *args)
    for g, w in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True):
        assert_equal(g, w)


def test_meta_gives_shapes():
    layer = tersor.QuantLinear.from_linear(torch.nn.Linear(70, 37)).to("meta")
    y = layer(torch.empty(2, 5, 70, device="meta"))
    assert (tuple(y.shape), y.device.type) == ((2, 5, 37), "meta")


def test_info_says_what_serves_each_device():
    devices = tersor.info().devices
    assert devices["cpu"] == ("native kernels" if ops.NATIVE else "the references, as plain torch")
    for key in ("mps", "xpu", "hpu", "xla", "privateuse", "others"):
        assert devices[key] == "the references, as plain torch"
    assert devices["cuda"].startswith("native kernels of" if ops.NATIVE_CUDA else "the references, as plain torch (")
    assert "s8 x s8 -> s32" in devices["jax"]
    assert devices["meta"] == "shapes only"
    for device, how in devices.items():
        assert f"{device:14s} {how}" in str(tersor.info())
