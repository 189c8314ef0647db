"""`tersor bench linear`: layers of given shapes, ours against others, each in percent of what this machine can do."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..formats import Format, Int8Dynamic
from ..nn import QuantLinear
from .machine import Limits, Machine
from .our_formats import arithmetic
from .peers import PEERS, Layer, Missing, expand, make_peer
from .timing import Noise, Timing, interleaved, keep_freed_memory, torch_threads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# (K, N) of the linear layers of well-known models.
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "minilm": ((384, 384), (384, 1536), (1536, 384)),  # all-MiniLM-L6-v2
    "bert": ((768, 768), (768, 3072), (3072, 768)),  # bert-base
    "smollm": ((576, 576), (576, 192), (576, 1536), (1536, 576)),  # SmolLM2-135M
    "llama": ((4096, 4096), (4096, 11008), (11008, 4096)),  # Llama-2-7B
}

OURS, KERNEL = "tersor", "tersor kernel"


@dataclass(frozen=True)
class Row:
    """One contender at one shape. gmacs: GMAC/s; gbytes: GB/s of weights, x and y; of_limit: time the limit allows / time taken."""

    k: int
    n: int
    m: int
    dtype: str
    threads: int
    name: str
    timing: Timing
    ratio: float  # time of the baseline / time of this
    gmacs: float
    gbytes: float
    of_limit: float
    limited_by: str  # "int8", "f32", "popcount", or the level of memory the weights come from

    def to_dict(self) -> dict[str, object]:
        return {
            "K": self.k,
            "N": self.n,
            "M": self.m,
            "dtype": self.dtype,
            "threads": self.threads,
            "contender": self.name,
            "min_us": round(self.timing.best * 1e6, 3),
            "median_us": round(self.timing.median * 1e6, 3),
            "ratio": round(self.ratio, 4),
            "gmacs": round(self.gmacs, 2),
            "gbytes_per_s": round(self.gbytes, 2),
            "of_limit": round(self.of_limit, 4),
            "limited_by": self.limited_by,
        }


@dataclass
class Bench:
    """What to measure: each (K, N) of `shapes` at each M of `rows`, contenders `against` (the first is the baseline) and ours."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] = (1, 16, 256)
    format: Format = field(default_factory=Int8Dynamic)
    dtype: torch.dtype = torch.float32
    threads: int = 1
    against: tuple[str, ...] = ("fp32",)
    rounds: int = 7
    seconds: float = 0.02
    skipped: list[str] = field(default_factory=list)  # peers that could not take part, with the reason
    noise: Noise = field(default_factory=Noise)

    def cases(self) -> list[tuple[int, int, int]]:
        """(K, N, M) of every case."""
        return [(k, n, m) for (k, n), m in itertools.product(self.shapes, self.rows)]

    @torch.inference_mode()
    def run(self, machine: Machine, on_case: Callable[[], None] = lambda: None) -> Iterator[Row]:
        """Rows case by case, as they are measured."""
        keep_freed_memory()
        limits = machine.with_threads(self.threads)
        names = expand(list(self.against))
        with torch_threads(self.threads):
            for k, n in self.shapes:
                torch.manual_seed(0)
                linear = nn.Linear(k, n).eval()
                ours = QuantLinear.from_linear(linear, self.format)
                known: dict[str, Layer] = {OURS: ours, KERNEL: ours}  # layers that serve any number of rows
                for m in self.rows:
                    yield from self._case(linear, known, m, names, machine, limits)
                    on_case()

    def _case(
        self, linear: nn.Linear, known: dict[str, Layer], m: int, names: list[str], machine: Machine, limits: Limits
    ) -> Iterator[Row]:
        ours = known[OURS]
        assert isinstance(ours, QuantLinear)
        n, k = linear.weight.shape
        x = torch.randn(m, k).to(self.dtype)
        contenders: dict[str, Callable[[], object]] = {}
        layers = dict(known)
        for name in names:
            try:
                layers[name] = layer = known.get(name) or make_peer(name, linear, x)
            except Missing as reason:
                self._skip(str(reason))
                continue
            if isinstance(layer, QuantLinear):
                known[name] = layer
            contenders[name] = lambda layer=layer: layer(x)  # type: ignore[misc]
        contenders[OURS] = lambda: ours(x)
        kernel = kernel_only(ours, x)
        if kernel is None:
            self._skip(f"{KERNEL}: {self.format!r} is one op from float rows to y, no kernel can be timed apart from it")
        else:
            contenders[KERNEL] = kernel
        # Threads that wait for each other are idle without a neighbour's doing.
        noise = self.noise if self.threads == 1 else None
        timings = interleaved(contenders, self.rounds, self.seconds, noise=noise)
        baseline = timings[next(iter(contenders))].best
        item = x.element_size()
        for name, timing in timings.items():
            layer = layers[name]
            if isinstance(layer, QuantLinear):
                weights, computes = stored_bytes(layer), arithmetic(layer.format)
            else:
                weights, computes = PEERS[name].weight_bytes(n, k, item), PEERS[name].limit
            moved = weights + m * (k + n) * item
            macs = m * n * k
            level = machine.level(weights // self.threads if level_is_private(machine, weights, self.threads) else weights)
            bounds = {computes: macs / (getattr(limits, computes) * 1e9), level: moved / (limits.read[level] * 1e9)}
            limited_by = max(bounds, key=lambda b: bounds[b])
            yield Row(
                k,
                n,
                m,
                str(self.dtype).removeprefix("torch."),
                self.threads,
                name,
                timing,
                baseline / timing.best,
                macs / timing.best / 1e9,
                moved / timing.best / 1e9,
                bounds[limited_by] / timing.best,
                limited_by,
            )

    def _skip(self, reason: str) -> None:
        if reason not in self.skipped:
            self.skipped.append(reason)


def level_is_private(machine: Machine, weights: int, threads: int) -> bool:
    """Whether each thread's share of the weights fits into a cache of its own."""
    return machine.level(weights // threads) in ("L1", "L2")


def stored_bytes(layer: QuantLinear) -> int:
    """Bytes of everything the layer stores."""
    return sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])


