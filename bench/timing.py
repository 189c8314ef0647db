"""Interleaved timing in one process: every contender is called in turn, round after round, so that a drift of the machine's speed
meets them all. Ratios are of minima; medians stand beside them."""

from __future__ import annotations

import copy
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

# Without AMX or AVX512-BF16 in play everyone computes with the same instructions; must be set before torch is imported.
PEER_CAP = "AVX512_CORE_VNNI"


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    lines = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def cap_peers(unrestricted: bool = False) -> str:
    """Holds oneDNN to AVX512-VNNI where the CPU has more; returns what was done, for the header of a table.

    Must run before torch is imported. A value the caller has set stays.
    """
    wider = sorted({"amx_int8", "amx_bf16", "avx512_bf16"} & cpu_flags())
    given = os.environ.get("ONEDNN_MAX_CPU_ISA")
    if given:
        return f"oneDNN: ONEDNN_MAX_CPU_ISA={given} was given"
    if not wider:
        return "oneDNN: its own choice; this CPU has neither AMX nor AVX512-BF16"
    if unrestricted:
        return f"oneDNN: unrestricted, may use {', '.join(wider)}"
    if "torch" in sys.modules:
        raise RuntimeError("cap_peers: torch is already imported; call this before, or set ONEDNN_MAX_CPU_ISA outside")
    os.environ["ONEDNN_MAX_CPU_ISA"] = PEER_CAP
    return f"oneDNN: held at {PEER_CAP} (this CPU also has {', '.join(wider)})"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


class Timing(NamedTuple):
    best: float  # seconds a call
    median: float


def interleaved(
    contenders: dict[str, Callable[[], object]],
    rounds: int = 7,
    seconds: float = 0.02,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Times each contender `rounds` times, in turn; one measurement lasts about `seconds`, at least one call, after a warm-up.

    Who begins changes with each round. on_round is called outside the timed parts.
    """
    calls: dict[str, int] = {}
    for name, f in contenders.items():
        f()
        f()
        start = time.perf_counter()
        f()
        calls[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            f = contenders[name]
            f()  # brings this contender's weights back into the caches the others have taken
            n = calls[name]
            start = time.perf_counter()
            for _ in range(n):
                f()
            samples[name].append((time.perf_counter() - start) / n)
        if on_round:
            on_round()
    return {name: Timing(min(s), sorted(s)[len(s) // 2]) for name, s in samples.items()}


def quantize_dynamic_engines() -> list[str]:
    """torch's engines for quantize_dynamic worth a try: all it supports, but not qnnpack on x86: made for Arm, slower than fp32."""
    import torch

    left_out = {"none", "qnnpack"} if platform.machine() in ("x86_64", "AMD64") else {"none"}
    return [engine for engine in torch.backends.quantized.supported_engines if engine not in left_out]


def torch_quantize_dynamic(model: nn.Module, engine: str, per_channel: bool = False) -> nn.Module:
    """torch.ao's quantize_dynamic of a copy of `model` with that engine's packed weights; it is deprecated."""
    import torch

    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

            spec: Any = {torch.nn.Linear: per_channel_dynamic_qconfig} if per_channel else {torch.nn.Linear}
            return quantize_dynamic(copy.deepcopy(model), spec, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch.set_num_threads for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
