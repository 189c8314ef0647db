"""Measurements of bench/targets.py on importing the package."""

from __future__ import annotations

import functools
import re
import statistics
import subprocess
import sys

ROUNDS = 7


@functools.cache
def import_ms(code: str, *modules: str) -> float:
    """Milliseconds that `import torch; <code>` spends on `modules` and what they import first; median over new interpreters."""
    found = []
    for _ in range(ROUNDS):
        out = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", f"import torch; {code}"], capture_output=True, text=True, check=True
        ).stderr
        times = dict((name, int(us)) for us, name in re.findall(r"^import time:\s+\d+ \|\s+(\d+) \| ([\w.]+)$", out, re.M))
        found.append(sum(times[module] for module in modules) / 1000)
    return statistics.median(found)
