"""Measurements of bench/targets.py on fused models; each runs once, however many rows read it."""

from __future__ import annotations

import functools

import fused_models as models
import torch


@functools.cache
def minilm(batch: int, tokens: int) -> dict[str, float]:
    """Times the speed of each contender that the fused model has, the slower of the two ways through the backend."""
    torch._dynamo.reset()
    seconds = models.minilm_speed(models.minilm_models(), batch, tokens)
    fused = max(seconds[models.FUSED].best, seconds[models.BY_FORMAT].best)
    return {name: time.best / fused for name, time in seconds.items()}


@functools.cache
def minilm_cosine() -> tuple[float, float]:
    return models.minilm_cosine()


@functools.cache
def language_models() -> models.LanguageModels:
    torch._dynamo.reset()
    # Ties fall to other sides at every layer, so int8 models differ by chance: 0.3 % of perplexity (one sigma) in 8176 tokens.
    return models.LanguageModels(16 * models.CONTEXT)


@functools.cache
def smollm(decode: bool) -> dict[str, float]:
    seconds = language_models().speed(decode)
    times = seconds[models.SWAPPED].best / seconds[models.FUSED].best
    return {"of limit": models.of_limit(seconds), "times swapped": times}


def smollm_note(decode: bool) -> str:
    return f"{smollm(decode)['times swapped']:.2f} times the swapped model"


@functools.cache
def perplexity_gap() -> float:
    """|perplexity of the fused model / that of the swapped one - 1|."""
    found = language_models()
    fused, swapped = (found.perplexity(found.models[name]) for name in (models.FUSED, models.SWAPPED))
    return abs(fused / swapped - 1)


@functools.cache
def peak_of_fp32(how: str) -> float:
    """Peak resident memory of a process during a fused MiniLM forward over that of eager fp32."""
    return models.memory(how)["peak"] / models.memory(models.FP32)["peak"]
