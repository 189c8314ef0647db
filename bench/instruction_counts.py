"""What compiled inner loops ask of a CPU's ports: multiply-adds a cycle of every micro-kernel against what its multipliers allow.

python bench/instruction_counts.py build/cpp build/arm    the table of docs/adding_an_isa.md, from these build folders (tests/run.py
                                                          --only cpp and --only arm make them)
python bench/instruction_counts.py build/cpp --mca        beside it what llvm-mca's models of older CPUs make of the same loops

Nothing is run: the innermost loop of the largest block is taken from the object and its vector instructions are counted. A vector
instruction takes one of the CPU's pipes, a multiplication one of those that multiply, a load alone a load port, a move between
registers nothing. Prefetches and scalar instructions run beside them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Instructions a cycle, of vectors as wide as the variant's: any, multiplications, loads, popcounts or what stands for them."""

    name: str
    vector: float
    products: float
    loads: float
    popcounts: float = 2
    mca: str = ""  # of llvm-mca 14


# From uops.info and Fog's instruction tables for x86, from Arm's software optimisation guides for its cores. A 512-bit instruction
# takes two of Zen 4's four pipes.
ZEN4_512 = Machine("Zen 4", 2, 1, 1, 1, "icelake-server")
MACHINES = {
    "avx512_vnni": ZEN4_512,
    "avx512_icl": ZEN4_512,
    "avx_vnni": Machine("Alder Lake P", 3, 2, 3, mca="alderlake"),
    "avx2": Machine("Zen 4", 4, 2, 2, mca="znver3"),
    "sse41": Machine("Nehalem", 3, 1, 1, mca="nehalem"),
    "neon_i8mm": Machine("Neoverse N2", 2, 2, 3),
    "neon_dotprod": Machine("Neoverse N1", 2, 2, 2),
    "neon": Machine("Cortex-A72", 2, 1, 1),
}
# Of Sapphire Rapids, Intel's optimisation manual: cycles from one to the next.
TILE_CYCLES = {"tdpbsud": 16, "tileloadd": 8}

