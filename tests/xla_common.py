"""torchax on JAX CPU for the tests: starts JAX with four devices, and calls ops and models there. Needs the extra tersor[xla]."""

from __future__ import annotations

import os

import pytest
import torch

# Before JAX starts: four CPU devices for a mesh, and no search for a TPU's metadata.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
jax = pytest.importorskip("jax", reason="JAX is not installed: make test-xla installs it")
torchax = pytest.importorskip("torchax", reason="torchax is not installed: make test-xla installs it")

from tersor.backends import xla  # noqa: E402

JIT = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])


@pytest.fixture(scope="module")
def env():
    xla.register()
    return torchax.default_env()


def on_jax(env, args):
    with env:
        return [a.detach().to("jax") if isinstance(a, torch.Tensor) else a for a in args]


def called(env, op, args, jit: bool):
    """The op on JAX CPU, its results as CPU tensors."""
    given = on_jax(env, args)
    arrays = [a for a in given if isinstance(a, torch.Tensor)]

    def call(*arrays):
        rest = iter(arrays)
        return op(*(next(rest) if isinstance(a, torch.Tensor) else a for a in given))

    with env:
        out = (torchax.interop.jax_jit(call) if jit else call)(*arrays)
        return tuple(t.torch() for t in (out if isinstance(out, tuple) else (out,)))
