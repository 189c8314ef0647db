"""Measurements of bench/targets.py on accuracy: calibration, rounding, distillation; each runs once, however many rows read it."""

from __future__ import annotations

import functools

import accuracy_minilm as minilm
import accuracy_smollm as smollm
import distill_fashion_mnist as students
import distill_minilm as encoders
import fashion_mnist_model
from glosses import Ranking


@functools.cache
def perplexities() -> dict[str, smollm.Row]:
    """About ten minutes. The weights were Q4_1 before."""
    return smollm.run()


def added(name: str) -> float:
    return smollm.added(perplexities(), name)


def simulation_gap() -> float:
    rows = perplexities()
    return abs(rows[smollm.DYNAMIC].perplexity / rows[smollm.SIMULATION].perplexity - 1)


def smooth_of_plain() -> float:
    """What is left of the loss of Int8Dynamic."""
    return added(smollm.SMOOTH) / added(smollm.DYNAMIC)


@functools.cache
def rankings() -> dict[str, Ranking]:
    """About ten minutes."""
    return minilm.run()[0]


def removed(size: int) -> float:
    return minilm.removed(rankings(), size)


def kept_of_recall(name: str) -> float:
    """Share of the float model's R@1 that an untrained student has; chance is nothing."""
    return rankings()[name].recall_at_1() / rankings()[minilm.FLOAT].recall_at_1()


def points_lost(name: str) -> float:
    return -rankings()[name].against(rankings()[minilm.FLOAT])[0]


def points_note(name: str) -> str:
    return f"standard error {rankings()[name].against(rankings()[minilm.FLOAT])[1]:.2f}"


def reciprocal_rank_change(name: str) -> float:
    return abs(rankings()[name].mean_reciprocal_rank() - rankings()[minilm.FLOAT].mean_reciprocal_rank())


@functools.cache
def fashion_mnist() -> list[dict[str, float]]:
    """Three seeds; about five minutes."""
    data = fashion_mnist_model.load_data()
    return [students.run_seed(data, seed, students.STEPS) for seed in range(3)]


def gain(name: str, over: str) -> float:
    return students.mean(fashion_mnist(), name) - students.mean(fashion_mnist(), over)


def kept_when_shrunk(width: float) -> float:
    """Share of the teacher's gain over chance, 10 %, that an untrained shrunk student has."""
    return (students.mean(fashion_mnist(), students.SHRUNK[width]) - 10) / (students.mean(fashion_mnist(), students.TEACHER) - 10)


@functools.cache
def small_encoders() -> list[dict[str, encoders.Score]]:
    """Three seeds; about ten minutes."""
    task = encoders.load_task()
    return [encoders.run_seed(task, seed, encoders.STEPS) for seed in range(3)]


def taught(name: str, over: str, field: str) -> float:
    """What the teacher adds to a figure of the small encoders, mean of the seeds."""
    return getattr(encoders.mean(small_encoders(), name), field) - getattr(encoders.mean(small_encoders(), over), field)
