#!/usr/bin/env bash
# Shows that ONE built _torch.so works under another torch: tests/other_torch.sh PYTHON [FOLDER WITH AN INSTALLED tersor]
#
# PYTHON is the interpreter of any environment with torch >= 2.10. The pure-Python package and _torch.so (not the per-Python _numpy)
# of the installed tersor are copied beside it and a smoke test runs there; the file's sha256 is printed, so that two runs can be
# seen to have used the same binary.
set -euo pipefail
python=${1:?usage: tests/other_torch.sh PYTHON [FOLDER WITH tersor/]}
here=$(cd "$(dirname "$0")/.." && pwd)
source=${2:-$("$here/.venv/bin/python" -c "import importlib.util as u; print(u.find_spec('tersor').submodule_search_locations[0])")}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/tersor"
(cd "$source" && tar cf - --exclude '_numpy*' --exclude __pycache__ .) | tar xf - -C "$copy/tersor"
sha256sum "$copy/tersor/_torch.so" | cut -d' ' -f1
cd "$copy"
PYTHONPATH="$copy" "$python" - <<'PY'
import sys
import torch
from torch.library import opcheck

torch.ops.load_library("tersor/_torch.so")
import tersor.native

tersor.native.load_torch_ops = lambda: True  # the kernels are loaded; the per-Python numpy module stays out of it
import tersor
import tersor.ops as ops

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = torch.randn(9, 70).to(dtype)
    q, scale, row_sum = ops.quantize_rows(x)
    for got, want in zip((q, scale, row_sum), ops.quantize_rows.reference(x)):
        assert torch.equal(got, want)
    layer = tersor.QuantLinear.from_linear(torch.nn.Linear(70, 37).to(dtype))
    args = (q, row_sum, layer.weight_packed, 37)
    assert torch.equal(ops.linear_acc(*args), ops.linear_acc.reference(*args))
    assert torch.equal(layer(x), ops.linear_dynamic.reference(x, layer.weight_packed, layer.weight_scale, layer.bias))
    opcheck(ops.linear_dynamic.raw, (x, layer.weight_packed, layer.weight_scale, layer.bias.detach(), "gelu"))
    opcheck(ops.linear_dynamic_differentiable.raw, (x.requires_grad_(), layer.weight_packed, layer.weight_scale, layer.bias))
model = torch.nn.Sequential(torch.nn.Linear(70, 200), torch.nn.GELU(), torch.nn.Linear(200, 37))
tersor.quantize_(model, tersor.Int8Dynamic())
x = torch.randn(5, 70)
assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
assert any("_torch.so" in path for path in torch.ops.loaded_libraries)
print(f"torch {torch.__version__}, Python {sys.version.split()[0]}: ops, opcheck, compile and swap hold")
PY
