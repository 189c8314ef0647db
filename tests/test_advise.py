"""advise(): predictions and limits against arithmetic written out by hand."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tersor
from tersor.advice import predict as predicting
from tersor.advice import recommend
from tersor.advice.hardware import HARDWARE, Hardware, gpu
from tersor.advice.predict import CallCost, Here, predict
from tersor.bench.machine import Limits, Machine
from tersor.bench.timing import Timing, torch_threads
from tersor.cli import main

# A machine of round figures: GMAC/s, GB/s.
LIMITS = Limits(1, 200.0, 50.0, 1000.0, {"L1": 400.0, "L2": 200.0, "L3": 100.0, "DRAM": 20.0})
MACHINE = Machine("a cpu", "scalar", {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}, (LIMITS,))
HERE = Here(MACHINE, LIMITS, CallCost(2e-6, 4e-6))
INT8 = tersor.Int8Dynamic()


# ---- one layer ------------------------------------------------------------------------------------------------------------------


def test_int8_with_many_rows_is_bound_by_arithmetic():
    t = predict(INT8, 1024, 1024, 512, HERE, traffic=8 << 20)
    compute = 512 * 1024 * 1024 / (200e9 * 0.94)
    read = (1024 * 1024 + 4 * 1024) / 100e9  # codes and scales, from L3
    passes = 512 * 2048 * 4 / 50e9
    assert t.seconds == pytest.approx(4e-6 + compute + read + passes, rel=1e-12)
    assert (t.call, t.compute, t.bandwidth) == pytest.approx((4e-6, compute, read + passes))
    assert t.bound == "compute"


def test_shares_follow_the_rows():
    for m, rows in ((1, 1 / 0.56), (4, 4 / 0.84), (7, 7 / 0.84), (16, 16 / 0.90)):
        t = predict(tersor.Int4(), 1024, 1024, m, HERE, traffic=8 << 20)
        assert t.compute == pytest.approx(rows * 1024 * 1024 / 200e9), m
    assert predict(tersor.BinaryXnor(), 1024, 1024, 64, HERE, traffic=1024).compute == pytest.approx(
        64 * 1024 * 1024 / (1000e9 * 0.72)
    )


def test_int8_with_one_row_is_bound_by_reading():
    t = predict(INT8, 2048, 1024, 1, HERE, traffic=100 << 20)
    read = (2048 * 1024 + 4 * 2048) / (20e9 * 0.9)  # below 4 MiB: not in huge pages
    assert t.bandwidth == pytest.approx(read + 3072 * 4 / 50e9)
    assert t.bound == "bandwidth"
    assert t.seconds == pytest.approx(t.call + t.bandwidth)  # the multiply-adds are done meanwhile
    assert t.compute > 0
    large = predict(INT8, 4096, 4096, 1, HERE, traffic=100 << 20)
    assert large.bandwidth == pytest.approx((4096 * 4096 + 4 * 4096) / 20e9 + 8192 * 4 / 50e9)
    hot = predict(INT8, 2048, 1024, 1, HERE, traffic=600 << 10)
    assert hot.bandwidth == pytest.approx((2048 * 1024 + 4 * 2048) / 200e9 + 3072 * 4 / 50e9)


def test_small_layers_are_bound_by_the_call():
    assert predict(INT8, 16, 16, 1, HERE, traffic=1024).bound == "overhead"
    assert predict(None, 16, 16, 1, HERE, traffic=1024).call == 2e-6


def test_the_float_layer():
    t = predict(None, 1024, 1024, 6, HERE, traffic=4 << 20)
    assert t.compute == pytest.approx(6 * 1024 * 1024 / (50e9 * 0.85 / 2))  # half of its share at 6 rows
    assert t.bandwidth == pytest.approx(4 * 1024 * 1024 / 100e9)
    one = predict(None, 1024, 1024, 1, HERE, traffic=4 << 20)
    assert one.bandwidth == pytest.approx(4 * 1024 * 1024 / (100e9 * 0.55))


def test_more_rows_never_take_less():
    for fmt in (*recommend.FORMATS, None):
        times = [predict(fmt, 768, 768, m, HERE, traffic=8 << 20).seconds for m in (1, 2, 4, 7, 8, 16, 64, 512)]
        assert times == sorted(times), fmt


def test_threads_cost_what_waking_them_costs():
    two = Limits(2, 400.0, 100.0, 2000.0, {level: 2 * rate for level, rate in LIMITS.read.items()})
    here = Here(MACHINE, two, CallCost(2e-6, 4e-6))
    one = predict(INT8, 1024, 1024, 512, HERE, traffic=8 << 20)
    t = predict(INT8, 1024, 1024, 512, here, traffic=8 << 20)
    assert t.seconds == pytest.approx(4e-6 + 3e-6 + (one.seconds - 4e-6) / 2)
    assert predict(INT8, 16, 16, 1, here, traffic=1024).call == 4e-6


def test_every_dense_format_has_a_prediction():
    from tersor.bench.our_formats import our_formats

    for name, fmt in our_formats().items():
        assert predicting.can_predict(fmt) == (not name.startswith("sparse")), name


def test_the_call_is_measured():
    cost = predicting.call_cost()
    assert 0 < cost.float_layer < 0.01
    assert 0 < cost.packed < 0.01


# ---- other hardware: three models by hand ---------------------------------------------------------------------------------------


def tower(sizes: list[int], device: str = "meta") -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(k, n, bias=False, device=device) for k, n in itertools.pairwise(sizes)))


def device(name: str) -> Hardware:
    return next(row for row in HARDWARE if name in row.name)


def device_named(name: str) -> Hardware:
    return next(row for row in HARDWARE if row.name == name)


def judged(model: nn.Module, m: int, fmt, name: str, latency: float | None = None):
    layers = [recommend.Called(fqn, layer, {m: 1}) for fqn, layer in model.named_modules() if type(layer) is nn.Linear]
    return recommend.hardware_advice(model, layers, fmt, device(name), latency)


def test_a_large_model_with_one_row_by_hand():
    # 7 layers of 32768 x 32768, one row: 7 * 2**30 weights; float 30.1 GB, int8 7.5 GB and 7 * 4 * 32768 bytes of scales
    model, weights = tower([32768] * 8), 7 * 2**30
    activations = 2 * 32768 * 4
    row = judged(model, 1, None, "T4")
    assert (row.fits, row.limited_by, row.memory) == (False, "memory", 4 * weights + activations)
    row = judged(model, 1, INT8, "T4", latency=0.02)
    assert (row.fits, row.limited_by, row.memory) == (True, "bandwidth", weights + 7 * 4 * 32768 + activations)
    assert row.seconds == pytest.approx((weights + 7 * (4 * 32768 + activations)) / 320e9)  # 23.5 ms
    assert row.meets_latency is False
    row = judged(model, 1, INT8, "A100", latency=0.02)
    assert row.seconds == pytest.approx((weights + 7 * (4 * 32768 + activations)) / 2039e9)  # 3.7 ms
    assert (row.limited_by, row.meets_latency) == ("bandwidth", True)
    assert judged(model, 1, None, "A100").fits
    assert not judged(model, 1, None, "L4").fits  # 30.1 of 24 GB
    assert not judged(model, 1, None, "v5e").fits


def test_a_model_with_many_rows_by_hand():
    # 12 layers of 4096 x 4096, 8192 rows: 2 * 12 * 8192 * 4096**2 = 3.3e12 operations
    model, operations = tower([4096] * 13), 2 * 12 * 8192 * 4096**2
    row = judged(model, 8192, INT8, "EPYC 9654")
    assert row.limited_by == "compute"
    assert row.seconds == pytest.approx(operations / (96 * 2.4e9 * 128))  # 112 ms at 29.5 TOPS
    row = judged(model, 8192, None, "Platinum 8280")
    assert row.limited_by == "compute"
    assert row.seconds == pytest.approx(operations / (28 * 2.7e9 * 64))
    # The H100's arithmetic takes 0.139 ms a layer at 1979 TOPS; x and y are 268 MB, which it reads in 0.085 ms.
    assert judged(model, 8192, INT8, "H100 SXM").limited_by == "compute"
    # An L4 reads 285 MB in 0.95 ms and computes 275 G operations in 1.13 ms.
    assert judged(model, 8192, INT8, "L4").limited_by == "compute"
    # A v5e chip: 393 TOPS, 0.70 ms; 819 GB/s, 0.35 ms
    row = judged(model, 8192, INT8, "v5e")
    assert row.seconds == pytest.approx(operations / 393e12)
    assert row.limited_by == "compute"
    assert row.memory == 12 * (4096 * 4096 + 4 * 4096) + 2 * 8192 * 4096 * 4


def test_a_mixed_model_by_hand():
    # A wide layer that is read and a batch that computes: 16384 x 512, then 512 x 512; 200 rows
    model = tower([16384, 512, 512])
    reads = [16384 * 512 + 4 * 512 + 200 * (16384 + 512) * 4, 512 * 512 + 4 * 512 + 200 * 1024 * 4]
    counts = [2 * 200 * 16384 * 512, 2 * 200 * 512 * 512]
    for name, bandwidth, rate in (
        ("E5-2699 v4", 4 * 2.4e9 * 8, 22 * 2.2e9 * 32),
        ("8480+", 8 * 4.8e9 * 8, 56 * 2.0e9 * 2048),
        ("T4", 320e9, 130e12),
    ):
        row = judged(model, 200, INT8, name)
        assert row.seconds == pytest.approx(sum(max(r / bandwidth, c / rate) for r, c in zip(reads, counts, strict=True)))
        assert row.limited_by == ("compute" if sum(counts) / rate >= sum(reads) / bandwidth else "bandwidth")
    assert judged(model, 200, INT8, "E5-2699 v4").limited_by == "compute"
    assert judged(model, 200, INT8, "8480+").limited_by == "bandwidth"
    assert judged(model, 200, tersor.BinaryXnor(), "T4") is None  # no figure for xor and popcount in the data sheet


def test_weight_only_computes_in_float():
    model = tower([4096, 4096])
    row = judged(model, 4096, tersor.Int8WeightOnly(), "A100")
    assert row.seconds == pytest.approx(2 * 4096**3 / 19.5e12)


def test_every_row_of_the_table_has_a_source():
    assert len({row.name for row in HARDWARE}) == len(HARDWARE)
    for row in HARDWARE:
        assert len(row.source) > 40
        assert min(row.memory, row.bandwidth, row.int8_ops, row.f32_ops) > 0
        # A GPU does int8 twice as often as bfloat16, those of GeForce four times: their float32 sums are slowed down.
        assert row.bf16_ops is None or row.int8_ops / row.bf16_ops == pytest.approx(4 if "GeForce" in row.name else 2, rel=0.02)
    for name in ("AVX2, no VNNI", "VNNI", "AMX", "T4", "L4", "A100", "H100 SXM", "v5e"):
        assert device(name)
    assert device("8480+").int8_ops == pytest.approx(229.4e12, rel=1e-3)
    assert device("8280").bandwidth == pytest.approx(140.8e9, rel=1e-3)


def test_a_gpu_is_found_by_the_name_that_torch_gives():
    for called, name in (
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80 GB SXM"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H200", "NVIDIA H200 SXM"),
        ("NVIDIA B200", "NVIDIA B200 (HGX)"),
        ("NVIDIA L4", "NVIDIA L4"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("Tesla T4", "NVIDIA T4"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
    ):
        assert gpu(called) is device_named(name), called
    for other in ("NVIDIA A100-SXM4-40GB", "NVIDIA GB200", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", ""):
        assert gpu(other) is None, other


# ---- the whole ------------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(256, 512)
        self.second = nn.Linear(512, 256)
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x).relu())


X = torch.linspace(-2, 2, 64 * 256).sin().reshape(64, 256)


@pytest.fixture
def known(monkeypatch):
    """Predictions of round figures; the float model takes 10 ms."""
    monkeypatch.setattr(recommend, "call_cost", lambda: CallCost(2e-6, 4e-6))
    monkeypatch.setattr(recommend, "interleaved", lambda contenders, rounds, seconds: {"model": Timing(0.01, 0.02)})
    monkeypatch.setattr(recommend, "machine_name", lambda: "a cpu")
    with torch_threads(1):
        yield


def advised(**given):
    return tersor.advise(Model(), X, **{"machine": MACHINE} | given)


def test_advice_adds_up(known):
    advice = advised()
    assert (advice.recommended, advice.config) == ("Int8Dynamic()", INT8)
    rows = {row.format: row for row in advice.formats}
    assert rows["float"].seconds == pytest.approx(0.01)
    traffic = 4 * 2 * 256 * 512
    floats = [predict(None, n, k, 64, HERE, traffic).seconds for n, k in ((512, 256), (256, 512))]
    assert advice.rest_s == pytest.approx(0.01 - sum(floats))
    assert rows["float"].layers_s == pytest.approx(sum(floats))
    packed = [predict(INT8, n, k, 64, HERE, 2 * 256 * 512 + 4 * 768).seconds for n, k in ((512, 256), (256, 512))]
    assert rows["Int8Dynamic()"].seconds == pytest.approx(advice.rest_s + sum(packed))
    assert [layer.fqn for layer in advice.layers] == ["first", "second"]
    assert advice.layers[0].seconds["Int8Dynamic()"] == pytest.approx(packed[0])
    assert advice.layers[0].rows == {64: 1}
    other = 4 * (512 + 256 + 72)
    assert rows["float"].bytes == 4 * 2 * 256 * 512 + other
    assert rows["Int8Dynamic()"].bytes == 2 * 256 * 512 + 4 * 768 + other
    assert rows["Int8Dynamic()"].memory == rows["Int8Dynamic()"].bytes + 64 * 768 * 4
    assert rows["float"].limited_by == "the rest of the model"
    assert "needs calibration or training" in rows["Ternary()"].reasons[0]
    assert advice.threads == 1


def test_what_is_asked_decides(known):
    memory = {row.format: row.memory for row in advised().formats}
    seconds = {row.format: row.seconds for row in advised().formats}
    assert advised(memory=memory["Int8Dynamic()"]).recommended == "Int8Dynamic()"
    none = advised(memory=memory["Int8Dynamic()"] - 8000)
    assert (none.recommended, none.config) == (None, None)
    assert "nothing here holds what was asked" in str(none)
    assert any("needs" in reason for row in none.formats for reason in row.reasons)
    assert advised(latency=seconds["Int8Dynamic()"] * 1.001).recommended == "Int8Dynamic()"
    assert advised(latency=seconds["Int8Dynamic()"] * 0.999).recommended is None
    assert advised(max_drop=0).recommended == "float"
    fastest = advised(max_drop=3)  # 1 - cosine is at most 2
    assert fastest.recommended == min(seconds, key=seconds.__getitem__) == "BinaryXnor()"


def test_drop_is_measured(known):
    model = Model()
    advice = advised(max_drop=0.5)
    for row, fmt in zip(advice.formats, (None, *recommend.FORMATS), strict=True):
        if fmt is None:
            assert row.drop == 0
            continue
        other = tersor.quantize_(Model(), {"first": fmt, "second": fmt})
        with torch.no_grad():
            want, got = model(X).double(), other(X).double()
        assert row.drop == pytest.approx(1 - torch.cosine_similarity(want, got).mean().item(), abs=1e-9)

    def bits(m):
        return 8.0 if type(m.first) is nn.Linear else float(m.first.format.bits)

    drops = {row.format: row.drop for row in advised(max_drop=4, metric=bits).formats}
    assert drops["Int4()"] == 4
    judged: list[nn.Module] = []
    advised(max_drop=4, metric=lambda m: judged.append(m) or bits(m))
    assert len(judged) == len(drops)  # the float model once, each format once
    assert advised(max_drop=4, metric=bits).recommended in ("Int8Dynamic()", "Int4()")


def test_a_format_leaves_float_what_does_not_suit_it(known):
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48))  # groups of 32 do not divide 48
    advice = tersor.advise(model, torch.ones(2, 48), machine=MACHINE, max_drop=2, formats=[tersor.Int4(32)])
    layers = {layer.fqn: layer.seconds for layer in advice.layers}
    assert (
        layers["0"]["Int4(group_size=32)"]
        == predict(None, 64, 48, 2, HERE, 48 * 64 * 4 + (48 * 64 // 2 + 48 * 4 + 3 * 2 * 32)).seconds
    )


def test_sparse_formats_are_refused_with_the_reason(known):
    advice = advised(formats=[INT8, tersor.SparseInt8()])
    assert [row.format for row in advice.formats] == ["float", "Int8Dynamic()"]
    assert "its time follows from its zeros" in advice.remarks[0]


def test_shared_weights_count_once(known):
    layer = nn.Linear(64, 64, bias=False)
    model = nn.Sequential(layer, layer)
    advice = tersor.advise(model, torch.ones(3, 64), machine=MACHINE)
    assert [(row.fqn, row.rows) for row in advice.layers] == [("0", {3: 2})]
    one = predict(INT8, 64, 64, 3, HERE, 64 * 64 + 4 * 64).seconds
    assert advice.layers[0].seconds["Int8Dynamic()"] == pytest.approx(2 * one)
    assert advice.formats[0].bytes == 4 * 64 * 64
    assert advice.formats[1].bytes == 64 * 64 + 4 * 64


def test_for_people_and_for_programs(known):
    advice = advised(latency=0.02)
    data = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
    assert data["config"] == {"name": "int8-dynamic"}
    assert len(data["hardware"]) == len(HARDWARE) * 7  # float and six formats; the data sheets say nothing of popcount
    assert {row["source"] for row in data["hardware"]} == {row.source for row in HARDWARE}
    text = str(advice)
    assert r"tersor.quantize\_(model, tersor.Int8Dynamic())" in text
    assert "nothing was timed there" in text
    for row in HARDWARE:
        assert row.name.split("(")[0].strip() in text
    from rich.console import Console

    with open("/dev/null", "w") as sink:
        console = Console(width=160, record=True, file=sink)
        console.print(advice)
    assert "recommended" in console.export_text()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"latency": 0}, ValueError, "advise: latency is 0, expected a positive number"),
        ({"memory": -1}, ValueError, "advise: memory is -1"),
        ({"max_drop": -0.1}, ValueError, "advise: max_drop is -0.1"),
        ({"max_drop": math.nan}, ValueError, "advise: max_drop is nan"),
        ({"metric": lambda m: 1}, ValueError, "advise: metric is given without max_drop"),
        ({"metric": lambda m: math.nan, "max_drop": 1}, ValueError, "advise: metric(model) is nan"),
        ({"formats": ["int8"]}, TypeError, "advise: formats holds 'int8'"),
        ({"inputs": []}, ValueError, "advise: inputs is empty"),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, "reach no layer that could be swapped"),
    ],
)
def test_refusals(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        tersor.advise(**{"model": Model(), "inputs": X, "machine": MACHINE} | change)


def with_inputs():
    return Model(), X


@pytest.mark.native
def test_command(monkeypatch, tmp_path):
    monkeypatch.setattr("tersor.advice.cli.measured_machine", lambda fresh: MACHINE)
    out, page = tmp_path / "a.json", tmp_path / "a.md"
    arguments = ["advise", "--model", "test_advise:with_inputs", "--latency", "1000", "--memory", "100", "--json", str(out)]
    result = CliRunner().invoke(main, [*arguments, "--markdown", str(page)])
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert data["asked"] == {"latency": 1.0, "memory": 100e6, "max_drop": None}
    assert data["measured_s"] > 0
    assert "Cloud TPU v5e" in result.output
    assert "| first |" in page.read_text()
    result = CliRunner().invoke(main, ["advise", "--model", "test_advise:Model"])
    assert result.exit_code == 1
    assert "no inputs: give --inputs" in result.output
