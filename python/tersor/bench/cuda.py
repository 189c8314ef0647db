"""`tersor bench cuda`: layers on a GPU, ours against torch._int_mm, cuBLAS in bfloat16 and torchao, in percent of the data sheet.

A contender is captured into a CUDA graph, so that what is timed is the GPU and not Python; CUDA events around its replays are the
clock. Hot: many replays in a row. Cold: one replay at a time, a buffer larger than the L2 cache written in between.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..advice import hardware
from ..formats import Format, Int8Dynamic
from ..nn import QuantLinear
from .layers import KERNEL, OURS, kernel_only, stored_bytes
from .our_formats import arithmetic
from .peers import Missing, relative_error
from .timing import Timing, timing_of

Call = Callable[[], object]


class Gpu:
    """A CUDA device as the bench uses it. Tests put another in its place."""

    def __init__(self) -> None:
        if torch.version.cuda is None:
            raise RuntimeError(f"tersor bench cuda: torch {torch.__version__} is a build without CUDA")
        if not torch.cuda.is_available():
            raise RuntimeError("tersor bench cuda: torch sees no CUDA device; see nvidia-smi and CUDA_VISIBLE_DEVICES")
        if not ops.NATIVE_CUDA:
            raise RuntimeError("tersor bench cuda: this installation has no CUDA kernels; build it with TERSOR_CUDA=ON")
        self.device = torch.device("cuda", torch.cuda.current_device())
        facts = torch.cuda.get_device_properties(self.device)
        self.name = facts.name
        self.l2_bytes = int(facts.L2_cache_size)

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def captured(self, f: Call) -> Call:
        """A replay of f. Raises RuntimeError where f does what a graph cannot hold."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            f()
            f()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            f()
        return graph.replay


