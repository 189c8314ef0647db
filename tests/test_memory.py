"""What a call takes: the output from torch's allocator, and scratch of at most 4 MiB a thread."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tersor
from tersor.bench.our_formats import our_formats
from tersor.ops.linear_sparse_float import MAX_K as MAX_FLOAT_K

pytestmark = pytest.mark.native


@pytest.mark.parametrize("name", our_formats())
@pytest.mark.parametrize("m", [1, 7, 200])
def test_a_call_allocates_its_output_and_nothing_else(name: str, m: int):
    layer, x = tersor.QuantLinear.from_linear(nn.Linear(256, 200), our_formats()[name]), torch.randn(m, 256)
    with torch.inference_mode():
        layer(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            kept = layer(x)
    sizes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sizes == [kept.numel() * 4]


WORKER = """
import ctypes, sys, torch
from torch import nn
import tersor
from tersor.bench.our_formats import our_formats

def kib(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))

name, k = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.set_grad_enabled(False)
fmt = our_formats()[name]
tersor.QuantLinear.from_linear(nn.Linear(128, 16), fmt)(torch.ones(2, 128))  # libraries are loaded
layer, x = tersor.QuantLinear.from_linear(nn.Linear(k, 16), fmt), torch.ones(64, k)
ctypes.CDLL(None).malloc_trim(0)  # or scratch may lie where something else lay before
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = kib("VmRSS")
layer(x)
print(kib("VmHWM") - before)
"""


# Formats that lay out their scratch each in its own way; each is a process of its own, so the others wait for make test-full.
DISTINCT = ("int8-dynamic", "int4-g32", "ternary", "binary-xnor", "sparse-int8", "sparse-float")


# 64 rows of the longest K as int8 are 8 MiB, as float32 33.
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc to give back what is free, and reads /proc")
@pytest.mark.parametrize(
    "name", [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow) for name in our_formats()]
)
@pytest.mark.parametrize("k", [pytest.param(4096, marks=pytest.mark.slow), 132096])
def test_scratch_is_bounded(name: str, k: int):
    if isinstance(our_formats()[name], tersor.SparseFloat):
        k = min(k, MAX_FLOAT_K)
    command = [sys.executable, "-c", WORKER, name, str(k)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown <= 4096 + 512  # KiB; the output, first use of code and of the allocator
