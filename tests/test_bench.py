"""`tersor bench`: its numbers are times, so the tests read structure, bounds that hold on any machine, and messages."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tersor
from tersor.bench import machine as machines
from tersor.bench import timing
from tersor.bench.layers import KERNEL, OURS, SHAPES, Bench, shapes_of_model
from tersor.bench.machine import Limits, Machine
from tersor.bench.our_formats import our_formats
from tersor.bench.peers import PEERS, Missing, Peer, as_tensor, expand, make_peer, peer, rivals
from tersor.bench.timing import Noise, hot_and_cold, interleaved
from tersor.cli import main

pytestmark = pytest.mark.native

LIMITS = Limits(1, 200.0, 50.0, 400.0, {"L1": 200.0, "L2": 100.0, "L3": 80.0, "DRAM": 30.0})
MACHINE = Machine("a cpu", "scalar", {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}, (LIMITS,))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache folder, with limits that cost no time to measure."""
    monkeypatch.setattr(machines, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(machines, "_SECONDS", 1e-4)
    monkeypatch.setattr(machines, "_REPEATS", 2)
    monkeypatch.setattr(machines, "_DRAM_BYTES", 8 << 20)
    monkeypatch.setattr(machines, "cache_sizes", lambda: {"L1": 32 << 10, "L2": 256 << 10, "L3": 1 << 20})
    return tmp_path / "cache"


def run(*args: str) -> str:
    result = CliRunner().invoke(main, ["bench", *args])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*args: str) -> str:
    result = CliRunner().invoke(main, ["bench", *args])
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_linear_measures_all_contenders_and_writes_them(cache: Path, tmp_path: Path):
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("csv", "json", "png")}
    text = run(
        *("linear", "--m", "1,5", "--k", "64", "--n", "48", "--rounds", "3", "--csv", str(outputs["csv"])),
        *("--json", str(outputs["json"]), "--plot", str(outputs["png"])),
    )
    rows = list(csv.DictReader(outputs["csv"].open()))
    data = json.loads(outputs["json"].read_text())
    assert [dict(row, **{k: str(v) for k, v in row.items()}) for row in data["rows"]] == rows
    names = {row["contender"] for row in rows}
    assert {"fp32", OURS, KERNEL} <= names
    assert len(rows) == 2 * len(names)
    for row in rows:
        seconds = float(row["min_us"]) * 1e-6
        macs = int(row["M"]) * 64 * 48
        assert 0 < seconds <= float(row["median_us"]) * 1e-6
        assert float(row["gmacs"]) == pytest.approx(macs / seconds / 1e9, rel=0.01, abs=0.01)
        assert row["contender"] in text
    assert [float(row["ratio"]) for row in rows if row["contender"] == "fp32"] == [1.0, 1.0]
    assert outputs["png"].read_bytes()[:4] == b"\x89PNG"


def test_percent_of_limit_follows_the_shape():
    bench = Bench(((256, 512),), (1, 64), rounds=3, seconds=0.001)
    rows = {(row.m, row.name): row for row in bench.run(MACHINE)}
    item, weights = 4, 256 * 512 + 4 * 512 + 4 * 512  # tiles, scales, bias
    one = rows[(1, OURS)]
    # 131 KiB of weights come from L2: 1.3 us at 100 GB/s, against 0.7 us of arithmetic at 200 GMAC/s
    moved = weights + item * (256 + 512)
    assert one.limited_by == "L2"
    assert one.of_limit == pytest.approx(moved / 100e9 / one.timing.best)
    many = rows[(64, OURS)]
    assert many.limited_by == "int8"
    assert many.of_limit == pytest.approx(64 * 256 * 512 / 200e9 / many.timing.best)
    assert rows[(64, "fp32")].limited_by == "f32"


