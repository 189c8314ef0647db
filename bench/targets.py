"""Every figure this project promises, as one table: what, how it is measured, the bound, and which CPU it needs.

    python bench/targets.py [--only SUBSTRING]

Measures them interleaved, one thread, and prints reached against promised; exits with 1 when one falls short. A row that needs what
this CPU lacks is skipped with the reason. Run it on a quiet machine.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import click

from tersor.bench.timing import cap_peers, cpu_flags, interleaved, machine_name

CAP = cap_peers()

import compare  # noqa: E402
import minilm  # noqa: E402
import minilm_model  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402

import tersor  # noqa: E402
from tersor.bench.layers import KERNEL, Bench  # noqa: E402
from tersor.bench.machine import this_machine  # noqa: E402
from tersor.bench.peers import PEERS, quantize_dynamic_engines, torch_quantize_dynamic  # noqa: E402
from tersor.choice import Choice  # noqa: E402

VNNI = "avx512_vnni"


@dataclass(frozen=True)
class Target:
    """One promise. `measure` returns the figure; it holds when figure >= bound, or <= bound for `at_most`."""

    what: str
    measure: Callable[[], float]
    bound: float
    at_most: bool = False
    needs: str = ""  # a CPU flag

    def holds(self, figure: float) -> bool:
        return figure <= self.bound if self.at_most else figure >= self.bound


# ---- measurements; each runs once, however many rows read it --------------------------------------------------------------------


@functools.cache
def layer_errors() -> float:
    """Worst relative error (Frobenius) of an int8 layer, x ~ N(0, 1), default nn.Linear init, K <= 4096."""
    worst = 0.0
    with torch.inference_mode():
        for k in (64, 384, 768, 1536, 4096):
            linear = nn.Linear(k, 1024)
            x = torch.randn(64, k)
            want = linear(x)
            got = tersor.QuantLinear.from_linear(linear)(x)
            worst = max(worst, ((got - want).norm() / want.norm()).item())
    return worst


@functools.cache
def minilm_accuracy() -> dict[str, minilm.Accuracy]:
    fp32, texts = minilm_model.load_model(), minilm_model.load_texts()
    reference = minilm_model.evaluate(fp32, texts)
    ours = minilm_model.evaluate(minilm.tersor_quantized(fp32), texts)
    simulated = minilm_model.evaluate(minilm_model.simulate_int8_(copy.deepcopy(fp32)), texts)
    return {"ours": minilm.accuracy(ours, reference), "simulated": minilm.accuracy(simulated, reference)}


@functools.cache
def minilm_speed(batch: int, tokens: int) -> dict[str, float]:
    """fp32 / x of minima: ours, and the best engine of quantize_dynamic at this very shape."""
    fp32 = minilm_model.load_model()
    engines = {e: torch_quantize_dynamic(fp32, e) for e in quantize_dynamic_engines()}
    models = {"fp32": fp32, "ours": minilm.tersor_quantized(fp32), **engines}
    seconds = minilm.measure_speed(models, batch, tokens, rounds=15, threads=1)
    peer = min(seconds[e].best for e in engines)
    return {"ours": seconds["fp32"].best / seconds["ours"].best, "against_peer": peer / seconds["ours"].best}


@functools.cache
def layer_points() -> list[compare.Point]:
    return compare.measure(Bench(compare.SHAPES, compare.ROWS, against=compare.contenders(all_peers=False)), this_machine())


def quantize_dynamic_ratio(p: compare.Point) -> float:
    engines = [row.timing.best for name, row in p.rows.items() if name.startswith("quantize-dynamic")]
    return min(engines) / p.ours.timing.best


def again(p: compare.Point) -> compare.Point:
    """The same point with more rounds: a disturbance of a few ms can spoil one of 42."""
    return compare.measure(Bench(((p.k, p.n),), (p.m,), against=tuple(n for n in p.rows if n in PEERS), rounds=21), this_machine())[
        0
    ]


def worst_against_quantize_dynamic(few_rows: bool) -> float:
    """Smallest quantize_dynamic / ours over the grid, at M <= 64 or above; a point that falls short is measured again."""
    worst = math.inf
    for p in layer_points():
        if (p.m <= 64) != few_rows:
            continue
        ratio = quantize_dynamic_ratio(p)
        if ratio < (1.0 if few_rows else 0.9):
            ratio = quantize_dynamic_ratio(again(p))
        worst = min(worst, ratio)
    return worst


def geometric_mean_ratio() -> float:
    return compare.geometric_mean([p.ratio for p in layer_points()])


@functools.cache
def worst_against_all() -> float:
    """Smallest (best int8 peer / ours) over the grid; a point below 1 counts with the median of three measurements."""
    worst = math.inf
    for p in layer_points():
        ratio = p.ratio
        if ratio < 1.0:
            ratio = sorted((ratio, again(p).ratio, again(p).ratio))[1]
        worst = min(worst, ratio)
    return worst


def kernel_of_limit(worst: bool) -> float:
    """Share of the measured int8 limit at M >= 256, K and N >= 768: geometric mean over the grid, or its worst shape."""
    shares = [p.rows[KERNEL].of_limit for p in layer_points() if p.m >= 256 and min(p.k, p.n) >= 768]
    return min(shares) if worst else compare.geometric_mean(shares)


@functools.cache
def bfloat16_points() -> list[tuple[float, float]]:
    """(bfloat16 / float32 time of our layer, torch's own bfloat16 layer / ours), interleaved, at shapes that are not all call."""
    found = []
    for (k, n), m in itertools.product(((768, 3072), (1024, 4096), (4096, 4096)), (1, 16, 256)):
        linear, x = nn.Linear(k, n), torch.randn(m, k)
        ours, theirs, half = tersor.QuantLinear.from_linear(linear), copy.deepcopy(linear).bfloat16(), x.bfloat16()
        contenders = {
            "f32": functools.partial(ours, x),
            "bf16": functools.partial(ours, half),
            "peer": functools.partial(theirs, half),
        }
        with torch.inference_mode():
            t = interleaved(contenders, rounds=11)
        found.append((t["bf16"].best / t["f32"].best, t["peer"].best / t["bf16"].best))
    return found


@functools.cache
def wrong_choices() -> float:
    """How much slower the layer that only_if_faster chose is than the other, at worst, over 50 random shapes."""
    rng = random.Random(0)
    choice, worst = Choice(), 1.0
    for _ in range(50):
        k, n, m = (round(2 ** rng.uniform(0, top)) for top in (11, 11, 8))
        linear = nn.Linear(k, n)
        picked_packed = choice.speedup(linear, tersor.Int8Dynamic(), {m: 1}) is not None
        packed, x = tersor.QuantLinear.from_linear(linear), torch.randn(m, k)
        with torch.inference_mode():
            times = interleaved({"float": lambda: linear(x), "packed": lambda: packed(x)}, rounds=9, seconds=0.01)  # noqa: B023
        picked, other = (times["packed"], times["float"]) if picked_packed else (times["float"], times["packed"])
        worst = max(worst, picked.best / other.best)
    return worst


@functools.cache
def odd_sizes() -> float:
    """Time of a layer of odd sizes over that of the sizes rounded up (N to 16, K to 64, M to 8), at worst."""
    worst = 0.0
    for m, k, n in (
        (1, 383, 1535),
        (3, 1000, 1000),
        (7, 769, 3071),
        (13, 500, 77),
        (63, 1023, 4095),
        (65, 400, 900),
        (255, 767, 767),
    ):
        up = [-(-value // unit) * unit for value, unit in ((m, 8), (k, 64), (n, 16))]
        layers = [(torch.randn(a, b), tersor.QuantLinear.from_linear(nn.Linear(b, c))) for a, b, c in ((m, k, n), up)]
        with torch.inference_mode():
            times = interleaved({str(i): functools.partial(layer, x) for i, (x, layer) in enumerate(layers)}, rounds=11)
        worst = max(worst, times["0"].best / times["1"].best)
    return worst


def small_call_us(mode: Callable[[], object]) -> float:
    """Microseconds of one module call of a 16x16 layer at M = 1."""
    layer = tersor.QuantLinear.from_linear(nn.Linear(16, 16))
    x = torch.randn(1, 16)
    with mode():  # type: ignore[attr-defined]
        return interleaved({"call": lambda: layer(x)}, rounds=21, seconds=0.02)["call"].best * 1e6


@functools.cache
def weight_only(m: int) -> float:
    """fp32 / Int8WeightOnly at 4096x4096."""
    linear = nn.Linear(4096, 4096)
    layer = tersor.QuantLinear.from_linear(linear, tersor.Int8WeightOnly())
    x = torch.randn(m, 4096)
    with torch.inference_mode():
        seconds = interleaved({"fp32": lambda: linear(x), "ours": lambda: layer(x)}, rounds=11, seconds=0.05)
    return seconds["fp32"].best / seconds["ours"].best


def simulation_gap() -> float:
    scores = minilm_accuracy()
    return abs(scores["ours"].mean_cosine - scores["simulated"].mean_cosine)


TARGETS = [
    Target("int8 layer: worst relative error, K <= 4096", layer_errors, 0.010, at_most=True),
    Target("MiniLM: mean cosine to fp32", lambda: minilm_accuracy()["ours"].mean_cosine, 0.9965),
    Target("MiniLM: worst cosine to fp32", lambda: minilm_accuracy()["ours"].worst_cosine, 0.98),
    Target("MiniLM: mean cosine against the simulated format, difference", simulation_gap, 0.0005, at_most=True),
    Target("MiniLM 8 x 128 tokens: times fp32", lambda: minilm_speed(8, 128)["ours"], 2.0, needs=VNNI),
    Target("MiniLM 8 x 128 tokens: times quantize_dynamic", lambda: minilm_speed(8, 128)["against_peer"], 1.0, needs=VNNI),
    Target("MiniLM 1 x 16 tokens: times fp32", lambda: minilm_speed(1, 16)["ours"], 2.0, needs=VNNI),
    Target("layer, M <= 64: times quantize_dynamic, worst of 28", lambda: worst_against_quantize_dynamic(True), 1.0, needs=VNNI),
    Target("layer, M > 64: times quantize_dynamic, worst of 14", lambda: worst_against_quantize_dynamic(False), 0.9, needs=VNNI),
    Target("layer: times the best int8 peer, worst of 42", worst_against_all, 0.97, needs=VNNI),
    Target("layer: times the best int8 peer, geometric mean of 42", geometric_mean_ratio, 1.05, needs=VNNI),
    Target("kernel at M >= 256, K and N >= 768: share of the int8 limit, mean", lambda: kernel_of_limit(False), 0.88, needs=VNNI),
    Target("kernel at M >= 256, K and N >= 768: share of the int8 limit, worst", lambda: kernel_of_limit(True), 0.80, needs=VNNI),
    Target("bfloat16 in and out: times the float32 time, worst", lambda: max(p[0] for p in bfloat16_points()), 1.10, at_most=True),
    Target(
        "bfloat16 in and out: times torch's bfloat16 layer, worst", lambda: min(p[1] for p in bfloat16_points()), 3.0, needs=VNNI
    ),
    Target("only_if_faster: chosen / other, worst of 50 random shapes", wrong_choices, 1.05, at_most=True),
    Target("odd sizes: time over that of sizes rounded up, worst", odd_sizes, 1.3, at_most=True),
    Target("16x16 at M = 1, no_grad: us a call", lambda: small_call_us(torch.no_grad), 6.0, at_most=True, needs=VNNI),
    Target("16x16 at M = 1, inference_mode: us a call", lambda: small_call_us(torch.inference_mode), 6.0, at_most=True, needs=VNNI),
    Target("Int8WeightOnly 4096x4096, M = 1: times fp32", lambda: weight_only(1), 2.5, needs=VNNI),
    Target("Int8WeightOnly 4096x4096, M = 64: times fp32", lambda: weight_only(64), 0.8, needs=VNNI),
]


@click.command()
@click.option("--only", default="", help="Rows whose description contains this text.")
def main(only: str) -> None:
    """Measure what the project promises on this machine and compare."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console(width=140)
    console.print(f"{machine_name()}, 1 thread, torch {torch.__version__}, {CAP}, kernels: {minilm.tersor_variant()}")
    table = Table("promise", "reached", "promised", "")
    failed = 0
    flags = cpu_flags()
    for target in track([t for t in TARGETS if only in t.what], "measuring", console=Console(stderr=True)):
        promised = f"{'<=' if target.at_most else '>='} {target.bound:g}"
        if target.needs and target.needs not in flags:
            table.add_row(target.what, "-", promised, f"skipped: this CPU has no {target.needs}")
            continue
        figure = target.measure()
        held = target.holds(figure)
        failed += not held
        table.add_row(target.what, f"{figure:.4g}", promised, "holds" if held else "[bold red]FALLS SHORT[/]")
    console.print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
