"""Measurements of bench/targets.py on fused ops, each against the ops it stands for, unfused; each runs once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from target_few_bits import OF_POSSIBLE
from target_int8 import machine
from torch import Tensor, nn

import tersor
import tersor.ops as ops
from tersor.bench.timing import Timing, interleaved

NORM = (1024, 768)
EPS = 1e-5


def torch_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The quantisation of a row in torch's own ops."""
    scale = x.abs().amax(-1, keepdim=True) * (1 / 127)
    return (x / scale).round_().to(torch.int8), scale


def timed(contenders: dict[str, Callable[[], object]]) -> dict[str, Timing]:
    with torch.inference_mode():
        return interleaved(contenders, rounds=25)


@functools.cache
def norms() -> dict[str, Timing]:
    m, k = NORM
    x, weight, bias = torch.randn(m, k), torch.randn(k), torch.randn(k)
    layer_norm = functools.partial(nn.functional.layer_norm, x, (k,), weight, bias, EPS)
    rms_norm = functools.partial(nn.functional.rms_norm, x, (k,), weight, EPS)
    return timed(
        {
            "layer": lambda: ops.norm_quantize(x, None, weight, bias, EPS, "layer", False, False),
            "layer, quantize_rows": lambda: ops.quantize_rows(layer_norm()),
            "layer, torch": lambda: torch_rows(layer_norm()),
            "rms": lambda: ops.norm_quantize(x, None, weight, None, EPS, "rms", False, False),
            "rms, quantize_rows": lambda: ops.quantize_rows(rms_norm()),
        }
    )


def times_unfused_norm(kind: str) -> float:
    found = norms()
    return min(t.best for name, t in found.items() if name.startswith(f"{kind}, ")) / found[kind].best


def norm_note() -> str:
    return ", ".join(f"{name} {timing.best * 1e6:.0f} us" for name, timing in norms().items())


def stored(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    layer = tersor.QuantLinear.from_linear(nn.Linear(k, n))
    return layer.weight_packed, layer.weight_scale, layer.bias


@functools.cache
def qkv(m: int, k: int = 768) -> dict[str, Timing]:
    """Three layers of k x k by three calls, and by one call on all of their tiles whose result is split."""
    x = torch.randn(m, k)
    layers = [stored(k, k) for _ in range(3)]
    one = tuple(torch.cat(parts) for parts in zip(*layers, strict=True))
    return timed(
        {
            "three": lambda: [ops.linear_dynamic(x, *layer) for layer in layers],
            "one": lambda: ops.linear_dynamic(x, *one).split(k, -1),
        }
    )


def times_three_calls(m: int) -> float:
    return qkv(m)["three"].best / qkv(m)["one"].best


ASKED_OF_QKV = 1.2


def possible(m: int, k: int = 768) -> float:
    """Times three calls at most: the multiply-adds alone, at the int8 limit of this machine."""
    return qkv(m)["three"].best / (m * k * 3 * k / (machine().limits[0].int8 * 1e9))


def three_calls_bound(m: int) -> float:
    return min(ASKED_OF_QKV, OF_POSSIBLE * possible(m))


def three_calls_note(m: int) -> str:
    return f"asked: {ASKED_OF_QKV}, without anything but multiply-adds at the limit it would be {possible(m):.2f}"


@functools.cache
def gated(m: int, k: int = 576, f: int = 1536) -> dict[str, Timing]:
    """A gated feed-forward of SmolLM2's sizes: gate, up, product, down; product in the epilogue; int8 rows of it."""
    x = torch.randn(m, k)
    gate, up, down = stored(f, k), stored(f, k), stored(k, f)
    both = tuple(ops.interleave_glu(g, u) for g, u in zip(gate, up, strict=True))

    def rows_between() -> Tensor:
        return ops.linear_s8(*ops.linear_glu_quantize(x, *both, "silu"), *down)

    return timed(
        {
            "layers": lambda: ops.linear_dynamic(ops.linear_dynamic(x, *gate, "silu") * ops.linear_dynamic(x, *up), *down),
            "product": lambda: ops.linear_dynamic(ops.linear_glu(x, *both, "silu"), *down),
            "rows": rows_between,
        }
    )


def times_layers(m: int) -> float:
    """Of the better of the two fused forms."""
    found = gated(m)
    return found["layers"].best / min(found["product"].best, found["rows"].best)


def gated_note(m: int) -> str:
    return ", ".join(f"{name} {timing.best * 1e6:.0f} us" for name, timing in gated(m).items())


@functools.cache
def residuals(m: int, k: int = 1536, n: int = 384) -> dict[str, Timing]:
    x, residual, layer = torch.randn(m, k), torch.randn(m, n), stored(n, k)
    return timed(
        {
            "add": lambda: ops.linear_dynamic(x, *layer) + residual,
            "fused": lambda: ops.linear_dynamic(x, *layer, "none", 8, residual),
        }
    )


def times_add(m: int) -> float:
    return residuals(m)["add"].best / residuals(m)["fused"].best
