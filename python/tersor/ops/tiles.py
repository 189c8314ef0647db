"""The tile: the one layout of packed weights, in plain torch.

    weight_packed  uint8 [ceil(N/16), ceil(K/kt), 64]      kt = 32 / bits
                          n tile      k step      16 channels x one 32-bit little-endian word

Codes are unsigned with an offset; pad codes are 0. Within a channel's word, byte b of step j holds k = 4j + b at
bits [bits*j, bits*j + bits): for int8 the word is four consecutive k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_N = 16
TILE_BYTES = 64
MAX_K = 132104  # largest K with 128 * 127 * K < 2**31


class Codes(NamedTuple):
    """What the codes of a width stand for: value = step * code - offset. lowest and highest are the values that are allowed."""

    offset: int
    step: int
    lowest: int
    highest: int


# By bits. Two bits hold a ternary value: code 3 is not written, and reads as 2.
CODES = {8: Codes(128, 1, -128, 127), 4: Codes(8, 1, -8, 7), 2: Codes(1, 1, -1, 1), 1: Codes(1, 2, -1, 1)}


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def check_bits(function: str, bits: int) -> None:
    if bits not in CODES:
        raise ValueError(f"{function}: bits is {bits!r}, expected one of: {', '.join(map(str, CODES))}")


def packed_shape(n: int, k: int, bits: int = 8) -> tuple[int, int, int]:
    """Shape of the tiles of an [N, K] weight."""
    check_bits("packed_shape", bits)
    return ceil_div(n, TILE_N), ceil_div(k, 32 // bits), TILE_BYTES


def pack(codes: Tensor, bits: int = 8) -> Tensor:
    """uint8 codes [N, K], each below 2**bits -> tiles uint8 [ceil(N/16), ceil(K/kt), 64]; pads are 0."""
    check_bits("pack", bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"pack: codes is {codes.dtype} with {codes.dim()} dimensions, expected uint8 [N, K]")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"pack: codes holds {int(codes.max())}, expected 0 to {2**bits - 1} for bits={bits}")
    n, k = codes.shape
    nt, kt, _ = packed_shape(n, k, bits)
    steps = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, kt * 4 * steps - k, 0, nt * TILE_N - n)).reshape(nt, TILE_N, kt, steps, 4)
    words = padded[..., 0, :]
    for j in range(1, steps):
        words = words | (padded[..., j, :] << (bits * j))
    return words.permute(0, 2, 1, 3).reshape(nt, kt, TILE_BYTES)


def unpack(weight_packed: Tensor, n: int, k: int, bits: int = 8) -> Tensor:
    """Tiles -> uint8 codes [N, K]: the inverse of pack."""
    nt, kt, _ = check_tiles("unpack", weight_packed, n, k, bits)
    words = weight_packed.view(nt, kt, TILE_N, 4).permute(0, 2, 1, 3)
    steps = 8 // bits
    if steps > 1:
        words = torch.stack([(words >> (bits * j)) & (2**bits - 1) for j in range(steps)], dim=3)
    return words.reshape(nt * TILE_N, kt * 4 * steps)[:n, :k]


def to_rows(weight_packed: Tensor, n: int, k: int, bits: int = 8) -> Tensor:
    """Tiles -> plain int8 values [N, K], for other tools: -128..127, -8..7, -1..1, or -1 and 1.

    What is_rows() already says to be such rows is returned as it is.
    """
    if is_rows(weight_packed, n, k):
        return weight_packed
    codes = unpack(weight_packed, n, k, bits)
    if bits == 8:
        return (codes ^ 128).to(torch.int8)
    offset, step, *_ = CODES[bits]
    return codes.to(torch.int8) * step - offset


def is_rows(weight_packed: Tensor, n: int, k: int) -> bool:
    """Whether a layer's weight is in the form that devices without kernels keep: its int8 values [N, K] instead of tiles."""
    return weight_packed.dtype == torch.int8 and tuple(weight_packed.shape) == (n, k)


def blocks_of_rows(weight_packed: Tensor, n: int, k: int, tiles: int, bits: int = 8) -> Iterator[tuple[int, int, Tensor]]:
    """(begin, end, int8 values [end - begin, K]) of the channels, `tiles` n tiles at a time; all at once where they are rows."""
    if is_rows(weight_packed, n, k):
        yield 0, n, weight_packed
        return
    for t in range(0, weight_packed.shape[0], tiles):
        begin, end = t * TILE_N, min(n, (t + tiles) * TILE_N)
        yield begin, end, to_rows(weight_packed[t : t + tiles], end - begin, k, bits)


def from_rows(weight: Tensor, bits: int = 8) -> Tensor:
    """Plain int8 values [N, K] -> tiles: the inverse of to_rows. Raises ValueError on values that the width does not have."""
    check_bits("from_rows", bits)
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"from_rows: weight is {weight.dtype} with {weight.dim()} dimensions, expected int8 [N, K]")
    if bits == 8:
        return pack(weight.contiguous().view(torch.uint8) ^ 128)
    offset, step, lowest, highest = CODES[bits]
    if weight.numel():
        least, most = (int(t) for t in weight.aminmax())
        if least < lowest or most > highest or (bits == 1 and bool((weight == 0).any())):
            allowed = "-1 and 1" if bits == 1 else f"{lowest} to {highest}"
            raise ValueError(f"from_rows: weight holds values from {least} to {most}, expected {allowed} for bits={bits}")
    return pack((weight.to(torch.int16) + offset).div(step, rounding_mode="floor").to(torch.uint8), bits)


def check_tiles(function: str, weight_packed: Tensor, n: int, k: int, bits: int = 8) -> tuple[int, int, int]:
    """Raises ValueError unless weight_packed holds the tiles, or the int8 rows, of an [N, K] weight; returns the tiles' shape."""
    check_bits(function, bits)
    want = packed_shape(n, k, bits)
    if is_rows(weight_packed, n, k):
        return want
    if weight_packed.dtype != torch.uint8:
        raise ValueError(f"{function}: weight_packed is {weight_packed.dtype}, expected torch.uint8")
    if tuple(weight_packed.shape) != want:
        width = "" if bits == 8 else f" at bits={bits}"
        raise ValueError(f"{function}: weight_packed is {list(weight_packed.shape)}, expected {list(want)} for N={n}, K={k}{width}")
    return want
