"""The products of the references, which a backend replaces: s8 x s8 -> s32, and float32 ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_K = 1024  # 1024 * 128 * 127 < 2**24: float32 holds every partial sum exactly


class Products(NamedTuple):
    """What computes int_matmul and float_matmul on a device."""

    int_matmul: Callable[[Tensor, Tensor], Tensor]
    float_matmul: Callable[[Tensor, Tensor], Tensor]


# Device type -> its products: a backend whose compiler has s8 x s8 -> s32 dots, or less than float32 in a float one, has its own.
ON_DEVICE: dict[str, Products] = {}


def int_matmul(x_s8: Tensor, w_s8: Tensor) -> Tensor:
    """Exact x [M, K] int8 times w [N, K] int8 transposed -> int32 [M, N], on any device.

    float32 matmuls over blocks of K, each exact, summed in int32; autocast would round them, so it is off here.
    """
    if x_s8.device.type in ON_DEVICE:
        return ON_DEVICE[x_s8.device.type].int_matmul(x_s8, w_s8)
    m, k = x_s8.shape
    acc = torch.zeros((m, w_s8.shape[0]), dtype=torch.int32, device=x_s8.device)
    with torch.autocast(x_s8.device.type, enabled=False):
        for begin in range(0, k, _BLOCK_K):
            x_block = x_s8[:, begin : begin + _BLOCK_K].float()
            w_block = w_s8[:, begin : begin + _BLOCK_K].float()
            acc += torch.mm(x_block, w_block.t()).to(torch.int32)
    return acc


def float_matmul(x: Tensor, w: Tensor, onto: Tensor | None = None) -> Tensor:
    """x [M, K] float times w [N, K] int8 or float32, transposed -> float32 [M, N]: float32 products and sums, autocast or not.
    onto, float32 [M, N], is added."""
    if x.device.type in ON_DEVICE:
        product = ON_DEVICE[x.device.type].float_matmul(x, w)
        return product if onto is None else onto + product
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = x.float(), w.float().t()
        return torch.mm(rows, columns) if onto is None else torch.addmm(onto, rows, columns)
