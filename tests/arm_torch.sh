#!/usr/bin/env bash
# A wheel for aarch64, cross-built, and what it does under qemu with an aarch64 Python and torch 2.10, without a chroot and without
# touching this system's packages.
#
#   tests/arm_torch.sh PYTHON                    builds it, runs the smoke test and the op tests; more arguments are pytest's
#   tests/arm_torch.sh PYTHON wheel              builds it into build/arm-torch/wheel
#   tests/arm_torch.sh PYTHON smoke WHEEL        runs the smoke test on a given one
#
# PYTHON has cmake, ninja, scikit-build-core, pybind11 and pip; what was downloaded stays in build/arm-torch.
# Needs g++-aarch64-linux-gnu and qemu-user-static. Debian's arm64 Python 3.11 and its libraries are unpacked, not installed; the
# wheels are pip's for that platform.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 what=${2:-} folder=$PWD/build/arm-torch
bin=$(dirname "$python")
root=$folder/root site=$folder/site
libraries="libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libcrypt1 libuuid1
  libncursesw6 libtinfo6 libreadline8 libgomp1"
wheels="numpy typing_extensions sympy==1.13.3 mpmath networkx jinja2 MarkupSafe filelock fsspec safetensors pytest hypothesis sortedcontainers iniconfig pluggy
  packaging pygments rich click markdown-it-py mdurl"

if [ ! -e "$folder/.ready" ]; then
  mkdir -p "$folder"/apt/state/lists/partial "$folder"/apt/cache/archives/partial "$folder"/debs "$folder"/wheels "$root" "$site"
  touch "$folder/apt/state/status"
  apt="apt-get -q -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Dir::State=$folder/apt/state
    -o Dir::State::status=$folder/apt/state/status -o Dir::Cache=$folder/apt/cache"
  $apt update
  (cd "$folder/debs" && $apt download python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libpython3.11-dev $libraries)
  for deb in "$folder"/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
  platforms="--platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --platform any"
  "$bin/pip" download -q --no-deps --only-binary=:all: --python-version 3.11 $platforms -d "$folder/wheels" torch==2.10.0 $wheels
  for wheel in "$folder"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
  touch "$folder/.ready"
fi

if [ "$what" != smoke ]; then
  rm -rf "$folder/wheel"
  # What Python is asked for a wheel's platform; the objects are those of `tests/run.py --only arm`.
  PATH=$bin:$PATH _PYTHON_HOST_PLATFORM=linux-aarch64 "$python" - "$root" "$site" "$folder/wheel" <<'PY'
import sys

import pybind11
from scikit_build_core.build import build_wheel

root, site, out = sys.argv[1:]
define = {
    "CMAKE_SYSTEM_NAME": "Linux",
    "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
    "CMAKE_CXX_FLAGS": f"-isystem {root}/usr/include",
    "CMAKE_STRIP": "aarch64-linux-gnu-strip",
    "Python_INCLUDE_DIR": f"{root}/usr/include/python3.11",
    "PYTHON_MODULE_EXTENSION": ".cpython-311-aarch64-linux-gnu.so",
    "pybind11_DIR": pybind11.get_cmake_dir(),
    "TERSOR_CPP_TESTS": "ON",
    "TERSOR_NUMPY": "ON",  # the tests beside it are built without
    "TERSOR_TORCH": "ON",
    "TORCH_LIB_DIR": f"{site}/torch/lib",
}
build_wheel(out, {"build-dir": "build/arm", "build.targets": "_torch;_numpy", **{f"cmake.define.{name}": value for name, value in define.items()}})
PY
fi
if [ "$what" = wheel ]; then exit; fi
wheel=$(realpath "$folder"/wheel/*.whl)
if [ "$what" = smoke ]; then wheel=$3; fi
rm -rf "$site"/tersor*
"$python" -m zipfile -e "$wheel" "$site"

export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=2
qemu="qemu-aarch64-static -cpu max -L $root $root/usr/bin/python3.11"
$qemu tests/smoke.py
if [ "$what" = smoke ]; then exit; fi
# Out of the repository's own settings: its plugins are not all there.
$qemu -m pytest -q -p no:cacheprovider -c /dev/null --rootdir tests tests/test_exact.py -k "not variants_agree" "${@:2}"
