"""That an installed tersor works here, in seconds: kernels against references, opcheck, every format swapped, compiled, saved and
loaded, and the numpy half. Needs no pytest, no compiler and no network; make wheel and cibuildwheel run it on what they built.

python tests/smoke.py
"""

from __future__ import annotations

import hashlib
import platform
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.library import opcheck

import tersor
import tersor.ops as ops
from tersor import native
from tersor.formats import FORMATS


def kernels_equal_references() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(9, 70).to(dtype)
        q, scale, row_sum = ops.quantize_rows(x)
        for got, want in zip((q, scale, row_sum), ops.quantize_rows.reference(x), strict=True):
            assert torch.equal(got, want)
        layer = tersor.QuantLinear.from_linear(nn.Linear(70, 37).to(dtype))
        args = (q, row_sum, layer.weight_packed, 37)
        assert torch.equal(ops.linear_acc(*args), ops.linear_acc.reference(*args))
        assert torch.equal(layer(x), ops.linear_dynamic.reference(x, layer.weight_packed, layer.weight_scale, layer.bias))
        opcheck(ops.linear_dynamic.raw, (x, layer.weight_packed, layer.weight_scale, layer.bias.detach(), "gelu"))
        opcheck(ops.linear_dynamic_differentiable.raw, (x.requires_grad_(), layer.weight_packed, layer.weight_scale, layer.bias))


@torch.no_grad()
def every_format(folder: Path) -> None:
    """Swapped, compiled without a compiler, saved, loaded: the same bits each time."""
    x = torch.randn(64, 64)
    for name, cls in FORMATS.items():
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).eval()
        tersor.quantize_(model, tersor.calibrate(model, cls(), x))
        want = model(x)
        assert not torch.isnan(want).any(), name
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want), name
        fused = torch.compile(model, backend="tersor")(x)
        assert (fused - want).abs().max() <= 0.02 * want.abs().max(), name
        torch.compiler.reset()
        tersor.save(model, folder / f"{name}.safetensors")
        fresh = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).eval()
        assert torch.equal(tersor.load_(fresh, folder / f"{name}.safetensors")(x), want), name


def without_torch() -> None:
    """The numpy half takes the same kernels to the same result."""
    layer = tersor.QuantLinear.from_linear(nn.Linear(70, 37))
    x = torch.randn(5, 70)
    arrays = (x, layer.weight_packed, layer.weight_scale, layer.bias)
    got = tersor.numpy.linear_dynamic(*(t.detach().numpy() for t in arrays))
    assert numpy.array_equal(got, layer(x).detach().numpy())


def main() -> None:
    torch.manual_seed(0)
    info = tersor.info()
    assert info.native, "the compiled kernels are not in use"
    assert native.numpy_module().__version__ == tersor.__version__
    kernels_equal_references()
    without_torch()
    with tempfile.TemporaryDirectory() as folder:
        every_format(Path(folder))
    (library,) = Path(tersor.__file__).parent.glob("_torch.*")
    assert any(Path(loaded).samefile(library) for loaded in torch.ops.loaded_libraries)
    print(f"tersor {tersor.__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(f"{len(FORMATS)} formats hold; gemm_w8: {info.kernels['gemm_w8']}; from {Path(tersor.__file__).parent.parent.name}")
    print(library.name, hashlib.sha256(library.read_bytes()).hexdigest())


if __name__ == "__main__":
    sys.exit(main())
