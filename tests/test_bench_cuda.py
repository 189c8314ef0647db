"""`tersor bench cuda` with a stand-in for the GPU: its events are this machine's clock, its graphs are calls. What the real one does
with them only a GPU can show."""

import csv
import math
import time

import pytest
import torch
from click.testing import CliRunner

from tersor.bench import cuda as bench
from tersor.bench.layers import KERNEL, OURS
from tersor.cli import main


class Event:
    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


class Cpu(bench.Gpu):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.device, self.name, self.l2_bytes = torch.device("cpu"), "NVIDIA H100 80GB HBM3", 1 << 10
        self.captures = self.waits = 0

    def event(self) -> Event:
        return Event()

    def synchronize(self) -> None:
        self.waits += 1

    def captured(self, f):
        self.captures += 1
        f()
        return f


@pytest.fixture
def gpu(monkeypatch) -> Cpu:
    made = Cpu()
    monkeypatch.setattr(bench, "Gpu", lambda: made)
    return made


def test_every_contender_is_measured(gpu):
    run = bench.CudaBench(((64, 48),), (1, 32), against=("bf16", "int-mm"), rounds=3, seconds=1e-4)
    rows = list(run.run(gpu))
    names = {m: [r.name for r in rows if r.m == m] for m in (1, 32)}
    assert names[32][0] == "bf16"
    assert {"int-mm", OURS, KERNEL} <= set(names[32])
    assert "int-mm" not in names[1]
    assert "int-mm: torch._int_mm takes M above 16 and multiples of 8" in run.skipped
    assert gpu.captures == len(rows)
    for r in rows:
        assert 0 < r.hot.best <= r.hot.median
        assert 0 < r.cold.best <= r.cold.median
        macs, weights = r.m * 64 * 48, {"bf16": 2, "int-mm": 1}.get(r.name, 0) * 64 * 48
        assert math.isclose(r.tmacs, macs / r.cold.best / 1e12)
        if weights:
            assert math.isclose(r.gbytes, (weights + r.m * (64 + 48) * 2) / r.cold.best / 1e9)
        assert r.limited_by == "memory"  # a tiny layer
        assert math.isclose(r.of_limit, r.gbytes / 3350)
    for m in (1, 32):
        first = next(r for r in rows if r.m == m)
        assert first.ratio == 1


def test_torchao_is_a_contender(gpu):
    pytest.importorskip("torchao")
    run = bench.CudaBench(((64, 48),), (1, 32), against=("torchao",), rounds=3, seconds=1e-4)
    with torch.compiler.set_stance("force_eager"):  # on a GPU it is compiled; a compiler for this CPU is not what is tested
        rows = list(run.run(gpu))
    assert run.skipped == []
    assert [(r.m, r.name) for r in rows if r.name == "torchao"] == [(1, "torchao"), (32, "torchao")]


def test_a_gpu_out_of_the_table_has_no_percentages(gpu):
    gpu.name = "a GPU of tomorrow"
    rows = list(bench.CudaBench(((64, 48),), (1,), against=(), rounds=3, seconds=1e-4).run(gpu))
    assert {r.limited_by for r in rows} == {"not in the table"}
    assert all(math.isnan(r.of_limit) for r in rows)


def test_the_flusher_covers_the_l2_and_runs_before_each_cold_call(gpu, monkeypatch):
    gpu.l2_bytes = 3 << 20
    clock = bench.Clock(gpu)
    assert clock.flusher.numel() == 6 << 20
    order = []
    monkeypatch.setattr(clock, "flush", lambda: order.append("flush"))
    clock.hot_and_cold({"a": lambda: order.append("a")}, rounds=2, seconds=1e-9)
    assert order == ["a"] * 3 + ["a", "flush", "a"] * 2


def test_a_rival_that_is_wrong_or_fails_is_left_out(gpu, monkeypatch):
    def wrong(linear, x):
        return lambda x: torch.zeros(x.shape[0], linear.out_features)

    def fails(linear, x):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(bench, "RIVALS", {"wrong": bench.Rival(wrong, "int8", 1), "fails": bench.Rival(fails, "int8", 1)})
    run = bench.CudaBench(((64, 48),), (32,), against=("wrong", "fails"), rounds=3, seconds=1e-4)
    assert {r.name for r in run.run(gpu)} == {OURS, KERNEL}
    assert run.skipped == ["wrong: its result is off by 1.00, expected up to 0.1", "fails: RuntimeError: no such kernel"]
    with pytest.raises(ValueError, match="unknown contender 'nobody'"):
        list(bench.CudaBench(((64, 48),), against=("nobody",)).run(gpu))


def test_the_command(gpu, tmp_path):
    path = tmp_path / "rows.csv"
    arguments = [
        "bench",
        "cuda",
        "--m",
        "32",
        "--k",
        "64",
        "--n",
        "48",
        "--rounds",
        "3",
        "--format",
        "ternary",
        "--against",
        "bf16",
        "--csv",
        str(path),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "NVIDIA H100 80GB HBM3, bfloat16 in and out, ternary" in result.output
    assert "| 64 x 48 | 32 | tersor |" in result.output
    rows = list(csv.DictReader(path.open()))
    assert {"bf16", OURS} <= {row["contender"] for row in rows}
    assert set(rows[0]) == set(bench.CudaRow.to_dict(next(iter(bench.CudaBench(((8, 8),), (1,), against=()).run(gpu)))))


def test_without_a_gpu_it_says_why():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(main, ["bench", "cuda"])
    assert result.exit_code != 0
    assert "tersor bench cuda: torch" in result.output
