"""Linear layer on 8-bit tiles with float activations."""

from __future__ import annotations

import torch
from torch import Tensor

from . import int_matmul as _int_matmul
from ._register import op
from .checks import as_rows, check_linear
from .epilogues import EPILOGUES
from .tiles import blocks_of_rows

_BLOCK_TILES = 16  # 256 output channels are expanded to float at a time, never all of them


def _check(x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, epilogue: str = "none") -> Tensor:
    return check_linear("linear_weight_only", x, weight_packed, weight_scale, bias, epilogue)


@op(
    "(Tensor x, Tensor weight_packed, Tensor weight_scale, Tensor? bias, str epilogue='none') -> Tensor",
    check=_check,
    kernels=("widen_x", "gemm_f32_w8"),
    autocast=True,
)
def linear_weight_only(
    x: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, epilogue: str = "none"
) -> Tensor:
    """Linear layer with int8 weights and float activations: y = act((sum_k x * w) * weight_scale + bias), float32 sums.

    Shapes and errors as ops.linear_dynamic. x is read as it is; weights become float a block at a time. The order of the sums
    is the kernel's own: |error| <= 2 K eps sum_k |x w| * weight_scale (class F of docs/numerics.md).
    """
    _check(x, weight_packed, weight_scale, bias, epilogue)
    n, k = weight_scale.shape[0], x.shape[-1]
    x_rows = as_rows(x)
    blocks = [x_rows.new_empty((x_rows.shape[0], 0), dtype=torch.float32)]  # for N = 0
    for _, _, rows in blocks_of_rows(weight_packed, n, k, _BLOCK_TILES):
        blocks.append(_int_matmul.float_matmul(x_rows, rows))
    y = torch.cat(blocks, 1) * weight_scale
    if bias is not None:
        y = y + bias.float()
    return EPILOGUES[epilogue](y).to(x.dtype).reshape(*x.shape[:-1], n)
