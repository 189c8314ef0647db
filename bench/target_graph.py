"""Measurements of bench/targets.py on fused models; each runs once, however many rows read it."""

from __future__ import annotations

import functools
import statistics

import fused_models as models
import torch

WINDOWS = 256  # of the novel: the standard error of a change of perplexity is 0.3 % at 16 of them


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
    return models.LanguageModels(WINDOWS * models.CONTEXT)


@functools.cache
def smollm(decode: bool) -> dict[str, float]:
    seconds = language_models().speed(decode)
    times = seconds[models.SWAPPED].best / seconds[models.FUSED].best
    return {"of limit": models.of_limit(seconds), "times swapped": times}


def smollm_note(decode: bool) -> str:
    return f"{smollm(decode)['times swapped']:.2f} times the swapped model"


@functools.cache
def perplexity_change() -> tuple[float, float]:
    """Of the fused model against the swapped one, and its standard error."""
    return language_models().perplexity_change()


def perplexity_note() -> str:
    change, error = perplexity_change()
    return f"{change:+.2%}, standard error {error:.2%}, {WINDOWS} windows of {models.CONTEXT} tokens"


@functools.cache
def peaks(how: str) -> list[tuple[float, float]]:
    """(peak resident MiB during a MiniLM forward, the same of eager fp32), three processes of each in turn: they differ by 1 %."""
    return [(models.memory(how)["peak"], models.memory(models.FP32)["peak"]) for _ in range(3)]


def peak_of_fp32(how: str) -> float:
    return statistics.median(fused / fp32 for fused, fp32 in peaks(how))


def peak_note(how: str) -> str:
    return ", ".join(f"{fused:.0f} MiB of {fp32:.0f}" for fused, fp32 in peaks(how))