ONE_OP = {"int4-g128": "Int4(group_size=128)", "int4-g64": "Int4(group_size=64)", "int4-g32": "Int4(group_size=32)"}
ONE_OP |= {"binary-xnor": "BinaryXnor()", "sparse-int8": "SparseInt8()", "sparse-float": "SparseFloat()"}


@pytest.mark.parametrize("name", our_formats())
def test_every_format_can_be_measured(cache: Path, name: str):
    text = run("linear", "--format", name, "--m", "2", "--k", "128", "--n", "16", "--against", "none", "--rounds", "3")
    said = f"skipped: tersor kernel: {ONE_OP.get(name)} is one op"
    assert (said in text) == (name in ONE_OP)
    assert ("tersor kernel │" in text) == (name not in ONE_OP)


def test_formats_of_ours_are_contenders():
    bench = Bench(((64, 64),), (1, 3), our_formats()["ternary"], against=("tersor-int8-dynamic", "tersor-int4-g32"), rounds=3)
    bench.seconds = 0.0005
    rows = {(row.m, row.name): row for row in bench.run(MACHINE)}
    for m in (1, 3):
        assert rows[(m, "tersor-int8-dynamic")].ratio == 1.0
        assert {name for rows_of, name in rows if rows_of == m} == {"tersor-int8-dynamic", "tersor-int4-g32", OURS, KERNEL}
        # bytes of what each stores: tiles, float32 scales and bias; groups have a float16 scale each
        for name, stored in (("tersor-int8-dynamic", 4096), (OURS, 1024), ("tersor-int4-g32", 2048 + 2 * 2 * 64)):
            row = rows[(m, name)]
            assert row.gbytes * row.timing.best * 1e9 == pytest.approx(stored + 8 * 64 + 4 * m * 128)
    assert expand(["tersor"]) == [f"tersor-{name}" for name in our_formats()]


def test_signs_count_against_the_popcount_limit():
    bench = Bench(((256, 512),), (64,), tersor.BinaryXnor(), against=("fp32",), rounds=3, seconds=0.001)
    row = next(row for row in bench.run(MACHINE) if row.name == OURS)
    assert row.limited_by == "popcount"
    assert row.of_limit == pytest.approx(64 * 256 * 512 / 400e9 / row.timing.best)


def test_weight_only_counts_float_arithmetic():
    bench = Bench(((64, 64),), (64,), tersor.Int8WeightOnly(), torch.bfloat16, rounds=3, seconds=0.001)
    rows = {row.name: row for row in bench.run(MACHINE)}
    assert rows[OURS].limited_by == "f32"
    assert rows[KERNEL].dtype == "bfloat16"


def test_machine_is_measured_once_and_kept(cache: Path, monkeypatch):
    text = run("machine")
    assert "int8 multiply-adds" in text
    assert "read DRAM" in text
    (file,) = cache.iterdir()
    kept = machines.load(tersor.info().kernels["limits"])
    assert kept is not None
    for limits in kept.limits:
        assert all(0 < value < 1e6 for value in (limits.int8, limits.f32, limits.popcount, *limits.read.values()))
    monkeypatch.setattr(machines, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert json.loads(run("machine", "--json"))["limits"][0]["threads"] == 1
    assert file.exists()


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"version": 1}', '{"version": 99}', "[" * 100_000, "\x00\xff"],
)
def test_malformed_cache_is_ignored(cache: Path, damage: str):
    machine = machines.this_machine()
    (file,) = cache.iterdir()
    file.write_text(damage, encoding="latin-1")
    assert machines.load(machine.isa) is None
    machines.this_machine()
    assert machines.load(machine.isa) is not None


@pytest.mark.parametrize("value", ["-1", "0", "1e999", '"fast"', "null", "NaN"])
def test_impossible_figures_in_the_cache_are_ignored(cache: Path, value: str):
    machine = machines.this_machine()
    (file,) = cache.iterdir()
    text = file.read_text()
    file.write_text(text.replace(f'"int8": {machine.limits[0].int8}', f'"int8": {value}'))
    assert file.read_text() != text
    assert machines.load(machine.isa) is None