class Clock:
    """Times replays on a Gpu."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.flusher = torch.empty(max(2 * gpu.l2_bytes, 1 << 20), dtype=torch.uint8, device=gpu.device)

    def flush(self) -> None:
        self.flusher.zero_()

    def seconds(self, f: Call, calls: int) -> float:
        """Of one call, the mean of `calls` in a row."""
        start, end = self.gpu.event(), self.gpu.event()
        start.record()
        for _ in range(calls):
            f()
        end.record()
        self.gpu.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    def hot_and_cold(self, contenders: Mapping[str, Call], rounds: int, seconds: float) -> dict[str, tuple[Timing, Timing]]:
        """Contenders take turns, round after round."""
        calls = {name: max(1, int(seconds / max(self.seconds(f, 3), 1e-7))) for name, f in contenders.items()}
        hot: dict[str, list[float]] = {name: [] for name in contenders}
        cold: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, f in contenders.items():
                hot[name].append(self.seconds(f, calls[name]))
                self.flush()
                cold[name].append(self.seconds(f, 1))
        return {name: (timing_of(hot[name]), timing_of(cold[name])) for name in contenders}


@dataclass(frozen=True)
class CudaRow:
    """One contender at one shape; ratio: cold time of the first contender / cold time of this; of_limit: the time that the data
    sheet allows / the cold time, NaN for a GPU that is not in the table."""

    k: int
    n: int
    m: int
    name: str
    hot: Timing
    cold: Timing
    ratio: float
    tmacs: float
    gbytes: float
    of_limit: float
    limited_by: str

    def to_dict(self) -> dict[str, object]:
        return {
            "K": self.k,
            "N": self.n,
            "M": self.m,
            "contender": self.name,
            "hot_us": round(self.hot.best * 1e6, 3),
            "hot_median_us": round(self.hot.median * 1e6, 3),
            "cold_us": round(self.cold.best * 1e6, 3),
            "cold_median_us": round(self.cold.median * 1e6, 3),
            "ratio": round(self.ratio, 4),
            "tmacs": round(self.tmacs, 3),
            "gbytes_per_s": round(self.gbytes, 2),
            "of_limit": round(self.of_limit, 4),
            "limited_by": self.limited_by,
        }


# ---- contenders ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rival:
    """make(linear, x) -> a function of x, or Missing. The linear layer and x are on the GPU, in bfloat16."""

    make: Callable[[nn.Linear, Tensor], Callable[[Tensor], Tensor]]
    limit: str  # "int8" or "bf16"
    weight_bytes: int  # of one weight


def _bf16(linear: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    return linear


def _int_mm(linear: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    """torch._int_mm on rows that are quantised outside, scale and bias by torch ops: cuBLAS as PyTorch code calls it."""
    if x.shape[0] <= 16 or linear.in_features % 8 or linear.out_features % 8:
        raise Missing("int-mm: torch._int_mm takes M above 16 and multiples of 8")
    q, w_scale, _ = ops.quantize_rows(linear.weight.detach().float())
    w = q.t()
    xq, x_scale, _ = ops.quantize_rows(x)
    scales = x_scale.unsqueeze(1) * w_scale
    return lambda _: torch.addcmul(linear.bias.float(), torch._int_mm(xq, w).float(), scales).to(x.dtype)


def _torchao(linear: nn.Linear, x: Tensor) -> Callable[[Tensor], Tensor]:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise Missing(f"torchao: {error}") from None
    model = nn.Sequential(copy.deepcopy(linear))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    # As its makers advise. Eagerly it looks at the text of each activation, values and all, which no CUDA graph can hold.
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False)
    return compiled


RIVALS: dict[str, Rival] = {
    "bf16": Rival(_bf16, "bf16", 2),
    "int-mm": Rival(_int_mm, "int8", 1),
    "torchao": Rival(_torchao, "int8", 1),
}
_MOST_OFF = 0.1  # relative error (Frobenius) up to which a rival counts as right; 8 bits give about 0.01


@dataclass
class CudaBench:
    """What to measure: each (K, N) of `shapes` at each M of `rows`, x in bfloat16."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] = (1, 16, 256, 4096)
    format: Format = field(default_factory=Int8Dynamic)
    against: tuple[str, ...] = ("bf16", "int-mm", "torchao")
    rounds: int = 7
    seconds: float = 0.02
    skipped: list[str] = field(default_factory=list)

    def cases(self) -> list[tuple[int, int, int]]:
        return [(k, n, m) for (k, n), m in itertools.product(self.shapes, self.rows)]

    @torch.inference_mode()
    def run(self, gpu: Gpu, on_case: Callable[[], None] = lambda: None) -> Iterator[CudaRow]:
        """Rows case by case, as they are measured. ValueError on an unknown contender."""
        for name in self.against:
            if name not in RIVALS:
                raise ValueError(f"unknown contender {name!r}, expected some of: {', '.join(RIVALS)}")
        clock = Clock(gpu)
        for k, n in self.shapes:
            torch.manual_seed(0)
            linear = nn.Linear(k, n, device=gpu.device, dtype=torch.bfloat16).eval()
            ours = QuantLinear.from_linear(linear, self.format).to(gpu.device)
            for m in self.rows:
                x = torch.randn(m, k, device=gpu.device, dtype=torch.bfloat16)
                yield from self._case(gpu, clock, linear, ours, x)
                on_case()

    def _case(self, gpu: Gpu, clock: Clock, linear: nn.Linear, ours: QuantLinear, x: Tensor) -> Iterator[CudaRow]:
        (m, k), n = x.shape, linear.out_features
        calls: dict[str, Call] = {}
        costs: dict[str, tuple[str, int]] = {}  # limit, bytes of weights
        for name in self.against:
            rival = RIVALS[name]
            try:
                layer = rival.make(linear, x)
                off = relative_error(layer(x), linear, x)
                if not off <= _MOST_OFF:  # NaN included
                    raise Missing(f"{name}: its result is off by {off:.2f}, expected up to {_MOST_OFF}")
                calls[name] = gpu.captured(lambda layer=layer: layer(x))  # type: ignore[misc]
            except Missing as reason:
                self._skip(str(reason))
            except Exception as error:  # a rival's own failure must not end the bench
                self._skip(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            else:
                costs[name] = (rival.limit, rival.weight_bytes * n * k)
        ours_costs = ("bf16" if arithmetic(self.format) == "f32" else "int8", stored_bytes(ours))
        calls[OURS], costs[OURS] = gpu.captured(lambda: ours(x)), ours_costs
        kernel = kernel_only(ours, x)
        if kernel is not None:
            calls[KERNEL], costs[KERNEL] = gpu.captured(kernel), ours_costs
        timings = clock.hot_and_cold(calls, self.rounds, self.seconds)
        baseline = timings[next(iter(calls))][1].best
        sheet = hardware.gpu(gpu.name)
        macs = m * n * k
        for name, (hot, cold) in timings.items():
            limit, weights = costs[name]
            moved = weights + m * (k + n) * x.element_size()
            bounds: dict[str, float] = {}
            peak = sheet and {"int8": sheet.int8_ops, "bf16": sheet.bf16_ops}[limit]
            if sheet and peak:
                bounds = {limit: 2 * macs / peak, "memory": moved / sheet.bandwidth}
            limited_by = max(bounds, key=lambda b: bounds[b]) if bounds else "not in the table"
            yield CudaRow(
                k,
                n,
                m,
                name,
                hot,
                cold,
                baseline / cold.best,
                macs / cold.best / 1e12,
                moved / cold.best / 1e9,
                bounds[limited_by] / cold.best if bounds else float("nan"),
                limited_by,
            )

    def _skip(self, reason: str) -> None:
        if reason not in self.skipped:
            self.skipped.append(reason)


def markdown(rows: list[CudaRow]) -> str:
    """The rows as a table."""
    lines = [
        "| K x N | M | contender | hot us | cold us | ratio | TMAC/s | GB/s | of data sheet |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(
            f"| {r.k} x {r.n} | {r.m} | {r.name} | {r.hot.best * 1e6:.1f} | {r.cold.best * 1e6:.1f} | {r.ratio:.2f}x | "
            f"{r.tmacs:.2f} | {r.gbytes:.0f} | {r.of_limit:.0%} {r.limited_by} |"
        )
    return "\n".join(lines)
