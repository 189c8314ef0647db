"""Interleaved timing in one process: every contender is called in turn, round after round, so that a drift of the machine's speed
meets them all. Ratios are of minima; medians stand beside them."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Without AMX or AVX512-BF16 in play everyone computes with the same instructions; must be set before torch is imported.
PEER_CAP = "AVX512_CORE_VNNI"


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    lines = [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def cap_peers() -> str:
    """Holds oneDNN to AVX512-VNNI where the CPU has more; returns what was done, for the header of a table."""
    if {"amx_int8", "avx512_bf16"} & cpu_flags() and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        os.environ["ONEDNN_MAX_CPU_ISA"] = PEER_CAP
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f"ONEDNN_MAX_CPU_ISA={cap}" if cap else "peers unrestricted"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


@dataclass(frozen=True)
class Timing:
    best: float  # seconds a call
    median: float


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int = 7, seconds: float = 0.02) -> dict[str, Timing]:
    """Times each contender `rounds` times, in turn; one measurement lasts about `seconds`, at least one call, after a warm-up."""
    calls: dict[str, int] = {}
    for name, f in contenders.items():
        f()
        f()
        start = time.perf_counter()
        f()
        calls[name] = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, f in contenders.items():
            f()  # brings this contender's weights back into the caches the others have taken
            n = calls[name]
            start = time.perf_counter()
            for _ in range(n):
                f()
            samples[name].append((time.perf_counter() - start) / n)
    return {name: Timing(min(s), sorted(s)[len(s) // 2]) for name, s in samples.items()}


def quantize_dynamic_engines() -> list[str]:
    """torch's engines for quantize_dynamic that run on this CPU."""
    import torch

    return [e for e in torch.backends.quantized.supported_engines if e in ("onednn", "x86", "fbgemm", "qnnpack")]


def torch_quantize_dynamic(model, engine: str):
    """torch.ao's quantize_dynamic of a copy of `model` on one engine; it is deprecated, which is why we are here."""
    import torch

    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before
