"""The tile: the one layout of packed weights, in plain torch.

    weight_packed  uint8 [ceil(N/16), ceil(K/kt), 64]      kt = 32 / bits
                          n tile      k step      16 channels x one 32-bit little-endian word

Codes are unsigned with an offset (int8: w + 128); pad codes are 0. Within a channel's word, byte b of step j holds k = 4j + b at
bits [bits*j, bits*j + bits): for int8 the word is four consecutive k.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_N = 16
TILE_BYTES = 64
MAX_K = 132104  # largest K with 128 * 127 * K < 2**31


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def packed_shape(n: int, k: int, bits: int = 8) -> tuple[int, int, int]:
    """Shape of the tiles of an [N, K] weight."""
    return ceil_div(n, TILE_N), ceil_div(k, 32 // bits), TILE_BYTES


def pack(codes: Tensor) -> Tensor:
    """uint8 codes [N, K] -> tiles uint8 [ceil(N/16), ceil(K/4), 64]; pads are 0."""
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"pack: codes is {codes.dtype} with {codes.dim()} dimensions, expected uint8 [N, K]")
    n, k = codes.shape
    nt, kt, _ = packed_shape(n, k)
    padded = torch.nn.functional.pad(codes, (0, kt * 4 - k, 0, nt * TILE_N - n))
    return padded.view(nt, TILE_N, kt, 4).permute(0, 2, 1, 3).reshape(nt, kt, TILE_BYTES)


def unpack(weight_packed: Tensor, n: int, k: int) -> Tensor:
    """Tiles -> uint8 codes [N, K]: the inverse of pack."""
    nt, kt, _ = check_tiles("unpack", weight_packed, n, k)
    return weight_packed.view(nt, kt, TILE_N, 4).permute(0, 2, 1, 3).reshape(nt * TILE_N, kt * 4)[:n, :k]


def to_rows(weight_packed: Tensor, n: int, k: int) -> Tensor:
    """Tiles -> plain int8 weights [N, K], for other tools."""
    return (unpack(weight_packed, n, k) ^ 128).view(torch.int8)


def from_rows(weight: Tensor) -> Tensor:
    """Plain int8 weights [N, K] -> tiles: the inverse of to_rows."""
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"from_rows: weight is {weight.dtype} with {weight.dim()} dimensions, expected int8 [N, K]")
    return pack(weight.contiguous().view(torch.uint8) ^ 128)


def check_tiles(function: str, weight_packed: Tensor, n: int, k: int) -> tuple[int, int, int]:
    """Raises ValueError unless weight_packed holds the tiles of an [N, K] weight; returns their shape."""
    want = packed_shape(n, k)
    if weight_packed.dtype != torch.uint8:
        raise ValueError(f"{function}: weight_packed is {weight_packed.dtype}, expected torch.uint8")
    if tuple(weight_packed.shape) != want:
        raise ValueError(f"{function}: weight_packed is {list(weight_packed.shape)}, expected {list(want)} for N={n}, K={k}")
    return want
