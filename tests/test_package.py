"""The package as a whole: import, info, command line, TERSOR_ISA, one list per concept, and the house's rules."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import tersor
import tersor.ops as ops
from tersor import native
from tersor.cli import main

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT / "tests"
    )


def test_import_does_no_work():
    out = python("import sys, tersor; print('torch' in sys.modules, 'numpy' in sys.modules, sorted(dir(tersor))[:2])")
    assert out.stdout.startswith("False False"), out.stderr


def test_public_names():
    for name in tersor.__all__:
        assert getattr(tersor, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        tersor.quantise  # noqa: B018
    # a function named like a submodule would hide it
    submodules = {p.stem for p in Path(tersor.__file__).parent.iterdir()}
    assert not set(tersor._PUBLIC) & submodules


def test_the_version_is_written_in_one_place():
    settings = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in settings
    literal = re.compile(rf"\b{re.escape(tersor.__version__)}\b")
    texts = tracked("pyproject.toml", "CMakeLists.txt", "python/*", "csrc/*", "tests/*.py", "tests/*.sh")
    assert [path.name for path in texts if literal.search(path.read_text())] == ["__init__.py"]
    assert version("tersor") == tersor.__version__  # what the wheel was built as
    assert f"## {tersor.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_info():
    info = tersor.info()
    assert set(info.ops) == set(ops.OPS)
    assert info.native == ops.NATIVE
    text = CliRunner().invoke(main, ["info"]).output
    for name in ops.OPS:
        assert name in text
    facts = json.loads(CliRunner().invoke(main, ["info", "--json"]).output)
    assert facts["torch"] == torch.__version__
    assert "quantize_rows" in facts["ops"]
    help_text = CliRunner().invoke(main, ["info", "--help"]).output
    assert "TERSOR_ISA" in help_text


RUNNABLE = [name for name, runnable, _ in tersor.info().variants if runnable]
THROUGH_TORCH = "import tersor; print(*tersor.info().kernels.values())"
THROUGH_NUMPY = "import tersor.numpy as n; print(*n.info()['kernels'].values())"  # a tenth of the time to import


@pytest.mark.native
@pytest.mark.parametrize(
    ("code", "names"),
    [
        (THROUGH_NUMPY, RUNNABLE),
        (THROUGH_TORCH, RUNNABLE[-1:]),
        pytest.param(THROUGH_TORCH, RUNNABLE[:-1], marks=pytest.mark.slow),
    ],
)
def test_isa_can_be_capped(code: str, names: list[str]):
    for name in names:
        out = python(code, TERSOR_ISA=name)
        served = set(out.stdout.split())
        assert name in served, out.stderr
        assert served <= set(RUNNABLE[RUNNABLE.index(name) :])  # what a variant leaves out the next one serves


@pytest.mark.native
def test_wrong_names_of_instruction_sets_are_errors():
    for module in ("tersor.ops", "tersor.numpy as n; n.info()"):
        out = python(f"import {module}", TERSOR_ISA="nonsense")
        assert out.returncode != 0
        assert "TERSOR_ISA=nonsense is not an instruction set of this build; this CPU can run:" in out.stderr
        assert RUNNABLE[-1] in out.stderr
    result = python("from tersor.cli import main; main(['info'])", TERSOR_ISA="nonsense")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: TERSOR_ISA=nonsense")
    assert "Traceback" not in result.stderr


@pytest.mark.native
def test_epilogue_lists_are_one():
    assert tuple(ops.EPILOGUES) == native.numpy_module().epilogues()


@pytest.mark.native
def test_without_native_there_is_one_warning_and_the_same_integers():
    code = (
        "import torch, tersor, tersor.ops as ops; torch.manual_seed(0); x = torch.randn(3, 40);"
        "q, s, r = ops.quantize_rows(x); w = ops.from_rows(torch.randint(-127, 128, (20, 40), dtype=torch.int8));"
        "tersor.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4)), tersor.Int8Dynamic());"
        "print(ops.NATIVE, int(ops.linear_acc(q, r, w, 20).long().abs().sum()))"
    )
    with_native, without = python(code), python(code, TERSOR_DISABLE_NATIVE="1")
    assert with_native.stdout.split()[0] == "True"
    assert without.stdout.split()[0] == "False"
    assert with_native.stdout.split()[1] == without.stdout.split()[1]
    assert without.stderr.count("no native kernels") == 1
    assert with_native.stderr == ""


def tracked(*patterns: str) -> list[Path]:
    out = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / line for line in out.stdout.split()]


def test_files_stay_short():
    for path in tracked("*.py", "*.cpp", "*.h", "*.inl", "*.inc", "*.cu", "*.cuh"):
        assert len(path.read_text().splitlines()) <= 500, path


def test_kernels_are_framework_free():
    for path in tracked("csrc/core/*", "csrc/cpu/*"):
        for header in re.findall(r"#include\s*<([^>]+)>", path.read_text()):
            assert not header.startswith(("torch", "ATen", "c10", "pybind11", "vector", "string", "iostream")), path
    for path in tracked("csrc/cpu/*"):
        text = path.read_text()
        if not path.name.startswith("isa_"):
            assert "_mm" not in text, path  # intrinsics live in the vocabularies only
        assert "std::" not in text, path


def test_what_only_some_compilers_know_is_in_one_header():
    extension = re.compile(r"__attribute__|gnu::|__asm__|pragma (GCC|clang)|__declspec|__forceinline")
    found = {path.name for path in tracked("csrc/core/*", "csrc/cpu/*") if extension.search(path.read_text())}
    assert found == {"compiler.h", "dispatch.cpp"}  # which reads CPUID, and declares a weak symbol


def test_no_flag_that_breaks_portability():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "-ffp-contract=off" in text
    for flag in ("march=native", "ffast-math", "Ofast", "fopenmp"):
        assert flag not in text


@pytest.mark.native
def test_info_names_a_kernel_that_this_build_lacks(monkeypatch):
    monkeypatch.setattr(tersor.ops.OPS["norm_quantize"], "kernels", ("norm_quantize_x", "of_tomorrow"))
    assert tersor.info().ops["norm_quantize"] == "reference (this build has no kernel: of_tomorrow)"
