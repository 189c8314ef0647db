"""Compiles csrc/cuda/launch.cu with nvcc and reads what ptxas says of every kernel: registers, spills.

python tests/cuda_build.py ARCH...      e.g. 80 90a; fails on an error, or where a kernel spills or exceeds its registers
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "89", "90a", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr")

# Most registers of a kernel of each kind: 128 threads of 255 are two blocks a multiprocessor, of 168 three, of 128 four; a gemv has
# 256 threads, of 128 registers two blocks (4 rows), of 80 three. Shape<16> has 64 threads: shared memory ends it at four blocks, registers
# never. Shapes are Shape<warp rows, ...> of csrc/cuda/run.cuh.
LIMITS = {
    r"gemm_int.*ShapeILi64E": 255,
    r"gemm_int.*Li4ELb1E.*ShapeILi32E": 255,
    r"gemm_int.*ShapeILi32E": 168,
    r"gemm_int.*ShapeILi16E": 255,
    r"gemv_int.*ELi4EEEv": 128,
    r"gemv_int": 80,
    r"sum_partial|quantize_rows|binarize_rows": 64,
}


def check(arch: str) -> list[str]:
    """What is wrong with the kernels of one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        target = ("-gencode", f"arch=compute_{arch},code=sm_{arch}")
        words = ("nvcc", *FLAGS, *target, "-Xptxas", "-v", "-cubin", "csrc/cuda/launch.cu", "-o", f"{folder}/launch.cubin")
        out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if out.returncode:
        return [f"nvcc failed:\n{out.stdout}{out.stderr}"]
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", out.stderr, re.DOTALL
    )
    wrong, seen = [], set()
    most = 0
    for name, _, spills, registers in found:
        limit = next((pattern for pattern in LIMITS if re.search(pattern, name)), None)
        if limit is None:
            wrong.append(f"{name}: no limit in tests/cuda_build.py")
            continue
        seen.add(limit)
        most = max(most, int(registers))
        if int(registers) > LIMITS[limit]:
            wrong.append(f"{name}: {registers} registers, at most {LIMITS[limit]}")
        if int(spills):
            wrong.append(f"{name}: {spills} bytes spilled")
    wrong += [f"no kernel matches {pattern}" for pattern in LIMITS if pattern not in seen]
    print(f"sm_{arch}: {len(found)} kernels, at most {most} registers", flush=True)
    return wrong


def main() -> int:
    wrong = [f"sm_{arch}: {line}" for arch in sys.argv[1:] or ARCHS for line in check(arch)]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