@pytest.mark.parametrize("kind", ["read-only folder", "file in its place"])
def test_cache_that_cannot_be_written_costs_nothing_but_time(cache: Path, kind: str, monkeypatch):
    if kind == "file in its place":
        cache.write_text("")
    else:

        def no_space(*args, **kwargs):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr("tersor.json_files.tempfile.mkstemp", no_space)
    assert machines.this_machine().limits[0].int8 > 0
    assert not cache.is_dir() or not list(cache.iterdir())


def test_keeping_is_atomic(cache: Path, monkeypatch):
    machine = machines.this_machine()
    (file,) = cache.iterdir()
    before = file.read_bytes()

    def dies(*args, **kwargs):
        args[1].write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machines.json, "dump", dies)
    assert machines.keep(machine) is None
    assert file.read_bytes() == before
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("linear", "--m", "1,x"), "'1,x' is not a list of whole numbers such as 1,16,256"),
        (("linear", "--m", "0"), "'0' holds a number below 1"),
        (("linear", "--shapes", "gpt"), "'gpt', expected one of: minilm, bert, smollm, llama"),
        (("linear", "--format", "int3"), "'int3', expected one of: int8-dynamic"),
        (("linear", "--against", "blas"), "unknown contender 'blas', expected one of: quantize-dynamic, fp32"),
        (("linear", "--shapes", "bert", "--k", "64"), "exclude each other"),
        (("linear", "--model", "nowhere"), "model is 'nowhere', expected module:factory"),
        (("linear", "--model", "nowhere:f"), "model 'nowhere:f': No module named 'nowhere'"),
        (("linear", "--csv", "/no/such/folder/x.csv"), "'/no/such/folder/x.csv' cannot be written"),
        (("linear", "--json", "."), "'.' cannot be written"),
    ],
)
def test_wrong_options(cache: Path, args: tuple[str, ...], message: str):
    assert message in refused(*args)
    assert not cache.exists()  # refused before anything was measured


def test_shape_that_nothing_can_hold(cache: Path):
    assert "allocate" in refused("linear", "--m", "1", "--k", "99999999999", "--n", "4")
    assert "in_features=140000 is above 132104" in refused("linear", "--m", "1", "--k", "140000", "--n", "4")


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 24))


