"""The wheels as users get them: built from the sdist, checked, installed where there is no compiler, and tried under other torches.

python tests/wheels.py            make wheel: a wheel for each Python found here and one for aarch64, into dist/
python tests/wheels.py --quick    for this Python only, tried under the torch it was built on

The environments of the other torches, builds with CUDA of some 5 GB each, stay in build/wheels.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WORK = ROOT / "build" / "wheels"
OBJECTS = WORK / "objects"
MOST_BYTES = 3_000_000
# Python -> the torch its wheel is tried under: the oldest, the one that wheels are built on, the newest. Where there is none the wheel
# is tried without torch, which the numpy half does not need.
TRIED: dict[str, str | None] = {"3.10": "2.10.0", "3.11": "2.13.0", "3.12": "2.14.1", "3.13": None, "3.14": None}
EXCLUDED = ("libtorch*", "libc10*", "libgomp*")  # torch's own: the one that is imported has them loaded
MAY_NEED = {
    "libtorch_cpu.so",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}


def run(*command: object, cwd: Path = ROOT, quiet: bool = False, **env: str) -> str:
    """Standard output of a command, shown too unless quiet; raises CalledProcessError when it fails."""
    words = [str(word) for word in command]
    if not quiet:
        print("$", Path(words[0]).name, *words[1:], flush=True)
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=True)
    print("" if quiet else done.stdout, end="", flush=True)
    return done.stdout


def backend(python: Path, hook: str, cwd: Path, **settings: str) -> Path:
    """What a front end would call; the file lands in WORK."""
    code = f"from scikit_build_core.build import {hook}; print('made', {hook}({str(WORK)!r}, {settings!r}))"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return WORK / run(python, "-c", code, cwd=cwd, PATH=path).rsplit("made ", 1)[1].strip()


def pythons() -> dict[str, Path]:
    """Version -> interpreter, this one and those on the PATH or under pyenv."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = {}
    for version in TRIED:
        named = shutil.which(f"python{version}")
        for candidate in [*([named] if named else []), *sorted(map(str, versions.glob(f"{version}.*/bin/python{version}")))]:
            if subprocess.run([candidate, "-c", "import venv, ssl"], capture_output=True).returncode == 0:
                found[version] = Path(candidate)
    found[f"{sys.version_info[0]}.{sys.version_info[1]}"] = Path(sys.executable)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(".")[1])))


def environment(name: str, python: Path, *packages: str) -> Path:
    """The interpreter of a virtual environment with these packages, made once."""
    folder = WORK / name
    if not (folder / ".ready").exists():
        run(python, "-m", "venv", "--clear", folder)
        run(folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-cache-dir", *packages)
        (folder / ".ready").touch()
    return folder / "bin" / "python"


def make_sdist() -> Path:
    """Puts the sdist into dist/; returns the folder it is unpacked to."""
    sdist = backend(Path(sys.executable), "build_sdist", ROOT)
    source = WORK / "source"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(source, filter="data")
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "CMakeLists.txt", "csrc/core/isa.inc", "tests/run.py"}
    assert wanted <= names, f"the sdist lacks {wanted - names}"
    assert not [name for name in names if name.endswith(".so") or name.split("/")[0] in ("build", "dist", ".ci", ".github")], names
    (folder,) = source.iterdir()
    shutil.copy(sdist, DIST)
    # An sdist's files are all of one date, by which no build tool could tell that one has changed.
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((folder / "csrc").rglob("*.*")))).hexdigest()
    built_from = OBJECTS / "sources.sha256"
    if not built_from.exists() or built_from.read_text() != digest:
        shutil.rmtree(OBJECTS, ignore_errors=True)
        OBJECTS.mkdir()
        built_from.write_text(digest)
    return folder


def make_wheel(version: str, python: Path, source: Path) -> Path:
    """Built on the torch of this environment, whatever the Python: torch's headers and one library are all it takes."""
    if python != Path(sys.executable):
        python = environment(f"build-{version}", python, "scikit-build-core==1.1.2", "pybind11==3.1.0")
        (torch,) = importlib.util.find_spec("torch").submodule_search_locations
        site = next(python.parent.parent.glob("lib/python3*/site-packages"))
        (site / "torch_of_the_build.pth").write_text(str(Path(torch).parent))
    return backend(python, "build_wheel", source, **{"build-dir": str(OBJECTS)})


def repair(wheel: Path) -> Path:
    """The wheel in dist/, with the manylinux tag that its symbols allow; nothing is copied into it."""
    tools = WORK / "tools"
    run(sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", tools, "-r", "tests/requirements_wheels.txt")
    path = f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"
    excludes = [word for name in EXCLUDED for word in ("--exclude", name)]
    out = WORK / "repaired"
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "auditwheel", "repair", *excludes, "-z", "9", "-w", out, wheel, PYTHONPATH=str(tools), PATH=path)
    (repaired,) = out.iterdir()
    return Path(shutil.copy(repaired, DIST))


