"""Linear layer on sparse float weights, and how these are stored.

weight_packed  uint8 [Z, 4]     the non-zeros of channel after channel, each in ascending order of k: bytes of float32
weight_index   uint8 [Z, 2]     k of each, little-endian
weight_offset  int64 [N + 1]    those of channel n are [offset[n], offset[n + 1])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import int_matmul as _int_matmul
from ._register import op
from .checks import as_rows, check_bias, check_device, check_tensors, check_x
from .epilogues import EPILOGUES, check_epilogue
from .sparse_storage import as_u16, offset_dtype, owners, u16_bytes

MAX_K = 65536  # what two bytes of index reach
_BLOCK = 1 << 14  # entries multiplied at a time


class FloatParts(NamedTuple):
    """The stored tensors of a sparse float weight."""

    weight_packed: Tensor
    weight_index: Tensor
    weight_offset: Tensor


def pack_sparse_float(weight: Tensor) -> FloatParts:
    """float values [N, K] -> what is stored."""
    if weight.shape[1] > MAX_K:
        raise ValueError(f"pack_sparse_float: K={weight.shape[1]} is above {MAX_K}")
    channel, k = weight.nonzero(as_tuple=True)
    values = weight[channel, k].float().contiguous().view(torch.uint8).reshape(-1, 4)
    counts = torch.count_nonzero(weight, dim=1) if weight.shape[1] else torch.zeros(weight.shape[0], dtype=torch.int64)
    offset = torch.nn.functional.pad(counts.to(weight.device).cumsum(0, dtype=torch.int64), (1, 0))
    return FloatParts(values, u16_bytes(k), offset)


def sparse_float_rows(weight_packed: Tensor, weight_index: Tensor, weight_offset: Tensor, k: int) -> Tensor:
    """The stored tensors -> float32 values [N, K]: the inverse of pack_sparse_float."""
    n, entries = weight_offset.shape[0] - 1, weight_packed.shape[0]
    # A copy begins at a multiple of 4 bytes wherever the bytes lay.
    values = weight_packed.clone(memory_format=torch.contiguous_format).view(torch.float32).reshape(entries)
    rows = torch.zeros((n, k), dtype=torch.float32, device=weight_packed.device)
    return rows.index_put_((owners(weight_offset, entries), as_u16(weight_index)), values, accumulate=True)


def check_float_shapes(function: str, packed: Tensor, index: Tensor, offset: Tensor) -> int:
    """Raises ValueError where shapes or dtypes do not fit each other; reads no values. Returns N."""
    if packed.dtype != torch.uint8 or index.dtype != torch.uint8 or offset.dtype != offset_dtype(offset):
        raise ValueError(
            f"{function}: weight_packed, weight_index, weight_offset are {packed.dtype}, {index.dtype}, {offset.dtype}, expected "
            "torch.uint8, torch.uint8, torch.int64"
        )
    z = packed.shape[0] if packed.dim() else 0
    if tuple(packed.shape) != (z, 4) or tuple(index.shape) != (z, 2) or offset.dim() != 1 or offset.shape[0] < 1:
        raise ValueError(
            f"{function}: weight_packed is {list(packed.shape)}, weight_index {list(index.shape)}, weight_offset "
            f"{list(offset.shape)}, expected [Z, 4], [Z, 2] and [N + 1]"
        )
    return offset.shape[0] - 1


def check_float_structure(function: str, parts: FloatParts, n: int, k: int) -> None:
    """Raises ValueError unless the stored tensors make a weight [N, K]; reads all of them but the values."""
    packed, index, offset = parts
    if check_float_shapes(function, packed, index, offset) != n:
        raise ValueError(f"{function}: weight_offset is {list(offset.shape)}, expected [{n + 1}] for N={n}")
    entries = packed.shape[0]
    if int(offset[0]) != 0 or int(offset[-1]) != entries or bool((offset[1:] < offset[:-1]).any()):
        raise ValueError(f"{function}: weight_offset does not rise from 0 to {entries}, the entries of weight_packed")
    at = as_u16(index)
    if at.numel() and int(at.max()) >= k:
        raise ValueError(f"{function}: weight_index holds {int(at.max())}, expected up to {k - 1} for K={k}")


def _check(
    x: Tensor, weight_packed: Tensor, weight_index: Tensor, weight_offset: Tensor, bias: Tensor | None, epilogue: str = "none"
) -> Tensor:
    function = "linear_sparse_float"
    k = check_x(function, x)
    if k > MAX_K:
        raise ValueError(f"{function}: K={k} is above {MAX_K}, what two bytes of index reach")
    stored = {"weight_packed": weight_packed, "weight_index": weight_index, "weight_offset": weight_offset}
    check_tensors(function, **stored)
    check_device(function, x, **stored, bias=bias)
    n = check_float_shapes(function, weight_packed, weight_index, weight_offset)
    check_bias(function, bias, n)
    check_epilogue(function, epilogue)
    return x.new_empty((*x.shape[:-1], n))


@op(
    "(Tensor x, Tensor weight_packed, Tensor weight_index, Tensor weight_offset, Tensor? bias, str epilogue='none') -> Tensor",
    check=_check,
    kernels=("widen_x", "spmm_f32"),
    autocast=True,
)
def linear_sparse_float(
    x: Tensor, weight_packed: Tensor, weight_index: Tensor, weight_offset: Tensor, bias: Tensor | None, epilogue: str = "none"
) -> Tensor:
    """Linear layer on sparse float32 weights: y = act((sum over the non-zeros of x * w) + bias), float32 sums.

    x        float32 / bfloat16 / float16 [..., K], any strides, K <= 65536
    weight_packed, weight_index, weight_offset   as pack_sparse_float gives them
    bias     float [N] or None
    returns  dtype of x, [..., N]

    What x holds where a channel has no weight is not looked at: a NaN or inf there stays without effect. The order of the sums
    is the kernel's own: |error| <= (2 Z + 2) 2^-24 sum_k |x w| with Z non-zeros in the channel (class F of docs/numerics.md).
    The structure is checked where a file is read, not here: a wrong one gives wrong numbers, never a read outside the tensors.

    Raises ValueError / TypeError where sizes or dtypes do not fit. Gradients for x and bias.
    """
    _check(x, weight_packed, weight_index, weight_offset, bias, epilogue)
    n = weight_offset.shape[0] - 1
    xf = as_rows(x).float()
    values = weight_packed.clone(memory_format=torch.contiguous_format).view(torch.float32).reshape(-1)
    channel, at = owners(weight_offset, len(values)), as_u16(weight_index)
    y = torch.zeros((xf.shape[0], n), dtype=torch.float32, device=x.device)
    for part in (slice(i, i + _BLOCK) for i in range(0, len(values), _BLOCK)):
        y.index_add_(1, channel[part], xf[:, at[part]] * values[part])
    if bias is not None:
        y = y + bias.float()
    return EPILOGUES[epilogue](y).to(x.dtype).reshape(*x.shape[:-1], n)


def linear_float(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer on the dense float32 weight [N, K], as plain torch: what a device without kernels computes."""
    y = _int_matmul.float_matmul(as_rows(x), weight)
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
