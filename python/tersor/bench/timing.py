"""Interleaved timing in one process: every contender is called in turn, round after round, so that a drift of the machine's speed
meets them all. Ratios are of minima; medians stand beside them."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Without AMX or AVX512-BF16 in play everyone computes with the same instructions; must be set before torch is imported.
PEER_CAP = "AVX512_CORE_VNNI"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def cpu_flags() -> set[str]:
    """The feature flags of this CPU as Linux names them; empty where it does not say."""
    return set(_cpu_facts("flags", "Features").split())


def cpu_name() -> str:
    """The CPU's own name."""
    return _cpu_facts("model name") or platform.processor() or platform.machine()


def _cpu_facts(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() in keys), "")


def machine_name() -> str:
    """For the header of a table."""
    return f"{cpu_name()}, {os.cpu_count()} cores"


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


@functools.cache
def keep_freed_memory() -> None:
    """glibc gives a freed result at the end of the heap back to the system, and then every call pays for its pages again: up to
    three times its own time here, or nothing, as the heap happens to lie. Benches keep freed memory, for every contender alike."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another libc
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
    mallopt(M_TRIM_THRESHOLD, 1 << 30)


class Timing(NamedTuple):
    best: float  # seconds a call
    median: float


class Noise:
    """Notices a machine that is not ours alone, from what the measurements themselves show.

    A thread that computes has CPU time as long as it runs: where wall time is longer, another process had the core. And the same
    work takes the same time while the clock stays: where a contender's rounds spread, it did not. One odd contender is not the
    machine: OpenVINO computes on a thread of its own while the caller waits.
    """

    LOST = 0.03  # share of the time another process may have had
    SPREAD = 0.15  # how far the median round may lie above the fastest, in the middle of all contenders

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}  # contender -> (wall, CPU)
        self.spreads: list[float] = []

    def add(self, name: str, wall: float, cpu: float) -> None:
        walls, cpus = self.seconds.get(name, (0.0, 0.0))
        self.seconds[name] = walls + wall, cpus + cpu

    @property
    def lost(self) -> float:
        """Share of the wall time in which this thread did not run, the median over contenders."""
        lost = [1 - cpu / wall for wall, cpu in self.seconds.values()]
        return max(0.0, statistics.median_low(lost)) if lost else 0.0

    @property
    def spread(self) -> float:
        """Median over contenders of (median round / best round - 1)."""
        return statistics.median_high(self.spreads) if self.spreads else 0.0

    def warning(self) -> str | None:
        """A sentence for people, or None on a quiet machine."""
        reasons = []
        if self.lost > self.LOST:
            reasons.append(f"other work had the core for {self.lost:.0%} of the time")
        if self.spread > self.SPREAD:
            reasons.append(f"rounds of the same work differ by {self.spread:.0%}")
        if not reasons:
            return None
        return f"noisy machine: {' and '.join(reasons)}; stop other work and run again, or trust only large ratios"


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    seconds: float = 0.02,
    on_round: Callable[[], None] | None = None,
    noise: Noise | None = None,
) -> dict[str, Timing]:
    """Times each contender `rounds` times, in turn; one measurement lasts about `seconds`, at least one call, after a warm-up.

    Who begins changes with each round. on_round is called outside the timed parts. `noise` gathers how quiet the machine was; only
    where most contenders compute on the calling thread, as waiting for another one counts as lost time.
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
            cpu = time.thread_time()
            start = time.perf_counter()
            for _ in range(n):
                f()
            wall = time.perf_counter() - start
            if noise is not None:
                noise.add(name, wall, time.thread_time() - cpu)
            samples[name].append(wall / n)
        if on_round:
            on_round()
    timings = {name: timing_of(s) for name, s in samples.items()}
    if noise is not None:
        noise.spreads += [t.median / t.best - 1 for t in timings.values()]
    return timings


def hot_and_cold(
    contenders: Mapping[str, Callable[[], object]],
    evict: Callable[[], object],
    rounds: int = 7,
    calls: int = 20,
) -> dict[str, tuple[Timing, Timing]]:
    """Two timings of each contender: hot, of `calls` calls in a row of which the first is dropped, and cold, of one call after
    evict(), which is to push everything out of the caches. Contenders take turns, round after round."""
    hot: dict[str, list[float]] = {name: [] for name in contenders}
    cold: dict[str, list[float]] = {name: [] for name in contenders}
    for f in contenders.values():
        f()
    for _ in range(rounds):
        for name, f in contenders.items():
            evict()
            start = time.perf_counter()
            f()
            cold[name].append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(calls - 1):
                f()
            hot[name].append((time.perf_counter() - start) / (calls - 1))
    return {name: (timing_of(hot[name]), timing_of(cold[name])) for name in contenders}


def timing_of(samples: list[float]) -> Timing:
    return Timing(min(samples), sorted(samples)[len(samples) // 2])


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
