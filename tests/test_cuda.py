"""The CUDA binding and what stands around it, without a GPU: which ops have kernels, what they need, what a call says here, what a
layer keeps on a GPU. tests/test_gpu.py runs the ops on one."""

import ctypes.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import assert_equal

import tersor
import tersor.ops as ops
from tersor import native
from tersor.ops import _register
from tersor.ops.sparse_pairs import BLOCK_BYTES, is_24
from tersor.ops.sparse_storage import check_structure, holds_24
from tersor.plain import tiles_of, to_device_form_

binding = pytest.mark.skipif(not ops.NATIVE_CUDA, reason="this installation has no CUDA kernels: build with TERSOR_CUDA=ON")
no_cuda_torch = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a build with CUDA")
ROOT = Path(__file__).resolve().parent.parent
LAYERS = [name for name, op in ops.OPS.items() if op.kernels and not name.endswith("_differentiable")]
BY_REFERENCE = {"linear_weight_only", "linear_sparse", "linear_sparse_float"}  # linear_sparse: but for 2:4 weights


class OnGpu(torch.Tensor):
    """A tensor without memory that says it is on a GPU: reaches the CUDA key of the dispatcher in any torch."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, t: torch.Tensor, device: str = "cuda:0"):
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was not to be called")


def test_launches_and_inline_ptx_stand_in_one_file_each():
    files = [*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "bindings").iterdir()]
    code = {path.name: re.sub(r"//.*", "", path.read_text()) for path in files}
    assert [name for name, text in code.items() if "<<<" in text] == ["launch.cu"]
    assert [name for name, text in code.items() if re.search(r"\basm\b", text)] == ["ptx.cuh"]


@binding
def test_every_op_with_a_kernel_has_one_on_cuda():
    assert set(ops.CUDA_KERNELS) == set(LAYERS) - BY_REFERENCE
    for name in LAYERS:
        assert _register.has_cuda_kernel(name), name
    assert torch._C._dispatch_has_kernel_for_dispatch_key("tersor::linear_sparse_pairs", "CUDA")
    assert "linear_dynamic" in tersor.info().devices["cuda"]


@binding
@no_cuda_torch
def test_a_cuda_tensor_on_a_torch_without_cuda_says_so():
    x = torch.randn(3, 64)
    tiles = ops.from_rows(torch.zeros(16, 64, dtype=torch.int8))
    layer = (tiles, torch.ones(16))
    calls = {
        "quantize_rows": (x,),
        "quantize_static": (x, torch.tensor(0.1)),
        "binarize_rows": (x, torch.zeros(64)),
        "linear_dynamic": (x, *layer, None),
        "linear_static": (x, *layer, None, torch.tensor(0.1)),
        "linear_acc": (x.to(torch.int8), torch.zeros(3, dtype=torch.int32), tiles, 16),
        "linear_glu": (x, *layer, None, "silu"),
        "norm_quantize": (x, None, None, None, 1e-5, "rms"),
    }
    for name, arguments in calls.items():
        on_gpu = [OnGpu(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        for call in (ops.OPS[name], ops.OPS[name].raw):
            with torch._C._DisableTorchDispatch(), pytest.raises(RuntimeError, match="install one with CUDA") as error:
                call(*on_gpu, *([False, False] if name == "norm_quantize" else []))
            assert str(error.value).startswith(f"{name}: got a CUDA tensor, but this torch is a build without CUDA")


@no_cuda_torch
def test_a_layer_cannot_move_to_a_gpu_that_this_torch_does_not_know():
    layer = tersor.QuantLinear.from_linear(torch.nn.Linear(64, 32))
    x = torch.randn(3, 64)
    want = layer(x)
    with pytest.raises(AssertionError, match="Torch not compiled with CUDA enabled"):
        layer.to("cuda")
    assert_equal(layer(x), want)


CALL_ON_DEVICE_1 = """
import ctypes, json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_cuda import OnGpu
import tersor.ops as ops
try:
    with torch._C._DisableTorchDispatch():
        ops.quantize_rows.raw(OnGpu(torch.randn(3, 64), "cuda:1"))
except RuntimeError as error:
    said = str(error)
