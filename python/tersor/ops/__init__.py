"""The ops: kernels where the device has them, plain torch elsewhere. Importing this package registers them with torch."""

from __future__ import annotations

from .. import native

native.check_torch()  # before anything that an old torch lacks

from ._register import OPS, Op, has_cuda_kernel, serve_on_cuda
from .differentiable import (
    input_grad,
    input_grad_differentiable,
    linear_dynamic_differentiable,
    linear_grouped_differentiable,
    linear_sparse_differentiable,
    linear_sparse_float_differentiable,
    linear_static_differentiable,
    linear_weight_only_differentiable,
    linear_xnor_differentiable,
)
from .epilogues import EPILOGUES
from .int_matmul import int_matmul
from .linear_glu import interleave_glu, linear_glu, linear_glu_quantize, linear_glu_s8, linear_glu_s8_quantize
from .linear_grouped import group_scale_bytes, group_scales, linear_grouped
from .linear_int8 import linear_acc, linear_dynamic, linear_s8, linear_static
from .linear_quantize import linear_dynamic_quantize, linear_s8_quantize
from .linear_sparse import linear_sparse, pairs_on_cuda
from .linear_sparse_float import linear_sparse_float, pack_sparse_float, sparse_float_rows
from .linear_weight_only import linear_weight_only
from .norm_quantize import norm_quantize
from .quantize_rows import quantize_rows, quantize_static
from .sparse_storage import pack_sparse, sparse_rows
from .tiles import CODES, from_rows, pack, packed_shape, to_rows, unpack
from .xnor import binarize_rows, linear_xnor

NATIVE = native.load_torch_ops()
NATIVE_CUDA = native.load_cuda_ops()
CUDA_KERNELS = tuple(name for name in OPS if has_cuda_kernel(name))
for _op in OPS.values():
    if _op.kernels and _op.public_name == _op.name and _op.name not in CUDA_KERNELS:
        serve_on_cuda(_op, pairs_on_cuda if NATIVE_CUDA and _op is linear_sparse else None)

__all__ = [
    "CODES",
    "CUDA_KERNELS",
    "EPILOGUES",
    "NATIVE",
    "NATIVE_CUDA",
    "OPS",
    "Op",
    "binarize_rows",
    "from_rows",
    "group_scale_bytes",
    "group_scales",
    "input_grad",
    "input_grad_differentiable",
    "int_matmul",
    "interleave_glu",
    "linear_acc",
    "linear_dynamic",
    "linear_dynamic_differentiable",
    "linear_dynamic_quantize",
    "linear_glu",
    "linear_glu_quantize",
    "linear_glu_s8",
    "linear_glu_s8_quantize",
    "linear_grouped",
    "linear_grouped_differentiable",
    "linear_s8",
    "linear_s8_quantize",
    "linear_sparse",
    "linear_sparse_differentiable",
    "linear_sparse_float",
    "linear_sparse_float_differentiable",
    "linear_static",
    "linear_static_differentiable",
    "linear_weight_only",
    "linear_weight_only_differentiable",
    "linear_xnor",
    "linear_xnor_differentiable",
    "norm_quantize",
    "pack",
    "pack_sparse",
    "pack_sparse_float",
    "packed_shape",
    "quantize_rows",
    "quantize_static",
    "sparse_float_rows",
    "sparse_rows",
    "to_rows",
    "unpack",
]