def check_wheel(wheel: Path, version: str) -> str:
    """Size, tags, licence, version, and that no binary knows where it was built or what it does not need. Returns the sha256 of
    _torch.so."""
    assert wheel.stat().st_size < MOST_BYTES, f"{wheel.name} has {wheel.stat().st_size} bytes, at most {MOST_BYTES}"
    tag = f"cp{version.replace('.', '')}"
    assert re.fullmatch(rf"tersor-[\w.]+-{tag}-{tag}-manylinux_2_\d+_\w+\.whl", wheel.name), wheel.name
    folder = WORK / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    said = re.search(r'^__version__ = "(.+)"', (folder / "tersor" / "__init__.py").read_text(), re.M)[1]
    (info,) = folder.glob("*.dist-info")
    assert info.name == f"tersor-{said}.dist-info"
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert not [path for path in folder.iterdir() if path not in (info, folder / "tersor")], "something was copied into the wheel"
    libraries = sorted(folder.rglob("*.so"))
    assert len(libraries) == 2, libraries
    places = {str(ROOT), str(WORK), str(Path.home()), sys.prefix, sys.base_prefix, "/tmp/", "site-packages"}
    for library in libraries:
        text = library.read_bytes()
        known = sorted(place for place in places if place.encode() in text)
        assert not known, f"{library.name} holds the build's paths: {known}"
        dynamic = run("readelf", "-dW", library, quiet=True)
        needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
        assert needed <= MAY_NEED, f"{library.name} needs {needed - MAY_NEED}"
        assert "PATH" not in dynamic, f"{library.name} looks for libraries in a folder"
    torch_ops = folder / "tersor" / "_torch.so"
    undefined = re.findall(r" UND (\w+)", run("readelf", "-W", "--dyn-syms", torch_ops, quiet=True))
    assert any(name.startswith("aoti_torch") for name in undefined)
    python = [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]
    assert not python, f"_torch.so uses symbols of Python: {python}"
    return hashlib.sha256(torch_ops.read_bytes()).hexdigest()


def try_wheel(version: str, python: Path, wheel: Path, torch: str | None, sha256: str) -> None:
    """Installs it where neither the PATH nor the environment has a compiler, and uses it; sha256 of the _torch.so that is to serve."""
    requirements = [*([f"torch=={torch}", "safetensors"] if torch else []), "numpy", "rich", "click"]
    python = environment(f"torch-{torch}" if torch else f"numpy-{version}", python, *requirements)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    bare = {"PATH": str(python.parent), "PYTHONPATH": ""}
    assert not any(shutil.which(name, path=bare["PATH"]) for name in ("cc", "gcc", "g++", "clang", "c++"))
    if torch:
        assert f"_torch.so {sha256}" in run(python, ROOT / "tests" / "smoke.py", cwd=WORK, **bare)
    else:
        code = (
            "import numpy, tersor.numpy as n; x = numpy.ones((3, 40), numpy.float32); w, s = n.quantize_weight(x);"
            "y = n.linear_dynamic(x, w, s, None); assert (y == y[0, 0]).all() and abs(y[0, 0] - 40) < 0.5; print(n.info()['kernels'])"
        )
        run(python, "-c", code, cwd=WORK, **bare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the wheel of this Python alone")
    options = parser.parse_args()
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    DIST.mkdir(exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    for old in DIST.glob("tersor-*"):
        old.unlink()
    source = make_sdist()
    found = {own: Path(sys.executable)} if options.quick else pythons()
    wheels = {version: repair(make_wheel(version, python, source)) for version, python in found.items()}
    sums = {version: check_wheel(wheel, version) for version, wheel in wheels.items()}
    run(sys.executable, "-m", "pytest", "--noconftest", "tests/test_symbols.py", TERSOR_CPP_BUILD=str(OBJECTS))
    assert len(set(sums.values())) == 1, f"_torch.so differs between Pythons: {sums}"
    for version, wheel in wheels.items():
        try_wheel(version, found[version], wheel, TRIED[version], sums[version])
    if not options.quick and all(map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64-static"))):
        run("tests/arm_torch.sh", sys.executable, "wheel")
        (cross_built,) = (ROOT / "build" / "arm-torch" / "wheel").iterdir()
        wheel = repair(cross_built)
        check_wheel(wheel, "3.11")
        run("tests/arm_torch.sh", sys.executable, "smoke", wheel)
    for wheel in sorted(DIST.iterdir()):
        print(f"{wheel.stat().st_size:9d} bytes  {wheel.name}")
    print(f"one _torch.so: sha256 {sums[own]}")


if __name__ == "__main__":
    main()
