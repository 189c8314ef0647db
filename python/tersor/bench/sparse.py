"""`tersor bench sparse`: from how many zeros on a pruned layer is faster, against dense layers and other sparse kernels."""

from __future__ import annotations

import functools
import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format, Int8Dynamic, SparseFloat, SparseInt8
from ..nn import QuantLinear
from ..pruning_patterns import NM, Block, Pattern, Unstructured
from ..pruning_scores import keep_highest, magnitude
from .layers import stored_bytes
from .timing import Noise, Timing, hot_and_cold, interleaved, keep_freed_memory, torch_threads

DENSE, INT8, FLOAT, FP32 = "int8", "sparse int8", "sparse float", "fp32"
CSR, CSR_LINEAR, SCIPY = "torch CSR @ x", "F.linear(x, CSR)", "scipy CSR"
OTHERS = (CSR, CSR_LINEAR, SCIPY)
PATTERNS = ("unstructured", "16x4", "2:4")
STYLES = {"unstructured": "-", "16x4": ":"}  # of the plot's lines
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)


def pruned(weight: Tensor, pattern: str, sparsity: float) -> Tensor:
    """A copy of `weight` [N, K] without what is smallest; "2:4" is always half."""
    kind: Pattern = {"16x4": Block((16, 4), sparsity), "2:4": NM(2, 4)}.get(pattern, Unstructured(sparsity))
    everything = torch.ones_like(weight, dtype=torch.bool)
    return torch.where(keep_highest([magnitude(weight)], [everything], kind, 1.0, False)[0], weight, 0.0)


@dataclass(frozen=True)
class SparseRow:
    """One contender at one point. of_dense: bytes stored / those of the dense int8 layer; times_*: time of that / time of this."""

    k: int
    n: int
    m: int
    pattern: str
    sparsity: float
    name: str
    timing: Timing
    cold: Timing | None  # at M = 1, where `timing` is hot
    of_dense: float
    times_int8: float
    times_fp32: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "K": self.k,
            "N": self.n,
            "M": self.m,
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "contender": self.name,
            "min_us": round(self.timing.best * 1e6, 2),
            "cold_us": round(self.cold.best * 1e6, 2) if self.cold else "",
            "bytes_of_int8": round(self.of_dense, 4),
            "times_int8": round(self.times_int8, 3),
            "times_fp32": round(self.times_fp32, 3),
        }


@dataclass
class SparseBench:
    """What to measure: weights by name, or one of random numbers; every pattern x sparsity x number of rows."""

    size: tuple[int, int] = (4096, 4096)  # K, N
    rows: tuple[int, ...] = (1, 16, 64, 256)
    patterns: tuple[str, ...] = PATTERNS
    sparsities: tuple[float, ...] = SPARSITIES
    others: tuple[str, ...] = OTHERS
    threads: int = 1
    rounds: int = 5
    weight: Tensor | None = None  # float32 [N, K] to prune, in place of random numbers
    skipped: list[str] = field(default_factory=list)
    noise: Noise = field(default_factory=Noise)

    def cases(self) -> list[tuple[str, float]]:
        """(pattern, sparsity) of every weight."""
        return [(p, s) for p in self.patterns for s in (self.sparsities if p != "2:4" else (0.5,))]

    @torch.inference_mode()
    def run(self, on_case: Callable[[], None] = lambda: None) -> Iterator[SparseRow]:
        """Rows case by case, as they are measured."""
        keep_freed_memory()
        k, n = self.size
        torch.manual_seed(0)
        linear = nn.Linear(k, n)
        if self.weight is not None:
            linear = nn.Linear(self.weight.shape[1], self.weight.shape[0])
            linear.weight = nn.Parameter(self.weight.clone())
        evict = torch.ones(64 << 20, dtype=torch.uint8)
        dense = QuantLinear.from_linear(linear, Int8Dynamic())
        with torch_threads(self.threads):
            for pattern, sparsity in self.cases():
                yield from self._case(linear, dense, pattern, sparsity, lambda: evict.sum())
                on_case()

    def _case(
        self, linear: nn.Linear, dense: QuantLinear, pattern: str, sparsity: float, evict: Callable[[], object]
    ) -> Iterator[SparseRow]:
        layer = with_weight(linear, pruned(linear.weight.detach(), pattern, sparsity))
        ours = {INT8: QuantLinear.from_linear(layer, SparseInt8()), FLOAT: QuantLinear.from_linear(layer, SparseFloat())}
        stored = {name: stored_bytes(q) / stored_bytes(dense) for name, q in {DENSE: dense, **ours}.items()}
        n, k = layer.weight.shape
        for m in self.rows:
            x = torch.randn(m, k)
            layers: dict[str, nn.Module] = {FP32: layer, DENSE: dense, **ours}
            calls: dict[str, Callable[[], object]] = {name: functools.partial(f, x) for name, f in layers.items()}
            for name in self.others:
                try:
                    calls[name] = other(name, layer, x)
                except (ImportError, RuntimeError) as reason:
                    self._skip(f"{name}: {reason}")
            both: dict[str, tuple[Timing, Timing | None]] = {}
            if m == 1:
                both |= hot_and_cold(calls, evict, self.rounds)
            else:
                noise = self.noise if self.threads == 1 else None
                slow = {name: timing for name in OTHERS if name in calls and (timing := _if_slow(calls[name]))}
                fast = {name: f for name, f in calls.items() if name not in slow}
                times = interleaved(fast, self.rounds, 0.01, noise=noise) | slow
                both |= {name: (times[name], None) for name in calls}
            for name, (timing, cold) in both.items():
                ratios = (both[DENSE][0].best / timing.best, both[FP32][0].best / timing.best)
                yield SparseRow(k, n, m, pattern, sparsity, name, timing, cold, stored.get(name, float("nan")), *ratios)

    def _skip(self, reason: str) -> None:
        if reason not in self.skipped:
            self.skipped.append(reason)


