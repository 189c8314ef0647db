"""Many Python threads on one layer, other processes, and what a fork leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from cases import EPS, FORMATS, assert_equal, assert_within
from torch import nn

import tersor

ROWS = (1, 7, 40, 130)  # one piece, split along N, split along M, several blocks
K, N = 512, 300


def layer_and_inputs(fmt: tersor.formats.Format | None = None) -> tuple[tersor.QuantLinear, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    return tersor.QuantLinear.from_linear(nn.Linear(K, N), fmt), [torch.randn(m, K, generator=g) for m in ROWS]


@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_threads_share_a_layer_while_another_changes_the_thread_count(fmt: tersor.formats.Format):
    layer, inputs = layer_and_inputs(fmt)
    weight = layer.dequantize().weight.double().abs()
    with torch.no_grad():
        want = [layer(x) for x in inputs]
    # Class F: another split may sum in another order, K + 4 roundings each way of the sum of magnitudes. Class E: no difference.
    bounds = [2 * (K + 4) * EPS[torch.float32] * (x.double().abs() @ weight.t() + 1) for x in inputs]
    stop = threading.Event()

    def change_thread_counts() -> int:
        changes = 0
        while not stop.is_set():
            torch.set_num_threads(1 + changes % 3)
            changes += 1
        return changes

    def work(worker: int) -> None:
        with torch.no_grad():
            for i in range(100):
                at = (worker + i) % len(inputs)
                y = layer(inputs[at])
                if fmt != tersor.Int8WeightOnly():
                    assert_equal(y, want[at])
                else:
                    assert_within(y, want[at], bounds[at])

    with ThreadPoolExecutor(7) as pool:
        changer = pool.submit(change_thread_counts)
        workers = [pool.submit(work, i) for i in range(6)]
        try:
            for worker in workers:
                worker.result(timeout=120)
        finally:
            stop.set()
        assert changer.result() > 10


def use_in_child(layer: tersor.QuantLinear, x: torch.Tensor, results) -> None:
    """Body of a spawned process: unpickling the layer is what imports tersor there."""
    torch.set_num_threads(1)
    with torch.no_grad():
        results.put(layer(x).numpy().tobytes())
        layer.bias.fill_(2.0)


def test_spawned_process_uses_and_shares_the_layer():
    layer, (_, x, *_) = layer_and_inputs()
    with torch.no_grad():
        want = layer(x)
    assert layer.share_memory() is layer
    assert all(t.is_shared() for t in [*layer.parameters(), *layer.buffers()])
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=use_in_child, args=(layer, x, results))
    child.start()
    try:
        assert results.get() == want.numpy().tobytes()
    finally:
        child.join(60)
    assert child.exitcode == 0
    assert_equal(layer.bias.detach(), torch.full((N,), 2.0))  # the child wrote into the parent's memory


# As torch.utils.data.DataLoader does it: fork, then one thread in the child.
FORK = """
import os, torch, tersor
layer = tersor.QuantLinear.from_linear(torch.nn.Linear(512, 512))
x = torch.randn(64, 512)
torch.set_num_threads(2)
with torch.no_grad():
    want = layer(x)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(layer(x), want) else 3)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_process_works_on_one_thread():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=120, check=False).returncode == 0


def test_data_loader_workers():
    layer, (*_, x) = layer_and_inputs()
    with torch.no_grad():
        want = layer(x)
    loader = torch.utils.data.DataLoader(_Embedded(layer, x), batch_size=13, num_workers=2)
    assert_equal(torch.cat(list(loader)), want)


class _Embedded(torch.utils.data.Dataset):
    def __init__(self, layer: tersor.QuantLinear, x: torch.Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.layer(self.x[i])


def test_free_threaded_python_is_declared():
    """_torch is no Python extension at all; _numpy must say that it needs no GIL, or importing it would switch the GIL on."""
    source = Path(__file__).parents[1] / "csrc/bindings/numpy.cpp"
    assert re.search(r"PYBIND11_MODULE\(_numpy, m, py::mod_gil_not_used\(\)\)", source.read_text())


@pytest.mark.native
def test_numpy_functions_run_on_many_threads():
    """What that declaration promises: no state shared between calls. Without a GIL these calls would overlap."""
    import numpy as np

    import tersor.numpy as tn

    rng = np.random.default_rng(0)
    weights = tn.quantize_weight(rng.standard_normal((N, K), dtype=np.float32))
    inputs = [rng.standard_normal((m, K), dtype=np.float32) for m in ROWS]
    want = [tn.linear_dynamic(x, *weights) for x in inputs]

    def work(worker: int) -> bool:
        return all(np.array_equal(tn.linear_dynamic(inputs[i % 4], *weights), want[i % 4]) for i in range(worker, worker + 40))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
