"""Linear layer on sparse int8 weights with int8 activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import int_matmul as _int_matmul
from ._register import library, op
from .checks import as_rows, check_bias, check_device, check_tensors, check_weight_scale, check_x
from .epilogues import check_epilogue
from .linear_int8 import finish
from .quantize_rows import quantize_rows
from .sparse_storage import check_shapes, sparse_rows, storage_of

# The kernel of one storage on CUDA, the only one there: linear_sparse goes to it (_register.serve_on_cuda).
library.define("linear_sparse_pairs(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, str epilogue) -> Tensor")


def _check(
    x: Tensor,
    weight_packed: Tensor,
    weight_index: Tensor,
    weight_offset: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
) -> Tensor:
    function = "linear_sparse"
    k = check_x(function, x)
    stored = {
        "weight_packed": weight_packed,
        "weight_index": weight_index,
        "weight_offset": weight_offset,
        "weight_sum": weight_sum,
        "weight_scale": weight_scale,
    }
    check_tensors(function, **stored)
    n = check_weight_scale(function, weight_scale)
    check_device(function, x, **stored, bias=bias)
    check_shapes(function, weight_packed, weight_index, weight_offset, weight_sum, n, k)
    check_bias(function, bias, n)
    check_epilogue(function, epilogue)
    return x.new_empty((*x.shape[:-1], n))


@op(
    "(Tensor x, Tensor weight_packed, Tensor weight_index, Tensor weight_offset, Tensor weight_sum, Tensor weight_scale, "
    "Tensor? bias, str epilogue='none') -> Tensor",
    check=_check,
    kernels=("quantize_x", "spmm_s8"),
    autocast=True,
)
def linear_sparse(
    x: Tensor,
    weight_packed: Tensor,
    weight_index: Tensor,
    weight_offset: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
) -> Tensor:
    """Sparse int8 linear layer with dynamic int8 activations: the bits of linear_dynamic on the same weight.

    x              float32 / bfloat16 / float16 [..., K], any strides
    weight_packed, weight_index, weight_offset, weight_sum   as pack_sparse gives them, see ops/sparse_storage.py
    weight_scale   float32 [N]
    bias           float [N] or None
    returns        dtype of x, [..., N]

    The structure is checked where a file is read, not here: a wrong one gives wrong numbers, never a read outside the tensors.
    Raises ValueError / TypeError where sizes or dtypes do not fit. Gradients for x and bias as those of linear_dynamic.
    """
    _check(x, weight_packed, weight_index, weight_offset, weight_sum, weight_scale, bias, epilogue)
    q, scale, _ = quantize_rows.reference(x)
    n, k = weight_scale.shape[0], x.shape[-1]
    acc = _int_matmul.int_matmul(as_rows(q), sparse_rows(weight_packed, weight_index, weight_offset, n, k))
    return finish(acc.reshape(*x.shape[:-1], n), scale, weight_scale, bias, epilogue, x.dtype)


def pairs_on_cuda(
    x: Tensor,
    weight_packed: Tensor,
    weight_index: Tensor,
    weight_offset: Tensor,
    weight_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    epilogue: str = "none",
) -> Any:
    """linear_sparse by its CUDA kernel; NotImplemented for a storage that has none."""
    if storage_of(weight_packed, weight_index) != "pairs":
        return NotImplemented
    return torch.ops.tersor.linear_sparse_pairs.default(x, weight_packed, weight_scale, bias, epilogue)
