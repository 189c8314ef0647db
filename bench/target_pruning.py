"""Measurements of bench/targets.py on pruned models; each runs once, however many rows read it."""

from __future__ import annotations

import functools
import statistics

import fashion_mnist_model
import fashion_mnist_sparse
import minilm_model
import prune_minilm

import tersor

DROPS = fashion_mnist_sparse.DROPS
SEEDS, STEPS = 3, 400


@functools.cache
def fashion_mnist() -> list[fashion_mnist_sparse.Result]:
    """About ten minutes."""
    data = fashion_mnist_model.load_data()
    return [fashion_mnist_sparse.run_seed(data, seed, STEPS, tuple(DROPS), lambda _, __: None) for seed in range(SEEDS)]


def drops(name: str) -> list[float]:
    """Of each seed, against the dense model trained as long."""
    return [result.accuracies[fashion_mnist_sparse.DENSE] - result.accuracies[name] for result in fashion_mnist()]


def points_below_dense(name: str) -> float:
    return statistics.fmean(drops(name))


def seeds_note(name: str) -> str:
    return "seeds: " + ", ".join(f"{drop:.2f}" for drop in drops(name))


@functools.cache
def minilm() -> dict[str, prune_minilm.Score]:
    return prune_minilm.run(minilm_model.load_model(), minilm_model.load_texts(), tersor.Unstructured(0.5))


def mean_cosine(score: str) -> float:
    return minilm()[score].accuracy.mean_cosine


def minilm_note() -> str:
    return "; ".join(
        f"{name}: cosine {row.accuracy.mean_cosine:.3f}, R@1 {row.accuracy.recall_at_1:.3f}" for name, row in minilm().items()
    )
