"""Compiles csrc/cuda/launch.cu with nvcc and compares every kernel with tests/cuda_kernels.json: registers, spills, instructions.

python tests/cuda_build.py ARCH...                    e.g. 80 90a; fails on an error, a spill, or where a kernel is not as in the table
python tests/cuda_build.py --cuobjdump FOLDER ...     also what instructions it has; FOLDER holds cuobjdump and nvdisasm
python tests/cuda_build.py --cuobjdump FOLDER --write writes the table anew, of all architectures

Another nvcc than the table's allots registers differently: there only the limits below and the kinds of instructions are checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "cuda_kernels.json"
ARCHS = ("80", "89", "90a", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr")
COUNTED = ("IMMA", "BMMA", "IDP", "LDGSTS", "LDSM", "LDL", "STL")  # int8 and binary mma, dp4a, cp.async, ldmatrix, local memory

# Most registers of a kernel of each kind: 128 threads of 255 are two blocks a multiprocessor, of 168 three, of 128 four; a gemv has
# 256 threads, of 128 registers two blocks (4, 8 rows), of 80 three. Shape<16> has 64 threads: shared memory ends it at four blocks, registers
# never. Shapes are Shape<warp rows, ...> of csrc/cuda/run.cuh.
LIMITS = {
    r"gemm_int<.*Shape<64,": 255,
    r"gemm_int<Codes<4, true>, Shape<32,": 255,
    r"gemm_int<.*Shape<32,": 168,
    r"gemm_int<.*Shape<16,": 255,
    r"spmm_24": 168,
    r"gemv_int<.*, [48]>": 128,
    r"gemv_int": 80,
    r"sum_partial|quantize_rows|binarize_rows|norm_quantize": 64,
}
# What a kernel cannot do without, by its name and the architecture.
NEEDS = {
    r"gemm_int<Codes": ("IMMA", "LDGSTS"),
    r"gemm_int<Signs": ("BMMA", "LDGSTS"),
    r"spmm_24": ("IMMA", "LDGSTS", "LDSM"),
    r"gemv_int<Codes": ("IDP",),
}
NO_BMMA = ("100", "120")  # signs are multiplied by the 1-bit kernels there, see signs_as_int8

Kernels = dict[str, dict[str, int]]


def short(name: str) -> str:
    """tersor::cuda::gemm_int<tersor::cuda::Codes<8, false>, ...>(...) -> gemm_int<Codes<8, false>, ...>"""
    return re.sub(r"\(.*\)$", "", name.replace("tersor::cuda::", "").removeprefix("void ")).replace("> >", ">>")


def demangled(names: list[str]) -> list[str]:
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short(line) for line in out.splitlines()]


def compiled(arch: str, tools: Path | None) -> Kernels | str:
    """The kernels of one architecture, or what nvcc says against them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/launch.cubin"
        target = ("-gencode", f"arch=compute_{arch},code=sm_{arch}")
        words = ("nvcc", *FLAGS, *target, "-Xptxas", "-v", "-cubin", "csrc/cuda/launch.cu", "-o", cubin)
        out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        if out.returncode:
            return f"nvcc failed:\n{out.stdout}{out.stderr}"
        found = re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            out.stderr,
            re.DOTALL,
        )
        kernels: Kernels = {}
        for name, (_, stack, stores, loads, registers) in zip(demangled([f[0] for f in found]), found, strict=True):
            kernels[name] = {"registers": int(registers), "stack": int(stack), "spills": int(stores) + int(loads)}
        if tools is not None:
            path = f"{tools}{os.pathsep}{os.environ['PATH']}"
            words = (str(tools / "cuobjdump"), "-sass", cubin)
            sass = subprocess.run(words, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True).stdout
            parts = re.split(r"^\s*Function : (\w+)$", sass, flags=re.MULTILINE)[1:]
            for name, code in zip(demangled(parts[::2]), parts[1::2], strict=True):
                opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", code, re.MULTILINE)
                kernels[name] |= {opcode: opcodes.count(opcode) for opcode in COUNTED}
        return kernels


def nvcc_version() -> str:
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V([0-9.]+)", out)
    return match[1] if match else "unknown"


def wrong(arch: str, kernels: Kernels, table: Kernels | None) -> list[str]:
    lines = []
    for name, facts in kernels.items():
        limit = next((most for pattern, most in LIMITS.items() if re.search(pattern, name)), None)
        if limit is None:
            lines.append(f"{name}: no limit in tests/cuda_build.py")
        elif facts["registers"] > limit:
            lines.append(f"{name}: {facts['registers']} registers, at most {limit}")
        for what in ("spills", "stack", "LDL", "STL"):
            if facts.get(what):
                lines.append(f"{name}: {facts[what]} {what}, expected none")
        needs = next((needed for pattern, needed in NEEDS.items() if re.search(pattern, name)), ())
        for opcode in needs:
            if facts.get(opcode) == 0 and not ("BMMA" in needs and arch in NO_BMMA):
                lines.append(f"{name}: no {opcode}")
    for pattern in LIMITS:
        if not any(re.search(pattern, name) for name in kernels):
            lines.append(f"no kernel matches {pattern}")
    if table is not None:
        lines += [f"{name}: not in the table" for name in kernels.keys() - table.keys()]
        lines += [f"{name}: in the table only" for name in table.keys() - kernels.keys()]
        for name in kernels.keys() & table.keys():
            for fact, value in kernels[name].items():
                if value != table[name][fact]:
                    lines.append(f"{name}: {value} {fact}, the table has {table[name][fact]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", help=f"architectures; none: {' '.join(ARCHS)}")
    parser.add_argument("--cuobjdump", type=Path, metavar="FOLDER")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    archs = options.archs or list(ARCHS)
    if options.write and (options.cuobjdump is None or archs != list(ARCHS)):
        parser.error("--write needs --cuobjdump and all architectures")
    table = {} if options.write else json.loads(TABLE.read_text())
    version = nvcc_version()
    known = table.get("kernels", {}) if table.get("nvcc") == version else {}
    if not options.write and not known:
        print(f"nvcc {version}, the table is of {table['nvcc']}: limits and kinds of instructions only", flush=True)
    lines, everything = [], {}
    with ThreadPoolExecutor(2) as pool:
        for arch, kernels in zip(archs, pool.map(lambda arch: compiled(arch, options.cuobjdump), archs), strict=True):
            if isinstance(kernels, str):
                lines.append(f"sm_{arch}: {kernels}")
                continue
            lines += [f"sm_{arch}: {line}" for line in wrong(arch, kernels, known.get(arch))]
            everything[arch] = dict(sorted(kernels.items()))
            most = max(facts["registers"] for facts in kernels.values())
            print(f"sm_{arch}: {len(kernels)} kernels, at most {most} registers", flush=True)
    print("\n".join(lines))
    if options.write and not lines:
        rows = json.dumps({"nvcc": version, "kernels": everything}, indent=1)
        TABLE.write_text(
            re.sub(r"\{\n    *(\"registers\"[^}]*?)\n *\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", rows) + "\n"
        )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