def kernel_only(layer: QuantLinear, x: Tensor) -> Callable[[], object] | None:
    """The matrix product alone: rows already quantised where the format quantises them, no module around the op. None where the
    format has no such op: group scales are applied and signs of x taken within the product, sparse weights take float rows."""
    parameters, buffers = layer._parameters, layer._buffers
    if layer.format.op not in (ops.linear_dynamic, ops.linear_static, ops.linear_weight_only):
        return None
    weight_packed, weight_scale = parameters["weight_packed"], buffers["weight_scale"]
    if layer.format.op is ops.linear_weight_only:
        raw = ops.linear_weight_only.raw
        return lambda: raw(x, weight_packed, weight_scale, layer.bias)
    q, scale, row_sum = ops.quantize_rows(x)
    linear_s8, bits = ops.linear_s8.raw, layer.format.bits
    return lambda: linear_s8(q, scale, row_sum, weight_packed, weight_scale, layer.bias, "none", x.dtype, bits)


def made_by(name: str, option: str = "model") -> Any:
    """What `module:factory` makes; the factory takes no arguments. ValueError, naming the option, where there is none."""
    return attribute(name, option)()


def attribute(name: str, option: str) -> Any:
    """The function that `module:name` stands for, the working folder's modules included."""
    module_name, _, attribute_name = name.partition(":")
    if not module_name or not attribute_name:
        raise ValueError(f"{option} is {name!r}, expected module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m has it; a console script does not look in the working folder
    try:
        found = getattr(importlib.import_module(module_name), attribute_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option} {name!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"{option} {name!r} is {type(found).__name__}, expected a function")
    return found


def shapes_of_model(name: str) -> tuple[tuple[int, int], ...]:
    """(K, N) of the distinct nn.Linear layers of `module:factory`'s model; the factory takes no arguments."""
    model = made_by(name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} made {type(model).__name__}, expected an nn.Module")
    found = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear | QuantLinear)]
    if not found:
        raise ValueError(f"model {name!r} has no linear layers")
    return tuple(dict.fromkeys(found))