stand_in = ctypes.CDLL(sys.argv[2])
names = ("stand_in_stream_of", "stand_in_guard_of", "stand_in_guards")
print(json.dumps([said, *(ctypes.c_int32.in_dll(stand_in, name).value for name in names)]))
"""


@binding
@no_cuda_torch
def test_a_machine_without_a_driver_says_so(tmp_path):
    if not shutil.which("gcc") or ctypes.util.find_library("cuda"):
        pytest.skip("needs gcc, and a machine without a driver")
    tests, library = Path(__file__).parent, tmp_path / "libtorch_cuda.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", tests / "cuda_stand_in.c", "-o", library], check=True
    )
    command = [sys.executable, "-c", CALL_ON_DEVICE_1, tests, library]
    out = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, check=True)
    said, stream_of, guard_of, guards = json.loads(out.stdout.splitlines()[-1])
    assert stream_of in (-1, 1)  # asked for behind the device
    assert (guard_of, guards) == (1, 0), "the device of the tensor, and given back"
    assert said.startswith(
        "quantize_rows: no NVIDIA driver, or one older than the CUDA runtime of this build (error 35); install or"
    )


@binding
def test_symbols_of_the_library():
    path = Path(ops.__file__).parents[1] / "_torch_cuda.so"
    if not shutil.which("readelf"):
        pytest.skip("no readelf on the PATH (binutils)")
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"cuda|cudart|nvidia|c10|python", name)], needed
    symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    undefined = re.findall(r" U (\S+)", symbols)
    assert not [name for name in undefined if re.match(r"cuda|cu[A-Z]|__cuda", name)], "the CUDA runtime is not inside"
    assert not [name for name in undefined if name.startswith("Py")]
    exported = re.findall(r" T (\S+)", symbols)
    assert not [name for name in exported if re.match(r"cuda|__cuda", name)], "the CUDA runtime inside would meet torch's own"
    assert path.stat().st_size < 20 << 20


def test_what_has_no_cuda_kernel_runs_as_its_reference_and_says_so_once(caplog, monkeypatch):
    op = ops.linear_weight_only
    run = {}
    monkeypatch.setattr(_register.library, "impl", lambda name, f, key: run.update({(name, key): f}))
    native.warn_once.cache_clear()
    _register.serve_on_cuda(op)
    x, w = torch.randn(3, 20), torch.randint(-127, 128, (18, 20), dtype=torch.int8)
    arguments = (x, ops.from_rows(w), torch.rand(18), None)
    with caplog.at_level(logging.WARNING, "tersor"):
        for _ in range(2):
            assert_equal(run["linear_weight_only", "CUDA"](*arguments), op.reference(*arguments))
    assert [record.message.split(" in this")[0] for record in caplog.records] == [
        "tersor: linear_weight_only has no CUDA kernel for these tensors"
    ]
    _register.serve_on_cuda(op, lambda *_: NotImplemented)
    assert_equal(run["linear_weight_only", "CUDA"](*arguments), op.reference(*arguments))
    _register.serve_on_cuda(op, lambda *_: "the kernel's")
    assert run["linear_weight_only", "CUDA"](*arguments) == "the kernel's"


# ---- 2:4 -------------------------------------------------------------------------------------------------------------------------


def pruned_24(n: int, k: int) -> torch.Tensor:
    """int8 [N, K] with at most two values in every four k; some are zero all the same."""
    w = torch.randint(-127, 128, (n, -(-k // 4), 4), dtype=torch.int8)
    keep = torch.zeros_like(w).scatter_(-1, torch.rand(w.shape).argsort(-1)[..., :2], 1)
    return (w * keep * (torch.rand(w.shape) < 0.9)).reshape(n, -1)[:, :k].contiguous()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (37, 130), (40, 63), (5, 260)])
def test_pairs_are_packed_and_unpacked(n: int, k: int):
    w = pruned_24(n, k)
    parts = ops.pack_sparse(w, "pairs")
    assert tuple(parts.weight_packed.shape) == (-(-n // 16), -(-k // 64), BLOCK_BYTES)
    assert_equal(ops.sparse_rows(*parts[:3], n, k), w)
    check_structure("test", parts, n, k)
    x, scale = torch.randn(3, k), torch.rand(n)
    assert_equal(ops.linear_sparse.reference(x, *parts, scale, None), ops.linear_sparse(x, *ops.pack_sparse(w), scale, None))


def test_a_lane_finds_its_fragment():
    # by the drawing in csrc/cuda/ptx.cuh; each group of four k has two values, at places that differ by row and by group
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    places = [[pairs[(row + row // 8 + 5 * (group // 8) + group) % 6] for group in range(16)] for row in range(16)]
    w = torch.zeros(16, 64, dtype=torch.int8)
    for row in range(16):
        for group, pair in enumerate(places[row]):
            for place in pair:
                w[row, 4 * group + place] = row + 16 * (group % 7) + 1
    block = ops.pack_sparse(w, "pairs").weight_packed[0, 0]
    for g in range(8):
        for t in range(4):
            lane = 4 * g + t
            for register in range(4):
                row, half = g + 8 * (register % 2), register // 2
                for byte in range(4):
                    group = 8 * half + 2 * t + byte // 2
                    assert int(block[16 * lane + 4 * register + byte]) == int(w[row, 4 * group + places[row][group][byte % 2]])
            row, half = g + 8 * (t % 2), t // 2
            nibbles = [first | second << 2 for first, second in places[row][8 * half : 8 * half + 8]]
            stored = [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]
            assert block[512 + 4 * lane : 516 + 4 * lane].tolist() == stored


def test_pairs_refuse_what_they_cannot_hold():
    w = pruned_24(16, 64)
    w[3, 8:11] = 5
    assert not is_24(w)
    with pytest.raises(ValueError, match="more than two values in four neighbouring k"):
        ops.pack_sparse(w, "pairs")
    parts = ops.pack_sparse(pruned_24(16, 64), "pairs")
    parts.weight_packed[0, 0, 600] = 0
    with pytest.raises(ValueError, match="places do not ascend"):
        check_structure("test", parts, 16, 64)
    with pytest.raises(ValueError, match="weight_packed is stored for a GPU"):
        ops.linear_sparse(torch.randn(2, 64), *parts, torch.ones(16), None)


def test_a_24_layer_changes_its_form_with_the_device(tmp_path):
    n, k = 37, 128
    linear = torch.nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.mul_(pruned_24(n, k) != 0)
    layer = tersor.QuantLinear.from_linear(linear, tersor.SparseInt8())
    before = {spec.name: getattr(layer, spec.name).clone() for spec in layer.specs()}
    x = torch.randn(3, k)
    want = layer(x)
    # what .to("cuda") does behind the move, without one
    to_device_form_(layer, torch.device("cuda"))
    assert tuple(layer.weight_packed.shape) == (3, 2, BLOCK_BYTES)
    assert [name for name, _ in layer.named_parameters()][-1] == "bias"
    assert_equal(ops.linear_sparse.reference(x, *(getattr(layer, s.name) for s in layer.specs()), layer.bias), want)
    assert int((layer.dequantize().weight != 0).sum()) <= n * k // 2
    for name, value in tiles_of(layer).items():
        assert_equal(value, before[name])
    tersor.save(torch.nn.Sequential(layer), tmp_path / "model.safetensors")
    loaded = tersor.load_(torch.nn.Sequential(torch.nn.Linear(k, n)), tmp_path / "model.safetensors")
    assert_equal(loaded(x), want)
    layer.to("cpu")
    for name, value in before.items():
        assert_equal(getattr(layer, name).detach(), value)
    assert_equal(layer(x), want)


@pytest.mark.parametrize("storage", ["tiles", "masks", "windows", "pairs"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (37, 130), (40, 263)])
def test_24_is_seen_in_the_stored_form(storage: str, n: int, k: int):
    w = pruned_24(n, k)
    assert holds_24(ops.pack_sparse(w, storage))
    assert holds_24(ops.pack_sparse(torch.zeros_like(w), storage))
    if storage != "pairs" and k > 3:
        for row, group in ((0, 0), (n - 1, k // 4 - 1), (n // 2, k // 8)):
            third = w.clone()
            third[row, 4 * group : 4 * group + 3] = torch.tensor([-5, 1, 7], dtype=torch.int8)
            assert not holds_24(ops.pack_sparse(third, storage))


def test_a_cast_keeps_the_form_of_the_device_the_layer_is_on(monkeypatch):
    devices = []
    monkeypatch.setattr("tersor.nn.to_device_form_", lambda layer, device: devices.append(device.type))
    layer = tersor.QuantLinear.from_linear(torch.nn.Linear(64, 32), tersor.SparseInt8())
    layer.to("meta").half()  # meta: the device besides the CPU that is always there
    assert devices == ["meta", "meta"]


def test_other_sparse_layers_keep_their_form():
    linear = torch.nn.Linear(128, 37)
    layer = tersor.QuantLinear.from_linear(linear, tersor.SparseInt8())
    stored = {spec.name: getattr(layer, spec.name) for spec in layer.specs()}
    assert layer.format.on_device(stored, "cuda", 37, 128) is None
    dense = tersor.QuantLinear.from_linear(linear, tersor.Int8Dynamic())
    assert dense.format.on_device({}, "cuda", 37, 128) is None
