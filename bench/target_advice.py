"""Measurements of bench/targets.py on report(), search() and advise(): MiniLM and SmolLM2, one thread.

python bench/target_advice.py [layers | formats | report | search]   prints what the rows are made of
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import sys
import time
from typing import Any, NamedTuple

from tersor.bench.timing import cap_peers, interleaved

if __name__ == "__main__":
    cap_peers()

import minilm_model
import smollm_model
import torch
from accuracy_smollm import WINDOW
from torch import nn

import tersor
from tersor.advice.predict import Here, call_cost
from tersor.advice.recommend import FORMATS, called_layers, fitting, layer_times
from tersor.bench.layers import Bench
from tersor.bench.machine import Machine, this_machine
from tersor.calibration import batches
from tersor.format_search import Search, Trial

INT8 = tersor.Int8Dynamic()


class Case(NamedTuple):
    model: nn.Module
    inputs: Any


@functools.cache
def machine() -> Machine:
    return this_machine()


@functools.cache
def smollm() -> tuple[nn.Module, object]:
    return smollm_model.load_model()


class NextToken(nn.Module):
    """A language model that sees one token after a cache of the prompt, which it leaves as it was."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            self.cache = model(prompt, use_cache=True).past_key_values

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.model(ids, past_key_values=self.cache, use_cache=True).logits
        self.cache.crop(-1)
        return logits


@functools.cache
def cases() -> dict[str, Case]:
    def tokens(batch: int, count: int) -> dict[str, torch.Tensor]:
        return {"input_ids": minilm_model.token_rows(batch, count)}

    minilm, (language, tokenizer) = minilm_model.load_model(), smollm()
    ids = smollm_model.load_chapter(tokenizer, 129)
    prefill = {"input_ids": ids[:, :128], "use_cache": False, "logits_to_keep": 1}
    return {
        "MiniLM 8 x 128 tokens": Case(minilm, tokens(8, 128)),
        "MiniLM 1 x 16 tokens": Case(minilm, tokens(1, 16)),
        "SmolLM2 prefill 128": Case(language, prefill),
        "SmolLM2 decode": Case(NextToken(language, ids[:, :128]), (ids[:, 128:],)),
    }


# ---- predicted and measured layers ----------------------------------------------------------------------------------------------


@functools.cache
def layer_errors(name: str) -> list[tuple[str, float, float]]:
    """(what, predicted, measured seconds) of each int8 layer, measured within the swapped model: the median over its passes."""
    model, inputs = cases()[name]
    args, kwargs = batches(inputs, "inputs")[0]
    here = Here(machine(), machine().with_threads(1), call_cost())
    with torch.no_grad():
        layers = called_layers(model, [(args, kwargs)])
    predicted = {layer.fqn: times[0].seconds for layer, times in zip(layers, layer_times(layers, INT8, here), strict=True)}
    what = {layer.fqn: f"{layer.size[1]} x {layer.size[0]}, M = {next(iter(layer.rows))}" for layer in layers}
    swapped = tersor.quantize_(copy.deepcopy(model), dict.fromkeys(what, INT8))
    samples: dict[str, list[float]] = {fqn: [] for fqn in what}
    for fqn, own in samples.items():
        layer = swapped.get_submodule(fqn)
        layer.register_forward_pre_hook(lambda _, x, own=own: own.append(-time.perf_counter()))
        layer.register_forward_hook(lambda _, x, y, own=own: own.append(own.pop() + time.perf_counter()))
    with torch.inference_mode():
        interleaved({"model": lambda: swapped(*args, **kwargs)}, rounds=9, seconds=0.1)
    return [(what[fqn], predicted[fqn], statistics.median(own)) for fqn, own in samples.items()]


def median_error(model: str) -> float:
    """Of |predicted / measured - 1| over the int8 layers of a model, in both of its cases."""
    found = [abs(p / t - 1) for name in cases() if name.startswith(model) for _, p, t in layer_errors(name)]
    return statistics.median(found)


def error_note(model: str) -> str:
    parts = []
    for name in cases():
        if name.startswith(model):
            errors = [abs(p / t - 1) for _, p, t in layer_errors(name)]
            parts.append(f"{name.removeprefix(model).strip()}: median {statistics.median(errors):.0%}, worst {max(errors):.0%}")
    return "; ".join(parts)


