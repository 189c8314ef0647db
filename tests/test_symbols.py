"""What the objects of the kernels contain. The linker keeps one copy of a weak function, from whichever object it meets first: a
copy compiled for AVX-512 would crash an older CPU. So a variant exports its table and nothing weak, and baseline objects hold no
wide code. TERSOR_CPP_BUILD names a build folder:
    cmake -G Ninja -S . -B DIR -DTERSOR_TORCH=OFF -DTERSOR_NUMPY=OFF -DTERSOR_CPP_TESTS=ON && ninja -C DIR
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import instruction_counts

ROOT = Path(__file__).parents[1]
BUILD = os.environ.get("TERSOR_CPP_BUILD", "")
ISAS = re.findall(r"^TERSOR_ISA_ROW\((\w+),", (ROOT / "csrc/core/isa.inc").read_text(), re.MULTILINE)
VARIANT = "tersor_{}.dir/csrc/cpu/variant.cpp.o"
CORE = sorted(path.name for path in (ROOT / "csrc/core").glob("*.cpp"))
# None of these may need AVX; sse41 runs on CPUs that have none.
BASELINE = [VARIANT.format("scalar"), VARIANT.format("sse41"), *(f"tersor_kernels.dir/csrc/core/{name}.o" for name in CORE)]
# VEX and EVEX mnemonics start with v, mask instructions with k; these general-purpose ones are VEX-encoded too (BMI1, BMI2).
VEX = re.compile(
    r"v\w+|k(mov|and|xn?or|or|not|test|shift|unpck|add)\w*|andn|bextr|bls(i|r|msk)|bzhi|mulx|pdep|pext|rorx|s(ar|hl|hr)x"
)
PREFIXES = {"lock", "rep", "repz", "repnz", "bnd", "notrack", "data16", "cs", "{vex}", "{evex}"}


def variant_objects() -> list[str]:
    """The isa.inc rows this platform builds: those of other architectures have no object."""
    built = sorted(p.name for p in Path(BUILD, "CMakeFiles").glob("tersor_*.dir")) if BUILD else []
    return [isa for isa in ISAS if not BUILD or f"tersor_{isa}.dir" in built]


def find(name: str) -> Path:
    if not BUILD:
        pytest.skip("TERSOR_CPP_BUILD names no build folder; tests/test_symbols.py says how to make one")
    cache = Path(BUILD, "CMakeCache.txt").read_text()
    if re.search(r"^TERSOR_SANITIZE:\w+=.", cache, re.MULTILINE):
        pytest.skip(f"{BUILD} is a sanitizer build: its symbols are the sanitizer's")
    path = Path(BUILD, "CMakeFiles", name)
    assert path.is_file(), f"{path} is missing: build {BUILD} first"
    return path


def output(tool: str, *args: str) -> list[str]:
    if not shutil.which(tool):
        pytest.skip(f"no {tool} on the PATH (binutils)")
    return subprocess.run([tool, *args], check=True, capture_output=True, text=True).stdout.splitlines()


def instructions(path: Path) -> list[str]:
    """`mnemonic operands` of every instruction; the bytes are left out, so the tab-separated columns are address and text."""
    lines = output("objdump", "-d", "--no-show-raw-insn", str(path))
    return [line.split("\t", 1)[1] for line in lines if re.match(r"\s*[0-9a-f]+:\t", line)]


def wide(path: Path) -> list[str]:
    found = []
    for text in instructions(path):
        mnemonic = next((word for word in text.split() if word not in PREFIXES), "")
        if re.search(r"%[yz]mm", text) or VEX.fullmatch(mnemonic):
            found.append(text)
    return found


@pytest.mark.parametrize("isa", variant_objects())
def test_variant_exports_its_table_only(isa):
    symbols = [line.split(maxsplit=2) for line in output("nm", "-C", "--defined-only", str(find(VARIANT.format(isa))))]
    weak = [name for _, kind, name in symbols if kind in "WwVvu"]
    assert not weak, f"weak symbols, of which the linker keeps any one copy: {weak}"
    exported = [(kind, name) for _, kind, name in symbols if kind.isupper()]
    assert [name for _, name in exported] == [f"tersor::{isa}::table"]
    assert exported[0][0] in "DR", "the table is data"  # D: .data.rel.ro, it holds addresses


@pytest.mark.parametrize("name", BASELINE)
def test_baseline_objects_hold_no_wide_code(name):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("wide registers are x86's")
    path = find(name)
    assert len(instructions(path)) > 20, "objdump shows no code"
    found = wide(path)
    assert not found, f"{len(found)} wide or VEX instructions, the first: {found[:5]}"


@pytest.mark.parametrize("isa", [i for i in variant_objects() if i.startswith("avx")])
def test_wide_code_is_recognised(isa):
    """The search above finds something where there is something to find."""
    assert len(wide(find(VARIANT.format(isa)))) > 100


@pytest.mark.parametrize("isa", [i for i in variant_objects() if i != "scalar"])
def test_every_micro_kernel_is_counted(isa):
    """docs/adding_an_isa.md has a row for each of a variant's kernels, of the block it has now."""
    if BUILD:
        find(VARIANT.format(isa))
    counts = (ROOT / "docs/adding_an_isa.md").read_text().partition("## Expected speed")[2]
    table = re.findall(rf"^\| {isa} \| ([^|]+) \| ([^|]+) \|", counts, re.MULTILINE)
    assert table, "no row"
    if BUILD:
        built = [row for row in instruction_counts.rows(Path(BUILD), "objdump", mca=False) if row[0] == isa]
        assert table == [(kernel, block) for _, kernel, block, *_ in built]
        assert all(int(products) > 0 for *_, products in [row[:4] for row in built])
