"""What this machine can do at most: arithmetic of the instruction set in use and read bandwidth of each level of memory, for one
thread and for all. Measured in this process, kept in the user's cache folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import native
from ..json_files import write_json
from .timing import cpu_name

logger = logging.getLogger("tersor")

_VERSION = 1  # of the file in the cache; another one is measured anew
_SECONDS = 0.01  # a loop lasts about this long
_REPEATS = 7
# Footprints: inside a cache with room for what else lives there; DRAM far beyond the largest.
_DRAM_BYTES = 256 << 20


@dataclass(frozen=True)
class Limits:
    """Best of several runs, with `threads` threads at once.

    int8, f32  GMAC/s of register-only loops: 8-bit codes x s8 as the integer GEMM does it, float32 multiply-adds
    popcount   Gbit-MAC/s of xor + popcount + add
    read       GB/s of a read loop with four streams, by level: "L1", "L2", "L3", "DRAM"
    """

    threads: int
    int8: float
    f32: float
    popcount: float
    read: dict[str, float]


@dataclass(frozen=True)
class Machine:
    """The limits of one machine under one instruction set; caches: bytes of "L1", "L2", "L3" as one core sees them."""

    cpu: str
    isa: str
    caches: dict[str, int]
    limits: tuple[Limits, ...]

    def with_threads(self, threads: int) -> Limits:
        """The limits measured with that many threads, or scaled from one thread where that count was not measured."""
        for limits in self.limits:
            if limits.threads == threads:
                return limits
        one, most = self.limits[0], self.limits[-1]
        share = min(threads, most.threads)
        scale = 1 + (share - 1) / max(most.threads - 1, 1) * (most.int8 / one.int8 - 1)
        return Limits(
            threads,
            one.int8 * scale,
            one.f32 * scale,
            one.popcount * scale,
            {level: min(one.read[level] * scale, max(one.read[level], most.read[level])) for level in one.read},
        )

    def level(self, footprint: int) -> str:
        """The nearest level of memory that holds `footprint` bytes, leaving a quarter for the rest."""
        for name, size in self.caches.items():
            if footprint <= size * 3 // 4:
                return name
        return "DRAM"


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches of core 0; typical sizes where the system does not say."""
    sizes = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level = "L" + (folder / "level").read_text().strip()
            kind, size = (folder / "type").read_text().strip(), (folder / "size").read_text().strip()
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:])
        if level in sizes and kind != "Instruction" and unit and size[:-1].isdigit():
            sizes[level] = int(size[:-1]) * unit
    return sizes


def measure(threads: tuple[int, ...] | None = None, on_step: Callable[[], None] = lambda: None) -> Machine:
    """Measures now. threads: counts to measure with; None: one and all that this process may use. RuntimeError without native."""
    module = native.numpy_module()
    if module is None:
        raise RuntimeError("tersor bench: the machine's limits need the native library, which is missing here")
    info = native.cpu_info()
    assert info is not None
    counts = threads or tuple(sorted({1, usable_cores()}))
    caches = cache_sizes()
    made = []
    for count in counts:
        rate = {}
        for what in ("int8", "f32", "popcount"):
            rate[what] = _best_rate(module.run_limit, what, count, [np.zeros(0, np.uint8)] * count)
            on_step()
        read = {}
        for level, size in footprints(caches, count).items():
            buffers = [np.ones(size, np.uint8) for _ in range(count)]  # written, so that every page is there
            read[level] = _best_rate(module.run_limit, "read", count, buffers)
            on_step()
        made.append(Limits(count, rate["int8"], rate["f32"], rate["popcount"], read))
    return Machine(cpu_name(), info["kernels"]["limits"], caches, tuple(made))


def steps(threads: int) -> int:
    """How often measure() reports a step, for a progress bar."""
    return 7 * threads


def footprints(caches: dict[str, int], threads: int) -> dict[str, int]:
    """Bytes each thread reads to see one level: L3 is shared, and on a server much of it belongs to others."""
    return {
        "L1": caches["L1"] // 2,
        "L2": caches["L2"] // 2,
        "L3": max(caches["L2"] * 2, min(caches["L3"] // 4, 8 << 20) // threads),
        "DRAM": max(_DRAM_BYTES, 4 * caches["L3"]) // threads,
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _best_rate(run: Any, what: str, threads: int, buffers: list[Any]) -> float:
    """1e9 units of work a second, all threads together: the best of several runs in which all start at once."""
    iterations = 1
    while True:
        work, seconds = run(what, iterations, buffers[0])
        if seconds > _SECONDS / 4 or work == 0:
            break
        iterations *= 2
    if threads == 1:
        runs = [run(what, iterations, buffers[0]) for _ in range(_REPEATS)]
        return max(work / max(seconds, 1e-9) for work, seconds in runs) / 1e9
    barrier = threading.Barrier(threads)
    results: list[list[tuple[int, float]]] = [[] for _ in range(threads)]

    def worker(index: int) -> None:
        for _ in range(_REPEATS):
            barrier.wait()
            results[index].append(run(what, iterations, buffers[index]))

    workers = [threading.Thread(target=worker, args=(i,)) for i in range(threads)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    # Each thread's own rate counts: loops of equal length overlap but for the time it takes to wake up.
    return max(sum(work / max(seconds, 1e-9) for work, seconds in turn) for turn in zip(*results, strict=True)) / 1e9


# ---- the cache ----------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where this system keeps the caches of a user's programs."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tersor"


def _cache_file(isa: str) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in f"{cpu_name()}-{platform.machine()}-{usable_cores()}-{isa}")
    return cache_folder() / f"machine-{name}.json"


def load(isa: str) -> Machine | None:
    """The kept limits of this machine under `isa`; None where there are none, or the file is damaged or of another version."""
    try:
        data = json.loads(_cache_file(isa).read_text(encoding="utf-8"))
        if data["version"] != _VERSION or (data["cpu"], data["isa"]) != (cpu_name(), isa):
            return None
        limits = tuple(
            Limits(
                int(entry["threads"]),
                _positive(entry["int8"]),
                _positive(entry["f32"]),
                _positive(entry["popcount"]),
                {level: _positive(entry["read"][level]) for level in ("L1", "L2", "L3", "DRAM")},
            )
            for entry in data["limits"]
        )
        if not limits or limits[0].threads != 1:
            return None
        return Machine(data["cpu"], isa, {level: int(_positive(data["caches"][level])) for level in ("L1", "L2", "L3")}, limits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} is not a positive number")
    return number


def keep(machine: Machine) -> Path | None:
    """Writes the limits into the cache, all or nothing; None (and a log line) where the folder cannot be written."""
    path = _cache_file(machine.isa)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"version": _VERSION, **dataclasses.asdict(machine)})
    except OSError as error:
        logger.info("tersor bench: the machine's limits are not kept: %s", error)
        return None
    return path


def this_machine(fresh: bool = False, on_step: Callable[[], None] = lambda: None) -> Machine:
    """The limits of this machine: kept ones, or measured now (a few seconds) and kept."""
    info = native.cpu_info()
    kept = None if fresh or info is None else load(info["kernels"]["limits"])
    if kept is not None:
        return kept
    machine = measure(on_step=on_step)
    keep(machine)
    return machine