def _if_slow(f: Callable[[], object], seconds: float = 0.1) -> Timing | None:
    """Timing of two calls of a contender so slow that rounds of it would take minutes, else None. Some are, a hundredfold."""
    calls = []
    for _ in range(2):
        start = time.perf_counter()
        f()
        calls.append(time.perf_counter() - start)
        if calls[-1] < seconds:
            return None
    return Timing(min(calls), max(calls))


def with_weight(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), linear.bias
    return layer


def other(name: str, layer: nn.Linear, x: Tensor) -> Callable[[], object]:
    """A sparse kernel that is not ours, on the non-zeros of layer.weight; ImportError where its package is missing."""
    bias = layer.bias
    if name == SCIPY:
        if importlib.util.find_spec("scipy") is None:
            raise ImportError("the package scipy is not installed")
        from scipy.sparse import csr_array  # type: ignore[import-untyped,import-not-found,unused-ignore]

        matrix, xn, bn = csr_array(layer.weight.detach().numpy()), x.numpy(), bias.detach().numpy()
        return lambda: (matrix @ xn.T).T + bn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that CSR is in beta
        csr = layer.weight.detach().to_sparse_csr()
    if name == CSR:
        return lambda: (csr @ x.t()).t() + bias
    if name == CSR_LINEAR:
        call = lambda: nn.functional.linear(x, csr) + bias  # noqa: E731
        call()  # a torch without MKL refuses
        return call
    raise ValueError(f"other: name is {name!r}, expected one of: {', '.join(OTHERS)}")


def chosen(layer: nn.Linear, fmt: Format, m: int) -> Format | None:
    """What only_if_faster makes of the layer at M rows."""
    from ..swap import quantize_

    made = next(iter(quantize_(nn.Sequential(layer), fmt, only_if_faster=m).children()))
    return made.format if isinstance(made, QuantLinear) else None


def break_even(rows: list[SparseRow], pattern: str, m: int, name: str, against: str) -> float | None:
    """The least measured sparsity from which on `name` is the faster one at every measured sparsity."""
    best = None
    for s in sorted({r.sparsity for r in rows if r.pattern == pattern}, reverse=True):
        at = {r.name: r.timing.best for r in rows if (r.pattern, r.m, r.sparsity) == (pattern, m, s)}
        if at[name] > at[against]:
            break
        best = s
    return best


def markdown(rows: list[SparseRow]) -> str:
    """A table: one line for each pattern, sparsity and M, times the speed of the dense int8 and fp32 layers."""
    names = list(dict.fromkeys(r.name for r in rows if r.name not in (DENSE, FP32)))
    lines = [
        "| pattern | zeros | M | int8 us | fp32 us | " + " | ".join(f"{name}: x int8, x fp32" for name in names) + " |",
        "|---" * (5 + len(names)) + "|",
    ]
    for p, s, m in dict.fromkeys((r.pattern, r.sparsity, r.m) for r in rows):
        at = {r.name: r for r in rows if (r.pattern, r.sparsity, r.m) == (p, s, m)}
        cells = [f"{at[n].times_int8:.2f}, {at[n].times_fp32:.1f}" if n in at else "-" for n in names]
        times = f"{at[DENSE].timing.best * 1e6:.0f} | {at[FP32].timing.best * 1e6:.0f}"
        lines.append(f"| {p} | {s:.0%} | {m} | {times} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path, rows: list[SparseRow], title: str) -> None:
    """Speed-up over dense int8 by sparsity, a panel for each M. RuntimeError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("--plot needs matplotlib: pip install 'tersor[plot]'") from None
    ms = sorted({r.m for r in rows})
    names = [name for name in dict.fromkeys(r.name for r in rows) if name != DENSE]
    figure = Figure(figsize=(3.4 * len(ms), 4.4), layout="constrained")
    panels = figure.subplots(1, len(ms), sharey=True, squeeze=False)[0]
    for axes, m in zip(panels, ms, strict=True):
        for i, name in enumerate(names):
            for pattern, style in STYLES.items():
                series = sorted((r.sparsity, r.times_int8) for r in rows if (r.m, r.name, r.pattern) == (m, name, pattern))
                if series and not (name == FP32 and pattern != "unstructured"):  # knows nothing of zeros
                    label = f"{name}, {pattern}" if name != FP32 else FP32
                    axes.plot(*zip(*series, strict=True), style, color=f"C{i}", marker="o", markersize=3, label=label)
        axes.axhline(1, color="0.4", linewidth=1)
        axes.set_yscale("log")
        axes.set_title(f"M = {m}", fontsize=9)
        axes.set_xlabel("share of zeros")
    panels[0].set_ylabel("times dense int8")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)
