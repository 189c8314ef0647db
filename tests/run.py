"""Runs the parts of the test suite, two at a time, and prints the seconds each took.

python tests/run.py            what every change must pass (make test)
python tests/run.py --full     also each instruction set in full, slow cases and long fuzzing (make test-full)
python tests/run.py --only cpp one part
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
BUILD = ROOT / "build"
FUZZ_CASES = 44000  # calls on the best instruction set, half as many on each further one
FUZZ_FILES = 24000
SLOW_FLAGS = {"TERSOR_SLOW": "1"}


def run(*command: object, **env: str) -> None:
    """Runs a command in the repository's root with its output shown; raises CalledProcessError when it fails."""
    words = [str(word) for word in command]
    print("$", " ".join([f"{k}={v}" for k, v in env.items()] + [Path(words[0]).name, *words[1:]]), flush=True)
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(words, cwd=ROOT, env={**os.environ, "PATH": path, **env}, check=True)


def pytest(*arguments: str, **env: str) -> None:
    run(sys.executable, "-m", "pytest", *arguments, **env)


def install(full: bool) -> None:
    run(BIN / "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--force-reinstall", ".")


def lint(full: bool) -> None:
    run(BIN / "ruff", "check", "-q", ".")
    run(BIN / "ruff", "format", "-q", "--check", ".")
    files = subprocess.run(
        ["git", "ls-files", "csrc/*", "tests/cpp/*", "tests/cuda_emulator/*", "tests/emulator/*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sources = [f for f in files.stdout.split() if f.endswith((".cpp", ".h", ".inl", ".cu", ".cuh"))]
    run(BIN / "clang-format", "--dry-run", "-Werror", *sources)
    run(BIN / "mypy")


def build_cpp(folder: Path, *options: str, target: str = "all") -> None:
    common = ("-DTERSOR_TORCH=OFF", "-DTERSOR_NUMPY=OFF", "-DTERSOR_CPP_TESTS=ON")
    run(BIN / "cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "--log-level=WARNING", *common, *options)
    run(BIN / "cmake", "--build", folder, "--target", target, "--", "--quiet")


def cpp(full: bool) -> None:
    """Kernel tests without torch, and what the variant objects may contain."""
    folder = BUILD / "cpp"
    build_cpp(folder)
    run(folder / "kernel_tests", *(["--fuzz", "5000"] if full else []))
    pytest("tests/test_symbols.py", TERSOR_CPP_BUILD=str(folder))
    if full and shutil.which("clang++"):
        build_cpp(BUILD / "clang", "-DCMAKE_CXX_COMPILER=clang++", target="kernel_tests")
        run(BUILD / "clang" / "kernel_tests")


def cuda(full: bool) -> None:
    """The CUDA kernels without a GPU: run by an emulator, and compiled by nvcc where there is one."""
    folder = BUILD / "cpp"
    build_cpp(folder)
    run(folder / "cuda_emulator_tests", "--only", "cuda_", *(["--every"] if full else []))
    if shutil.which("nvcc") is None:
        print("skipped: no nvcc in PATH, so the kernels are not compiled for GPUs", flush=True)
        return
    # Instructions are counted with --full only: the tools for it are a download.
    tools = BUILD / "cuobjdump"
    if full:
        run(BIN / "pip", "install", "-q", "--no-deps", "--upgrade", "-r", "tests/requirements_cuda.txt", "--target", tools)
    counted = ("--cuobjdump", tools / "nvidia" / "cu13" / "bin") if full else ("80", "90a")
    run(sys.executable, "tests/cuda_build.py", *counted)
    cuda_binding(full)


def cuda_binding(full: bool) -> None:
    """The torch ops on CUDA, which the plain install leaves out on a torch without CUDA: built, loaded and called here too."""
    folder, package = BUILD / "cuda", BUILD / "cuda" / "python" / "tersor"
    targets = () if full else ("-DTERSOR_CUDA_ARCHITECTURES=80-real",)
    options = ("-DTERSOR_NUMPY=OFF", "-DTERSOR_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}", *targets)
    run(BIN / "cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "--log-level=WARNING", *options)
    run(BIN / "cmake", "--build", folder, "--target", "_torch_cuda", "--", "--quiet")
    where = "import importlib.util as u; print(*u.find_spec('tersor').submodule_search_locations)"
    found = subprocess.run([sys.executable, "-c", where], cwd=BUILD, capture_output=True, text=True, check=True)
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "tersor", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in (*Path(found.stdout.strip()).glob("*.so"), folder / "_torch_cuda.so"):
        shutil.copy(library, package)
    pytest("tests/test_cuda.py", "tests/test_gpu.py", PYTHONPATH=str(package.parent))


def sanitizers(full: bool) -> None:
    """The same kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    folder = BUILD / "cpp-sanitized"
    # avx_vnni too, where the CPU has the other form of its instruction.
    build_cpp(folder, "-DTERSOR_SANITIZE=address,undefined", "-DTERSOR_EVEX_VNNI=ON", target="kernel_tests")
    run(folder / "kernel_tests", *(["--fuzz", "2000"] if full else []))


def fuzz(full: bool) -> None:
    """The raw ops under the same sanitizers, with torch's own buffers guarded: the bindings and what they hand to the kernels.
    Beside them damaged files, which are Python's business."""
    if not full:
        return  # the suite runs a short fuzz on the installed kernels
    folder, package = BUILD / "asan", BUILD / "asan" / "python" / "tersor"
    pybind11 = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True)
    options = (
        "-DTERSOR_SANITIZE=address,undefined",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.stdout.strip()}",
    )
    run(BIN / "cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "--log-level=WARNING", *options)
    run(BIN / "cmake", "--build", folder, "--", "--quiet")
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "tersor", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in (*folder.glob("_torch*.so"), *folder.glob("_numpy*.so")):
        shutil.copy(library, package)
    # libstdc++ too: Python does not link it, and the sanitizer looks for __cxa_throw when the process starts.
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    env = {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "PYTHONPATH": str(package.parent),
        "OMP_WAIT_POLICY": "passive",  # more threads than free cores would spin
    }
    files = subprocess.Popen([sys.executable, "tests/fuzz_files.py", "--seed", "1", "--cases", str(FUZZ_FILES)], cwd=ROOT)
    try:
        for i, isa in enumerate(variants()):
            run(sys.executable, "tests/fuzz_raw_ops.py", "--seed", i + 1, "--cases", FUZZ_CASES // 2**i, **env, TERSOR_ISA=isa)
    except BaseException:
        files.kill()
        raise
    if files.wait():
        raise subprocess.CalledProcessError(files.returncode, "tests/fuzz_files.py")


def missing_tools(*names: str) -> bool:
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        print(f"skipped: no {', no '.join(missing)} in PATH (Debian: g++-aarch64-linux-gnu, qemu-user-static)", flush=True)
    return bool(missing)


def arm(full: bool) -> None:
    """The kernel tests on aarch64, cross-compiled and run by qemu; with --full on cores that lack what the best variant uses, and
    the op tests under an aarch64 torch."""
    if missing_tools("aarch64-linux-gnu-g++", "qemu-aarch64-static"):
        return
    folder = BUILD / "arm"
    options = ("SYSTEM_NAME=Linux", "SYSTEM_PROCESSOR=aarch64", "CXX_COMPILER=aarch64-linux-gnu-g++", "EXE_LINKER_FLAGS=-static")
    build_cpp(folder, *(f"-DCMAKE_{option}" for option in options), target="kernel_tests")
    tests = [[]] if full else [["--only", name] for name in ("digest", "dispatch", "gemm_s32_blocks", "xnor_split", "sparse_int8")]
    for cpu in ("max", "a64fx", "cortex-a76", "cortex-a72") if full else ("max",):
        for only in tests:
            run("qemu-aarch64-static", "-cpu", cpu, folder / "kernel_tests", "--fuzz", "20", *only)
    if full:
        run("tests/arm_torch.sh", sys.executable)


def amx(full: bool) -> None:
    """Exactness with AMX kernels, on an emulator of its instructions where the CPU lacks them."""
    if not full:
        return  # the kernel tests run on the emulator too
    emulator = BUILD / "cpp" / "libtersor_emulator.so"
    if "avx512_icl" not in variants() or not emulator.exists():
        print("skipped: the emulator needs the AVX-512 that AMX comes with, and the part cpp", flush=True)
        return
    # pytest's own handler of SIGILL would take the place of the emulator's.
    pytest("-p", "no:faulthandler", "-m", "exact", LD_PRELOAD=str(emulator), TERSOR_ISA="amx_int8")


def older_cpus(full: bool) -> None:
    """x86 CPUs without AVX-512 and without AVX, under qemu, which traps what they lack: Python, torch and the kernels."""
    if not full or missing_tools("qemu-x86_64-static"):
        return
    layer = "tersor.nn.QuantLinear.from_linear(torch.nn.Linear(70, 33), tersor.Int8Dynamic())(torch.ones(5, 70))"
    code = f"import tersor, torch; served = tersor.info().kernels['gemm_w8']; print(served, {layer}.shape)"
    for cpu, isa in (("Haswell", "avx2"), ("Nehalem", "sse41"), ("Nehalem", "scalar")):
        emulator = ("qemu-x86_64-static", "-cpu", cpu)
        if isa != "scalar":  # the tests walk all variants that the CPU has
            run(*emulator, BUILD / "cpp" / "kernel_tests", "--fuzz", "20")
        run(*emulator, sys.executable, "-c", f"{code}; assert served == '{isa}'", TERSOR_ISA=isa)
    run("qemu-x86_64-static", "-cpu", "Haswell", sys.executable, "-m", "pytest", "tests/test_exact.py", "-k", "not variants_agree")


def simde(full: bool) -> None:
    """The sources of the variants above avx2 on a CPU without their instructions: compiled for AVX2 through SIMDe."""
    best = variants()[0]
    if not full and (best.startswith("avx512") or best == "amx_int8"):
        return  # they run as they are
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        print("skipped: no simde/x86/avx512.h (Debian: libsimde-dev)", flush=True)
        return
    folder = BUILD / "simde"
    build_cpp(folder, "-DTERSOR_SIMDE=ON", target="kernel_tests")
    run(folder / "kernel_tests", "--fuzz", "20")
    if full and not missing_tools("qemu-x86_64-static"):
        run("qemu-x86_64-static", "-cpu", "Haswell", folder / "kernel_tests", "--only", "digest")


def variants() -> list[str]:
    code = "import tersor; print(*[name for name, runnable, _ in tersor.info().variants if runnable])"
    out = subprocess.run([sys.executable, "-c", code], cwd=BUILD, capture_output=True, text=True, check=True)
    return out.stdout.split()


def suite(full: bool) -> None:
    """Everything, on the best instruction set of this CPU."""
    pytest(**(SLOW_FLAGS if full else {}))


def other_variants(full: bool) -> None:
    """Exactness on the other instruction sets; the whole suite with --full."""
    for name in variants()[1:]:
        # variants_agree runs all of them by itself, in the suite
        pytest(*([] if full else ["-m", "exact", "-k", "not variants_agree"]), TERSOR_ISA=name)


def no_native(full: bool) -> None:
    """The pure-Python package alone: every op on its reference."""
    copy = BUILD / "pure"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "tersor", copy / "tersor", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    names = ["test_tiles.py", "test_ops.py", "test_nn.py", "test_swap.py", "test_package.py"]
    pytest(*([] if full else [f"tests/{name}" for name in names]), PYTHONPATH=str(copy))


def xla(full: bool) -> None:
    """The references through torchax on JAX CPU, and compiled for TPUs, in a venv of its own that sees this one's packages."""
    folder = BUILD / "xla"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if full:
        run(sys.executable, "-m", "venv", folder)
        (packages / "environment.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        run(folder / "bin" / "pip", "install", "-q", "--no-deps", "-r", "tests/requirements_xla.txt")
    elif not (packages / "torchax").is_dir():
        print("skipped: no torchax in build/xla; make test-xla installs it", flush=True)
        return
    # A process of their own: torchax changes torch's devices for good. The TPU compiler, MiniLM and every option of every op take minutes.
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_xla*.py"))
    chosen = ("-m", "xla" if full else "xla and not slow and not tpu_aot")
    env = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", **(SLOW_FLAGS if full else {})}
    run(folder / "bin" / "python", "-m", "pytest", *tests, *chosen, **env)


def wheels(full: bool) -> None:
    """The wheels as users get them, under the oldest and the newest torch too; see tests/wheels.py."""
    if full:
        run(sys.executable, "tests/wheels.py")


def examples(full: bool) -> None:
    """The scripts of docs/accuracy.md in their short mode: that they run, not their figures. They need `make peers data`."""
    if not full:
        return
    names = ("accuracy_minilm", "accuracy_smollm", "vision mlp", "vision vit", "distill_fashion_mnist", "distill_minilm", "tabular")
    for name, *arguments in map(str.split, names):
        run(sys.executable, f"bench/{name}.py", *arguments, "--short")


def docs(full: bool) -> None:
    """The documentation site in build/site, strictly: a broken link, an unknown name or a page outside the navigation fails."""
    folder, pins = BUILD / "docs-tools", ROOT / "docs" / "requirements.txt"
    installed = folder / "requirements.txt"
    if not installed.exists() or installed.read_bytes() != pins.read_bytes():
        shutil.rmtree(folder, ignore_errors=True)
        try:
            run(BIN / "pip", "install", "-q", "--no-deps", "--no-compile", "-r", pins, "--target", folder)
        except subprocess.CalledProcessError:
            if full:
                raise
            print("skipped: pip could not install docs/requirements.txt, so the site is not built", flush=True)
            return
        shutil.copy(pins, installed)
    run(sys.executable, "-m", "mkdocs", "build", "--strict", PYTHONPATH=str(folder), NO_MKDOCS_2_WARNING="1")
    for page in (BUILD / "site").glob("*.html"):
        if found := re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?((?:https?:)?//[^"' >]+)""", page.read_text()):
            raise SystemExit(f"{page.name} would fetch {found}: the site has to work without a network")


# Install runs by itself; of the rest two run beside each other. The longest begins, amx and older_cpus use what cpp has built.
PARTS: dict[str, Callable[[bool], None]] = {
    "install": install,
    "suite": suite,
    "lint": lint,
    "cpp": cpp,
    "sanitizers": sanitizers,
    "cuda": cuda,
    "arm": arm,
    "other_variants": other_variants,
    "no_native": no_native,
    "docs": docs,
    "fuzz": fuzz,
    "xla": xla,
    "amx": amx,
    "older_cpus": older_cpus,
    "simde": simde,
    "wheels": wheels,
    "examples": examples,
}


def run_part(name: str, full: bool) -> int:
    """0 where the part passes."""
    try:
        PARTS[name](full)
    except subprocess.CalledProcessError as error:
        print(f"==== {name} FAILED with exit code {error.returncode}", flush=True)
        return 1
    return 0


def run_parts(names: Iterator[str], full: bool, seconds: dict[str, float], failed: list[str]) -> None:
    """Takes parts from `names`, which another thread may share, and runs each in a process of its own whose output comes in one piece."""
    for name in names:
        start = time.monotonic()
        code = f"import sys, run; sys.exit(run.run_part({name!r}, {full}))"
        env = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # threads that spin would take the other part's core
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT / "tests", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        seconds[name] = time.monotonic() - start
        if done.returncode:
            failed.append(name)
        print(f"==== {name}\n{done.stdout.decode(errors='replace')}", end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the heavy parts too")
    parser.add_argument("--only", choices=PARTS, help="run one part")
    options = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    start = time.monotonic()
    seconds: dict[str, float] = {}
    failed: list[str] = []
    run_parts(iter([options.only or "install"]), options.full, seconds, failed)
    if not options.only and "install" not in failed:
        left = iter(list(PARTS)[1:])
        workers = [threading.Thread(target=run_parts, args=(left, options.full, seconds, failed)) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    print("==== seconds per part, two at a time")
    for name in [name for name in PARTS if name in seconds]:
        print(f"{seconds[name]:8.1f}  {name}{'  FAILED' if name in failed else ''}")
    print(f"{time.monotonic() - start:8.1f}  in all", flush=True)
    print(f"parts: {len(seconds) - len(failed)} passed, {len(failed)} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