# Multiply-adds of an instruction by bits of its vectors.
PRODUCTS = {
    "vpdpbusd": lambda bits: bits // 8,
    "pmaddwd": lambda bits: bits // 16,
    "pmaddubsw": lambda bits: bits // 8,
    "sdot": lambda bits: 16,
    "usdot": lambda bits: 16,
    "usmmla": lambda bits: 32,
    "smull": lambda bits: 8,
    "smull2": lambda bits: 8,
    "tdpbsud": lambda bits: 16 * 16 * 64,
}
COUNTS = {"vpopcntd": lambda bits: bits, "pshufb": lambda bits: bits // 2, "cnt": lambda bits: bits}
LOADS = re.compile(r"v?movd?[qau]\w*|v?movap\w|v?movup\w|v?p?broadcast\w+|ldr|ldp|ld1r?|ldur|vbroadcast\w+")
NAMES = {
    "Codes<8>": "8 bits",
    "SplitCodes": "8 bits, widened",
    "Codes<4>": "4 bits",
    "Codes<2>": "2 bits",
    "Codes<1>": "1 bit",
    "Xnor": "signs x signs",
}


@dataclass(frozen=True)
class Instruction:
    address: int
    mnemonic: str
    operands: str

    @property
    def vector_bits(self) -> int:
        widths = {"z": 512, "y": 256, "x": 128}
        found = [widths[w] for w in re.findall(r"%([xyz])mm", self.operands)]
        return max(found) if found else 128 if re.search(r"\b[vq]\d+\b|\bd\d+\b", self.operands) else 0

    @property
    def base(self) -> str:
        """The mnemonic without what VEX puts before it."""
        return self.mnemonic[1:] if re.match(r"vp(madd|shufb)", self.mnemonic) else self.mnemonic

    @property
    def reads_memory(self) -> bool:
        return "(" in self.operands or "[" in self.operands

    @property
    def moves(self) -> bool:
        return not self.reads_memory and re.fullmatch(r"v?movdq[au]\w*|v?movap\w|mov", self.mnemonic) is not None

    @property
    def loads_only(self) -> bool:
        return self.reads_memory and LOADS.fullmatch(self.mnemonic) is not None


def functions(path: Path, objdump: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Name and instructions of each function of an object."""
    text = subprocess.run([objdump, "-dC", "--no-show-raw-insn", str(path)], check=True, capture_output=True, text=True).stdout
    text = text.replace("{vex} ", "")
    for part in re.split(r"\n\n(?=[0-9a-f]{16} <)", text):
        head = re.search(r"^[0-9a-f]{16} <(.*)>:$", part, re.MULTILINE)
        lines = re.findall(r"^\s*([0-9a-f]+):\t(\S+)[ \t]*([^\n]*)$", part, re.MULTILINE)
        if head:
            yield head[1], [Instruction(int(a, 16), m, o.strip()) for a, m, o in lines]


def inner_loop(code: list[Instruction], products: dict) -> list[Instruction]:
    """The loop with most products that holds no other loop with products; empty where there is none."""
    loops = []
    for i in code:
        target = re.match(r"(?:\w+, )*([0-9a-f]+) <", i.operands)
        if target and (i.mnemonic.startswith(("j", "b.")) or i.mnemonic in ("b", "cbnz")) and int(target[1], 16) <= i.address:
            loop = [j for j in code if int(target[1], 16) <= j.address <= i.address]
            if any(j.base in products for j in loop):
                loops.append(loop)
    inner = [
        a for a in loops if not any(b[0].address >= a[0].address and b[-1].address <= a[-1].address and b is not a for b in loops)
    ]
    return max(inner, key=lambda loop: sum(i.base in products for i in loop), default=[])


def kernels(path: Path, isa: str, objdump: str) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Name, block and loop of the largest block of each micro-kernel in a variant's object."""
    largest: dict[str, tuple[tuple[int, int], list[Instruction]]] = {}
    for name, code in functions(path, objdump):
        short = name.replace(f"tersor::{isa}::(anonymous namespace)::", "")
        found = re.match(r"(?:void )?micro_kernel<(Codes<\d>|SplitCodes|Xnor), (\d+), (\d+)>", short)
        grouped = re.match(r"(?:void )?grouped_kernel<(\d+), (\d+)>", short)
        matrix = re.match(r"(?:bool )?gemm_matrix<Isa, (Codes<8>), 8>", short)
        if found:
            kind, block = NAMES[found[1]], (int(found[2]), int(found[3]))
        elif grouped:
            kind, block = "4 bits in groups", (int(grouped[1]), int(grouped[2]))
        elif matrix:
            kind, block = "matrix unit", (32, 2)
        else:
            continue
        if kind not in largest or block > largest[kind][0]:
            largest[kind] = block, code
    for kind in (*NAMES.values(), "4 bits in groups", "matrix unit"):
        if kind in largest:
            block, code = largest[kind]
            yield kind, f"{block[0]} x {block[1]}", inner_loop(code, COUNTS if kind == "signs x signs" else PRODUCTS)


def mca_cycles(loop: list[Instruction], cpu: str) -> float:
    """Cycles of one turn by llvm-mca, which sees the loop without its jumps."""
    text = "\n".join(f"{i.mnemonic} {re.sub(r' *#.*| *<.*', '', i.operands)}" for i in loop if not i.mnemonic.startswith("j"))
    done = subprocess.run(["llvm-mca", "-mtriple=x86_64", f"-mcpu={cpu}"], input=text, capture_output=True, text=True, check=True)
    return float(re.search(r"Block RThroughput: ([\d.]+)", done.stdout)[1])


def rows(folder: Path, objdump: str, mca: bool) -> Iterator[list[str]]:
    for path in sorted(folder.glob("CMakeFiles/tersor_*.dir/csrc/cpu/variant.cpp.o")):
        isa = re.search(r"tersor_(\w+)\.dir", str(path))[1]
        if isa == "scalar":
            continue  # no vectors to count
        for kind, block, loop in kernels(path, isa, objdump):
            if isa == "amx_int8" and kind != "matrix unit":
                continue  # avx512_icl's
            if isa == "avx512_icl" and kind != "signs x signs":
                continue  # avx512_vnni's
            table = COUNTS if kind == "signs x signs" else PRODUCTS
            products = [i for i in loop if i.base in table]
            # Sums of 16 bits become 32 with one more multiplication, by ones.
            if any(i.base == "pmaddubsw" for i in products):
                products = [i for i in products if i.base == "pmaddubsw"]
            macs = sum(table[i.base](i.vector_bits) for i in products)
            if kind == "matrix unit":
                tiles = [i for i in loop if i.mnemonic == "tileloadd"]
                cycles, limit = float(TILE_CYCLES["tdpbsud"] * len(products)), macs / (TILE_CYCLES["tdpbsud"] * len(products))
                cycles = max(cycles, float(TILE_CYCLES["tileloadd"] * len(tiles)))
                machine, others, loads = "Sapphire Rapids", 0, len(tiles)
            else:
                m = MACHINES[isa]
                vectors = [i for i in loop if i.vector_bits and not i.moves and not i.loads_only]
                loads, others = sum(i.reads_memory and i.vector_bits > 0 for i in loop), len(vectors) - len(products)
                rate = m.popcounts if kind == "signs x signs" else m.products
                cycles = max(len(vectors) / m.vector, len(products) / rate, loads / m.loads)
                limit, machine = macs * rate / len(products), m.name
            row = [isa, kind, block, str(len(products)), str(others), str(loads), str(macs), machine]
            row += [f"{macs / cycles:.0f}", f"{limit:.0f}", f"{100 * macs / cycles / limit:.0f} %"]
            if mca:
                cpu = MACHINES[isa].mca if isa in MACHINES else ""
                row.append(f"{macs / mca_cycles(loop, cpu):.0f} {cpu}" if cpu else "-")
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="build folders with objects of the variants")
    parser.add_argument("--mca", action="store_true", help="ask llvm-mca too (x86)")
    options = parser.parse_args()
    head = ["variant", "kernel", "block", "products", "other vector", "loads", "MAC", "CPU", "MAC a cycle", "limit", "share"]
    head += ["llvm-mca"] if options.mca else []
    print("|", " | ".join(head), "|")
    print("|" + "---|" * len(head))
    for folder in options.folders:
        arm = next(folder.glob("CMakeFiles/tersor_neon.dir"), None) is not None
        objdump = "aarch64-linux-gnu-objdump" if arm else "objdump"
        if shutil.which(objdump) is None:
            sys.exit(f"instruction_counts: no {objdump} in PATH")
        for row in rows(folder, objdump, options.mca and not arm):
            print("|", " | ".join(row + ["-"] * (len(head) - len(row))), "|")


if __name__ == "__main__":
    main()
