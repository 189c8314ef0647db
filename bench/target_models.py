"""Measurements of bench/targets.py on whole models."""

from __future__ import annotations

import copy
import functools

import minilm
import minilm_model

from tersor.bench.peers import quantize_dynamic_engines, torch_quantize_dynamic


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


def simulation_gap() -> float:
    scores = minilm_accuracy()
    return abs(scores["ours"].mean_cosine - scores["simulated"].mean_cosine)