def test_shapes_come_from_presets_and_models(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert shapes_of_model("test_bench:build_model") == ((8, 24), (24, 8))
    with pytest.raises(ValueError, match="made list, expected an nn.Module"):
        shapes_of_model("builtins:list")
    assert SHAPES["bert"] == ((768, 768), (768, 3072), (3072, 768))


def test_missing_and_failing_peers_are_skipped_by_name():
    @peer("absent", limit="int8", package="no_such_package_at_all")
    def absent(linear, x):
        raise AssertionError("must not be called")

    @peer("broken", limit="int8")
    def broken(linear, x):
        raise RuntimeError("no kernel\nfor this")

    @peer("greedy", limit="int8")
    def greedy(linear, x):
        torch.set_num_threads(2)
        return lambda x: (torch.mm(big, big), linear(x))[1]

    big = torch.randn(700, 700)
    threads = torch.get_num_threads()
    try:
        bench = Bench(((16, 16),), (1,), against=("fp32", "absent", "broken"), rounds=3, seconds=0.0005)
        assert {row.name for row in bench.run(MACHINE)} == {"fp32", OURS, KERNEL}
        assert bench.skipped == ["absent: the package no_such_package_at_all is not installed", "broken: RuntimeError: no kernel"]
        torch.set_num_threads(1)
        make_peer("greedy", nn.Linear(4, 4), torch.randn(1, 4))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
        for name in ("absent", "broken", "greedy"):
            del PEERS[name]


@pytest.mark.parametrize(
    ("name", "bits", "run", "reason"),
    [
        ("skips-half", 8, lambda y: torch.cat([y[:, :32], torch.zeros_like(y[:, 32:])], 1), "its result is off by 0."),
        ("is-nan", 2, lambda y: y * torch.nan, "its result is off by nan"),
        ("other-shape", 4, lambda y: y[:, :63], r"its result is \[64, 63\], expected \[64, 64\]"),
        ("rounds", 8, lambda y: y.bfloat16(), None),
        ("as-array", 8, lambda y: QuietArray(y), None),
    ],
)
def test_wrong_results_are_skipped(name: str, bits: int, run: Callable, reason: str | None):
    @peer(name, limit="int8", bits=bits)
    def make(linear, x):
        return lambda x: run(linear(x))

    try:
        case = (name, nn.Linear(64, 64), torch.randn(64, 64))
        if reason is None:
            make_peer(*case)
        else:
            with pytest.raises(Missing, match=f"{name}: .*{reason}"), torch.no_grad():
                make_peer(*case)
    finally:
        del PEERS[name]


class QuietArray:
    """What some packages return: the numbers are a numpy array at .data."""

    def __init__(self, y: torch.Tensor) -> None:
        self.data = y.detach().numpy()


class Binding:
    """onnxruntime's: the outputs are copied on demand."""

    def copy_outputs_to_cpu(self) -> list:
        return [torch.ones(2).numpy()]


def test_outputs_of_all_kinds_are_read():
    assert as_tensor(Binding()).tolist() == [1, 1]
    assert as_tensor(QuietArray(torch.ones(2))).tolist() == [1, 1]


def test_rivals_are_of_the_same_width_and_group():
    for name, group in (("four", 0), ("four-g32", 32)):
        peer(name, limit="int8", bits=4, group=group)(lambda linear, x: linear)
    try:
        assert set(rivals(4)) >= {"four", "four-g32"}
        assert "four" not in rivals(4, 32)
        assert "four-g32" in rivals(4, 32)
        assert not any(name.startswith("tersor") for bits in (1, 2, 4, 8) for name in rivals(bits))
        assert "fp32" not in rivals(8)
    finally:
        del PEERS["four"], PEERS["four-g32"]


def test_bytes_of_a_peers_weights():
    def weight_bytes(bits: int, group: int = 0, item: int = 4) -> int:
        return Peer("", lambda linear, x: linear, "int8", bits=bits, group=group).weight_bytes(16, 64, item)

    assert weight_bytes(32) == 16 * 64 * 4
    assert weight_bytes(32, item=2) == 16 * 64 * 2
    assert weight_bytes(8) == 16 * 64 + 16 * 4
    assert weight_bytes(4, group=32) == 16 * 32 + 16 * 2 * 4
    assert weight_bytes(1) == 16 * 8 + 16 * 4


def test_engines_of_quantize_dynamic_are_one_name():
    names = expand(["fp32", "quantize-dynamic"])
    assert names[0] == "fp32"
    assert len(names) > 1
    assert all(name.startswith("quantize-dynamic-") for name in names[1:])
    with pytest.raises(Missing, match="takes float32 only"):
        make_peer(names[1], nn.Linear(8, 8), torch.randn(2, 8).bfloat16())


# ---- noise ----------------------------------------------------------------------------------------------------------------------

SPIN = "import time, os\nos.sched_setaffinity(0, {%d})\nend = time.time() + 20\nwhile time.time() < end: pass"


def work() -> None:
    total = 0
    for i in range(20_000):
        total += i


def measure_noise() -> Noise:
    noise = Noise()
    interleaved({"a": work, "b": work}, rounds=9, seconds=0.03, noise=noise)
    return noise


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin processes to cores")
def test_busy_neighbour_is_noticed():
    allowed = os.sched_getaffinity(0)
    core = max(allowed)
    os.sched_setaffinity(0, {core})
    try:
        neighbour = subprocess.Popen([sys.executable, "-c", SPIN % core])
        try:
            time.sleep(0.5)
            warning = measure_noise().warning()
        finally:
            neighbour.kill()
            neighbour.wait()
    finally:
        os.sched_setaffinity(0, allowed)
    assert warning is not None
    assert "other work had the core" in warning


class QuietMachine:
    """Clocks on which work takes exactly as long as it says: a quiet run, whatever the machine under the test does."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    thread_time = perf_counter

    def work(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run


def test_quiet_run_has_no_warning(monkeypatch):
    machine = QuietMachine()
    monkeypatch.setattr(timing, "time", machine)
    noise = Noise()
    times = interleaved({"a": machine.work(0.001), "b": machine.work(0.002)}, rounds=9, seconds=0.03, noise=noise)
    assert times["b"].best == pytest.approx(0.002)
    walls = [wall for wall, _ in noise.seconds.values()]
    assert len(walls) == 2
    assert all(9 * 0.028 <= wall <= 9 * 0.0301 for wall in walls)  # whole calls within the 0.03 s of a measurement
    assert noise.warning() is None
    # Where five rounds of nine take half as long again, the run has one. Three calls warm up, each round makes two.
    disturbed = Noise()
    seconds = iter([0.001] * 3 + ([0.0015] * 2 + [0.001] * 2) * 5)
    interleaved({"a": lambda: machine.work(next(seconds))()}, rounds=9, seconds=0.0, noise=disturbed)
    assert "rounds of the same work differ by 50%" in (disturbed.warning() or "")


def test_noise_reads_its_two_signs():
    noise = Noise()
    assert noise.warning() is None
    noise.add("ours", 1.0, 0.99)
    noise.add("computes on another thread", 1.0, 0.1)  # one odd contender is not the machine
    noise.spreads += [0.01, 0.02, 0.5]
    assert noise.warning() is None
    noise.add("ours", 1.0, 0.81)
    assert "other work had the core for 10% of the time" in (noise.warning() or "")
    drifting = Noise()
    drifting.add("ours", 1.0, 1.0)
    drifting.spreads += [0.3, 0.4, 0.01]
    assert "rounds of the same work differ by 30%" in (drifting.warning() or "")


def test_interleaved_calls_everyone_in_turn():
    calls: list[str] = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, seconds=0.0)
    assert set(times) == {"a", "b"}
    assert all(0 < t.best <= t.median and math.isfinite(t.median) for t in times.values())
    # a warm-up of three, then per round one call more than is timed; who begins alternates
    assert calls == list("aaabbb") + list("aabb" + "bbaa") * 2


def test_hot_calls_follow_each_other_and_cold_ones_an_eviction(monkeypatch):
    machine = QuietMachine()
    monkeypatch.setattr(timing, "time", machine)
    warm: set[str] = set()
    calls: list[str] = []

    def work(name: str) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            machine.now += 0.001 if name in warm else 0.004
            warm.add(name)

        return run

    def evict() -> None:
        machine.now += 1.0  # not part of any figure
        warm.clear()

    times = hot_and_cold({"a": work("a"), "b": work("b")}, evict, rounds=3, calls=5)
    assert calls == list("ab") + list("aaaaabbbbb") * 3
    for hot, cold in times.values():
        assert hot == pytest.approx((0.001, 0.001))
        assert cold == pytest.approx((0.004, 0.004))


FAULTS = """
import ctypes, resource, sys
from tersor.bench.timing import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_freed_memory()
found = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(20 << 20) for _ in range(4)]  # together above what glibc keeps by itself
    for block in blocks:
        ctypes.memset(block, 1, 20 << 20)
    for block in blocks:
        libc.free(block)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(found[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    if faults("leave") < 100:
        pytest.skip("this process keeps freed memory by itself: huge pages, or a malloc of its own")
    assert faults("keep") < 100
