"""What `import tersor` costs and survives: an old torch, a missing or foreign native library, a read-only folder, many threads."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import tersor
from tersor import native

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(tersor.__file__).parent
# A first use that needs the ops, and what it prints: whether kernels serve them.
USE = """
import torch, tersor
model = torch.nn.Sequential(torch.nn.Linear(40, 20))
tersor.quantize_(model, tersor.Int8Dynamic())
assert model(torch.ones(3, 40)).shape == (3, 20)
print(tersor.info().native)
"""


def python(code: str, *options: str, path: Path | None = None, wrapper: tuple[str, ...] = (), **env: str):
    """Runs code in a new interpreter, with the tersor below `path` if given, from a folder that holds none."""
    first = {"PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])} if path else {}
    return subprocess.run(
        [*wrapper, sys.executable, *options, "-c", textwrap.dedent(code)],
        env={**os.environ, **first, **env},
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
    )


def copy_of_the_package(folder: Path) -> Path:
    """Python files and all libraries, as an installed wheel has them."""
    shutil.copytree(ROOT / "python" / "tersor", folder / "tersor", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for library in PACKAGE.glob("*.so"):
        shutil.copy(library, folder / "tersor")
    return folder


def test_importing_does_no_work():
    """Nothing but the package itself is imported, no file is opened for writing, no thread or process starts, os.environ stays."""
    code = """
        import os, sys, threading
        done, watched = [], ("subprocess.Popen", "os.system", "os.putenv", "os.mkdir", "socket.connect", "ctypes.dlopen")
        def hook(event, args):
            if event in watched or (event == "open" and args[1] and set("wax+") & set(args[1])):
                done.append((event, args))
        environment, modules = dict(os.environ), set(sys.modules)
        sys.dont_write_bytecode = True
        sys.addaudithook(hook)
        import tersor
        print(done, threading.active_count(), environment == dict(os.environ))
        print(sorted(name for name in set(sys.modules) - modules if name.startswith(("torch", "numpy", "tersor"))))
    """
    out = python(code)
    assert out.stdout.splitlines() == ["[] 1 True", "['tersor']"], out.stderr


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0", "2.10.0", "2.10.0a0+git1234"])
def test_an_old_torch_is_said_to_be_old(tmp_path, version):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    code = """
        import tersor
        errors = set()
        for name in [*tersor._PUBLIC, *tersor._SUBMODULES]:
            try:
                getattr(tersor, name)
            except Exception as error:
                errors.add(f"{type(error).__name__}: {error}")
        try:
            import tersor.ops
        except Exception as error:
            errors.add(f"{type(error).__name__}: {error}")
        print(*errors, sep="\\n")
    """
    out = python(code, path=tmp_path)
    said = (
        f"ImportError: tersor needs torch 2.10 or later, this is torch {version}; get one by: pip install --upgrade 'torch>=2.10'"
    )
    if version.startswith("2.10"):  # new enough, so the errors are of what this torch of one line lacks
        assert out.stdout.strip(), out.stderr
        assert "needs torch" not in out.stdout
    else:
        assert out.stdout.strip() == said, out.stderr


def test_the_oldest_torch_is_one():
    oldest = ".".join(map(str, native.OLDEST_TORCH))
    assert f'"torch>={oldest}"' in (ROOT / "pyproject.toml").read_text()
    target = re.search(r"TORCH_TARGET_VERSION=0x(\w\w)(\w\w)", (ROOT / "CMakeLists.txt").read_text())
    assert (int(target[1], 16), int(target[2], 16)) == native.OLDEST_TORCH
    assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= native.OLDEST_TORCH


def warnings_of(out: subprocess.CompletedProcess[str]) -> list[str]:
    assert out.returncode == 0, out.stderr
    return [line for line in out.stderr.splitlines() if "tersor" in line]


def test_without_a_native_library_one_warning_says_what_to_do(tmp_path):
    copy = copy_of_the_package(tmp_path)
    for library in (copy / "tersor").glob("*.so"):
        library.unlink()
    out = python(USE, path=copy)
    assert out.stdout.split() == ["False"], out.stderr
    (line,) = warnings_of(out)
    assert "no native kernels in this installation; every op runs as its plain-torch reference" in line
    assert "Reinstall from a wheel" in line


@pytest.mark.native
@pytest.mark.parametrize("name", ["_torch.so", "_numpy*.so"])
def test_a_library_of_another_platform_is_like_none(tmp_path, name):
    copy = copy_of_the_package(tmp_path)
    (library,) = (copy / "tersor").glob(name)
    library.write_bytes(b"MZ of another system")
    out = python(USE, path=copy)
    assert out.stdout.split() == ["False"], out.stderr
    (line,) = warnings_of(out)
    assert "can load (" in line
    assert "Reinstall from a wheel" in line


def test_a_folder_that_cannot_be_written(tmp_path):
    """Also for root, who may write everywhere but for the capability that setpriv takes away."""
    wrapper = ()
    if os.geteuid() == 0:
        wrapper = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv (util-linux) to meet a folder that cannot be written")
    copy = copy_of_the_package(tmp_path / "site")
    folders = [copy, *(path for path in copy.rglob("*") if path.is_dir())]
    before = sorted(copy.rglob("*"))
    try:
        for folder in folders:
            folder.chmod(0o555)
        out = python(f"try:\n    open({str(copy / 'probe')!r}, 'w')\nexcept OSError:\n    print('refused')", wrapper=wrapper)
        assert out.stdout.split() == ["refused"], out.stderr  # or the test would prove nothing
        out = python(USE, path=copy, wrapper=wrapper, PYTHONDONTWRITEBYTECODE="")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert out.stdout.split() == [str(tersor.info().native)], out.stderr
    assert sorted(copy.rglob("*")) == before


def test_many_threads_may_be_the_first():
    """Each enters by another door: public names, submodules, the ops."""
    code = """
        import importlib, sys, threading
        sys.setswitchinterval(1e-4)
        import torch
        doors = ["QuantLinear", "quantize_", "save", "Int8Dynamic", "info", "ops", "train", "parallel", "prune_", "fuse", "advise", "search"]
        start, failed, seen = threading.Barrier(len(doors)), [], {}
        def enter(name):
            try:
                start.wait()
                tersor = importlib.import_module("tersor")
                seen[name] = getattr(tersor, name)
                layer = tersor.QuantLinear.from_linear(torch.nn.Linear(8, 4))
                assert layer(torch.ones(1, 8)).shape == (1, 4)
            except BaseException as error:
                failed.append(f"{name}: {error!r}")
        threads = [threading.Thread(target=enter, args=(name,)) for name in doors]
        for thread in threads: thread.start()
        for thread in threads: thread.join(60)
        print(failed, sum(thread.is_alive() for thread in threads), len(seen) - len(doors))
        import tersor
        print([name for name in doors if seen[name] is not getattr(tersor, name)])
    """
    out = python(code)
    assert out.stdout.splitlines() == ["[] 0 0", "[]"], out.stderr


def imports_of(package: Path) -> dict[str, set[str]]:
    """Module -> the package's modules that it imports when it is imported itself: not within a function, nor for type checkers."""
    modules = {path: ".".join(path.relative_to(package.parent).with_suffix("").parts) for path in package.rglob("*.py")}
    names = {name.removesuffix(".__init__") for name in modules.values()}
    graph = {}
    for path, name in modules.items():
        found, todo = set(), [ast.parse(path.read_text())]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*name.split(".")[: -node.level], *filter(None, [node.module])])
                found |= {inner if (inner := f"{base}.{alias.name}") in names else base for alias in node.names}
            elif not isinstance(node, ast.FunctionDef) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node))[:13]:
                todo += ast.iter_child_nodes(node)
        graph[name.removesuffix(".__init__")] = found
    return graph


def test_no_module_is_imported_in_a_circle():
    """Threads that enter a circle at two places would see half-made modules."""
    graph = imports_of(ROOT / "python" / "tersor")
    assert {"tersor.nn", "tersor.formats"} <= graph["tersor.swap"]  # the search finds what there is
    assert "tersor.nn" not in graph["tersor"]  # which is for type checkers only
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
