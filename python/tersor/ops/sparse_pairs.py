"""Weights with at most two values in every four k (2:4), as the sparse tensor cores of a GPU read them.

    weight_packed  uint8 [ceil(N/16), ceil(K/64), 640]   16 channels x 64 k:  32 lanes x 16 bytes of values | 32 lanes x 4 of places

In the fragment order of mma.sp m16n8k64 (csrc/cuda/ptx.cuh), so that a lane loads its registers as they lie. A group of four k has
two values (zeros fill up) and their places, k mod 4 in two bits each, ascending.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tiles import TILE_N, ceil_div

BLOCK_K, BLOCK_BYTES = 64, 640
_VALUE_BYTES = 512


def is_24(weight: Tensor) -> bool:
    """Whether int8 [N, K] has at most two values in every four neighbouring k. Waits for the device."""
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4)).unflatten(1, (-1, 4))
    return not bool((torch.count_nonzero(groups, dim=-1) > 2).any())


def pack_pairs(weight: Tensor) -> Tensor:
    """int8 [N, K] -> the blocks. Raises ValueError where four neighbouring k hold more than two values."""
    if not is_24(weight):
        raise ValueError("pack_sparse: more than two values in four neighbouring k, which the storage of 2:4 weights cannot hold")
    n, k = weight.shape
    nt, kb = ceil_div(n, TILE_N), ceil_div(k, BLOCK_K)
    padded = torch.nn.functional.pad(weight, (0, kb * BLOCK_K - k, 0, nt * TILE_N - n))
    groups = padded.reshape(nt * TILE_N, kb * BLOCK_K // 4, 4)
    # The values first, then as many zeros as are needed, in order.
    place = torch.arange(4, device=weight.device) + 4 * (groups == 0)
    places = place.argsort(-1)[..., :2].sort(-1).values
    # Lane 4g + t holds rows g and g + 8, groups 2t and 2t + 1 of either half; its places are those of row g + 8 (t mod 2), half
    # t / 2.
    values = groups.gather(-1, places).reshape(nt, 2, 8, kb, 2, 4, 2, 2)  # tile, r / 8, g, block, half, t, group mod 2, value
    values = values.permute(0, 3, 2, 5, 4, 1, 6, 7).reshape(nt, kb, _VALUE_BYTES).view(torch.uint8)
    nibbles = (places[..., 0] + 4 * places[..., 1]).to(torch.uint8).reshape(nt, 2, 8, kb, 2, 4, 2)  # ..., half, byte, nibble
    stored = (nibbles[..., 0] + 16 * nibbles[..., 1]).permute(0, 3, 2, 4, 1, 5).reshape(nt, kb, -1)
    return torch.cat([values, stored], -1)


def _places(blocks: Tensor) -> Tensor:
    """int64 [Nt, Kb, 16 channels, 16 groups, 2]"""
    nt, kb, _ = blocks.shape
    stored = blocks[..., _VALUE_BYTES:].reshape(nt, kb, 8, 2, 2, 4)  # tile, block, g, half, r / 8, byte
    nibbles = torch.stack([stored & 15, stored >> 4], -1).permute(0, 1, 4, 2, 3, 5, 6).reshape(nt, kb, TILE_N, 16)
    return torch.stack([nibbles & 3, nibbles >> 2], -1).to(torch.int64)


def ascending(blocks: Tensor) -> bool:
    places = _places(blocks)
    return bool((places[..., 0] < places[..., 1]).all())


def pair_rows(blocks: Tensor, n: int, k: int) -> Tensor:
    """The blocks -> int8 [N, K]: the inverse of pack_pairs."""
    nt, kb, _ = blocks.shape
    values = blocks[..., :_VALUE_BYTES].contiguous().view(torch.int8).reshape(nt, kb, 8, 4, 2, 2, 2, 2)
    values = values.permute(0, 1, 5, 2, 4, 3, 6, 7).reshape(nt, kb, TILE_N, 16, 2)
    groups = torch.zeros((nt, kb, TILE_N, 16, 4), dtype=torch.int8, device=blocks.device).scatter(-1, _places(blocks), values)
    rows = groups.permute(0, 2, 1, 3, 4).reshape(nt * TILE_N, kb * BLOCK_K)
    return rows[:n, :k].contiguous()
