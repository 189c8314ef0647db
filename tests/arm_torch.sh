#!/usr/bin/env bash
# The op tests on aarch64 Python with torch 2.10 under qemu, without a chroot and without touching this system's packages.
#
#   tests/arm_torch.sh PYTHON [FOLDER]    PYTHON has cmake, ninja, pybind11 and pip; FOLDER keeps what was downloaded
#
# Needs g++-aarch64-linux-gnu and qemu-user-static. Debian's arm64 Python 3.11 and its libraries are unpacked, not installed; the
# wheels are pip's for that platform.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 folder=$(realpath -m "${2:-build/arm-torch}")
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

"$bin/cmake" -G Ninja -S . -B build/arm --log-level=WARNING -DTERSOR_TORCH=ON -DTERSOR_NUMPY=ON -DTERSOR_CPP_TESTS=ON \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_CXX_FLAGS="-isystem $root/usr/include" -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DPython_EXECUTABLE="$python" \
  -DPython_INCLUDE_DIR="$root/usr/include/python3.11" -DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DTORCH_LIB_DIR="$site/torch/lib" -DSKBUILD_PROJECT_VERSION=0.1.0
"$bin/cmake" --build build/arm --target _torch _numpy -- --quiet
rm -rf "$site/tersor"
cp -r python/tersor "$site/tersor"
rm -f "$site"/tersor/*.so
cp build/arm/_torch.so build/arm/_numpy*.so "$site/tersor/"

export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=2
qemu="qemu-aarch64-static -cpu max -L $root $root/usr/bin/python3.11"
$qemu -c "import torch, tersor; print('torch', torch.__version__, 'on aarch64:', tersor.info().kernels['gemm_w8'])"
# Out of the repository's own settings: its plugins are not all there.
$qemu -m pytest -q -p no:cacheprovider -c /dev/null --rootdir tests tests/test_exact.py -k "not variants_agree" "${@:3}"