# ---- the chosen format ----------------------------------------------------------------------------------------------------------


@functools.cache
def format_times(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """(predicted, measured) seconds of a pass in each format that keeps the model as it is, and in all others."""
    model, inputs = cases()[name]
    advice = tersor.advise(model, inputs, machine=machine())
    predicted = {row.format: row.seconds for row in advice.formats}
    args, kwargs = batches(inputs, "inputs")[0]
    contenders = {"float": functools.partial(model, *args, **kwargs)}
    for fmt in FORMATS:
        with torch.no_grad():
            layers = called_layers(model, [(args, kwargs)])
        names = {layer.fqn: fitting(fmt, layer) for layer in layers}
        contenders[repr(fmt)] = functools.partial(tersor.quantize_(copy.deepcopy(model), names), *args, **kwargs)
    with torch.no_grad():
        measured = interleaved(contenders, rounds=7, seconds=0.05)
    return predicted, {key: timing.best for key, timing in measured.items()}


def chosen_over_best(name: str, bits: int) -> float:
    """Measured time of the format that the prediction chooses over that of the fastest, among those of so many bits or more."""
    predicted, measured = format_times(name)
    among = ["float", *(repr(fmt) for fmt in FORMATS if fmt.bits >= bits)]
    return measured[min(among, key=predicted.__getitem__)] / min(measured[key] for key in among)


def worst_choice(bits: int) -> float:
    return max(chosen_over_best(name, bits) for name in cases())


def choice_note(bits: int) -> str:
    return ", ".join(f"{name}: {chosen_over_best(name, bits):.2f}" for name in cases())


# ---- report() and `tersor bench` ------------------------------------------------------------------------------------------------


@functools.cache
def report_against_bench(turns: int = 3) -> list[tuple[str, float, float]]:
    """(what, report's us a call, bench's us a call) of the layers of MiniLM at 8 x 128 tokens, float and int8. They take turns and
    the fastest of each counts: within minutes other work on the host moves a layer by more than the two differ."""
    model, inputs = cases()["MiniLM 8 x 128 tokens"]
    other = tersor.quantize_(copy.deepcopy(model), INT8)
    pairs: dict[str, tuple[float, float]] = {}
    for _ in range(turns):
        found = tersor.report(model, other, inputs, rounds=3)
        rows = {(row.k, row.n, m): row for row in found.layers for m in row.rows if len(row.rows) == 1}
        for m in sorted({m for _, _, m in rows}):
            shapes = tuple((k, n) for k, n, rows_of in rows if rows_of == m)
            for point in Bench(shapes, (m,), rounds=7).run(machine()):
                if point.name not in ("fp32", "tersor"):
                    continue
                row = rows[point.k, point.n, m]
                own = (row.before if point.name == "fp32" else row.after).best / row.rows[m]
                what = f"{point.name} {point.k} x {point.n}, M = {m}"
                before = pairs.get(what, (math.inf, math.inf))
                pairs[what] = (min(own * 1e6, before[0]), min(point.timing.best * 1e6, before[1]))
    return [(what, *both) for what, both in pairs.items()]


def report_gap() -> float:
    return max(abs(own / bench - 1) for _, own, bench in report_against_bench())


# ---- search() -------------------------------------------------------------------------------------------------------------------


@functools.cache
def minilm_search(documents: int = 120, path: str | None = None) -> Search:
    """Metric: mean cosine of embeddings to fp32's, which is 1 for fp32; a drop of 0.005 is 0.5 %."""
    model, inputs = cases()["MiniLM 8 x 128 tokens"]
    texts = minilm_model.load_texts(documents)
    reference = minilm_model.embed(model, texts.documents)

    def metric(other: nn.Module) -> float:
        return (minilm_model.embed(other, texts.documents) * reference).sum(1).mean().item()

    return tersor.search(model, [INT8, tersor.Int8WeightOnly(), tersor.Int4(32)], inputs, max_drop=0.005, metric=metric, path=path)


@functools.cache
def smollm_search(smoothed: bool, tokens: int = 1024, path: str | None = None) -> Search:
    """Metric: minus the perplexity of the novel's first tokens; the drop allowed is 0.5 % of fp32's. Weights were Q4_1 before.
    smoothed: smooth_ is called first, on another book."""
    model, tokenizer = smollm()
    other_book = smollm_model.load_chapter(tokenizer, 512, "Sense and Sensibility")
    if smoothed:
        model = tersor.smooth_(copy.deepcopy(model), {"input_ids": other_book, "use_cache": False})
    ids = smollm_model.load_chapter(tokenizer, tokens)

    def metric(other: nn.Module) -> float:
        return -smollm_model.perplexity(other, ids.view(-1, WINDOW))

    with torch.no_grad():
        allowed = -metric(model) * 0.005
    inputs = cases()["SmolLM2 prefill 128"].inputs
    judged_on = {"input_ids": other_book[:, :128], "use_cache": False}
    formats = [INT8, tersor.Int8WeightOnly()]
    return tersor.search(model, formats, inputs, max_drop=allowed, metric=metric, damage_inputs=judged_on, thorough=NEAR, path=path)


FAST = 0.9  # of all-int8's speed: what search() is to find
NEAR = 0.8  # of the fastest layers' speed: as many mixes as are FAST with what the rest of the model takes


def speed_of_int8(found: Search) -> float:
    """Whole-model time of all-int8 over that of the chosen mix."""
    times = {trial.name: trial.seconds for trial in found.trials}
    int8, chosen = times["all Int8Dynamic()"], found.chosen.seconds
    return int8.best / chosen.best if int8 and chosen else math.nan


def fast_layers_s(found: Search) -> float:
    """Seconds that the layers of a FAST mix may take."""
    by_name = {trial.name: trial for trial in found.trials}
    base, int8 = by_name["float"], by_name["all Int8Dynamic()"]
    assert base.seconds is not None  # these two are always timed
    assert int8.seconds is not None
    return int8.seconds.best / FAST - (base.seconds.best - base.layers_s)


def fast_trials(found: Search) -> list[Trial]:
    return [trial for trial in found.trials if trial.layers_s <= fast_layers_s(found)]


def found_or_shown(found: Search) -> float:
    """At least 1 where the chosen mix is FAST, or else where the table holds every FAST mix of the path and all drop too far: the
    chosen one's speed over FAST, or if that is more the least drop of those over the one allowed."""
    fastest = min(trial.layers_s for trial in found.trials)
    whole = fast_layers_s(found) * found.thorough <= fastest
    least = min((trial.drop for trial in fast_trials(found)), default=0.0)
    return max(speed_of_int8(found) / FAST, least / found.max_drop if whole else 0.0)


def search_note(found: Search) -> str:
    chosen, fast = found.chosen, fast_trials(found)
    text = f"{chosen.name}: {speed_of_int8(found):.2f} of all-int8's speed, drop {chosen.drop:.3g} of {found.max_drop:.3g} allowed"
    least = min((trial.drop for trial in fast), default=math.nan)
    return f"{text}; least drop of the {len(fast)} mixes tried at {FAST} of that speed and more: {least:.3g}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    what = sys.argv[1] if len(sys.argv) > 1 else "layers"
    if what == "layers":
        for case in cases():
            for layer, predicted_s, measured_s in {found[0]: found for found in layer_errors(case)}.values():
                gap = predicted_s / measured_s - 1
                print(f"{case:24} {layer:24} predicted {predicted_s * 1e6:8.1f} us, measured {measured_s * 1e6:8.1f}: {gap:+.0%}")
        print({model: f"{median_error(model):.1%}" for model in ("MiniLM", "SmolLM2")})
    elif what == "formats":
        for case in cases():
            for key, seconds in format_times(case)[0].items():
                print(f"{case:24} {key:24} predicted {seconds * 1e3:8.2f} ms, measured {format_times(case)[1][key] * 1e3:8.2f}")
            print({bits: f"{chosen_over_best(case, bits):.3f}" for bits in (8, 4, 1)})
    elif what == "report":
        for layer, own_us, bench_us in report_against_bench():
            print(f"{layer:32} report {own_us:9.1f} us, bench {bench_us:9.1f}: {own_us / bench_us - 1:+.1%}")
    else:
        for search in (minilm_search, functools.partial(smollm_search, False), functools.partial(smollm_search, True)):
            result = search()
            print(result.to_markdown(), f"{found_or_shown(result):.3f}; {search_note(result)}\n")
