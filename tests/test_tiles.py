"""The tile's layout: golden bytes, and conversions that are inverses of each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tersor.ops as ops


def test_golden_bytes():
    # w[n, k] = 16 k + n - 128: the byte at [tile, step, 4 n + b] must be the code of channel n at k = 4 step + b
    n, k = 18, 6
    w = (16 * torch.arange(k).view(1, k) + torch.arange(n).view(n, 1) - 128).to(torch.int8)
    tiles = ops.from_rows(w)
    assert tiles.shape == (2, 2, 64)
    assert tiles[0, 0, :8].tolist() == [0, 16, 32, 48, 1, 17, 33, 49]  # channels 0 and 1, k = 0..3, codes w + 128
    assert tiles[0, 1, :4].tolist() == [64, 80, 0, 0]  # channel 0, k = 4, 5, then pads: code 0
    assert tiles[0, 0, 60:].tolist() == [15, 31, 47, 63]  # channel 15
    assert tiles[1, 0, :8].tolist() == [16, 32, 48, 64, 17, 33, 49, 65]  # second n tile: channels 16, 17
    assert tiles[1, 0, 8:].sum() == 0  # channels that do not exist
    word = tiles[0, 0, :4].view(torch.int32).item()  # one little-endian word a channel
    assert word == 0 | 16 << 8 | 32 << 16 | 48 << 24


def test_golden_bytes_of_few_bits():
    """Element k = 4 j + b of a word lies in byte b at bits [bits j, bits j + bits): the order of memory, forever."""
    # int4: code of channel n at k is (n + k) % 16, a word is 8 k
    w = ((torch.arange(18).view(18, 1) + torch.arange(11).view(1, 11)) % 16 - 8).to(torch.int8)
    tiles = ops.from_rows(w, 4)
    assert tiles.shape == (2, 2, 64)
    assert tiles[0, 0, :8].tolist() == [0x40, 0x51, 0x62, 0x73, 0x51, 0x62, 0x73, 0x84]  # channels 0 and 1: k = b, then k = 4 + b
    assert tiles[0, 1, :4].tolist() == [0x08, 0x09, 0x0A, 0x00]  # channel 0, k = 8, 9, 10, then pads
    assert tiles[1, 0, :4].tolist() == [0x40, 0x51, 0x62, 0x73]  # channel 16 begins the second n tile
    assert tiles[1, :, 8:].sum() == 0
    # ternary: codes 0, 1, 2, 0, 1, 2 ... along k, a word is 16 k
    w = (torch.arange(18) % 3 - 1).to(torch.int8).view(1, 18)
    tiles = ops.from_rows(w, 2)
    assert tiles.shape == (1, 2, 64)
    # byte b holds k = b, 4 + b, 8 + b, 12 + b, the first in the lowest bits: 0 1 2 0, 1 2 0 1, 2 0 1 2, 0 1 2 0
    assert tiles[0, 0, :4].tolist() == [0b00_10_01_00, 0b01_00_10_01, 0b10_01_00_10, 0b00_10_01_00]
    assert tiles[0, 1, :4].tolist() == [0b01, 0b10, 0, 0]  # k = 16, 17: codes 1, 2
    # binary: 1 at k = 0, 5, 10, 31 and 33, a word is 32 k
    w = torch.full((1, 34), -1, dtype=torch.int8)
    w[0, [0, 5, 10, 31, 33]] = 1
    tiles = ops.from_rows(w, 1)
    assert tiles.shape == (1, 2, 64)
    assert tiles[0, 0, :4].tolist() == [1 << 0, 1 << 1, 1 << 2, 1 << 7]  # k = 4 j + b: byte b, bit j
    assert tiles[0, 1, :4].tolist() == [0, 1, 0, 0]
    # activations in the same order
    assert torch.equal(ops.binarize_rows(w.float(), torch.zeros(34))[0].view(torch.uint8).view(2, 4), tiles[0, :, :4])


def test_golden_bytes_of_group_scales():
    scales = torch.arange(1, 41).view(20, 2).float()
    stored = ops.group_scale_bytes(scales)
    assert stored.shape == (2, 2, 32)
    assert stored[0, 0, :4].tolist() == [0x00, 0x3C, 0x00, 0x42]  # float16 1.0 and 3.0: channels 0 and 1 of group 0
    assert stored[0, 1, :2].tolist() == [0x00, 0x40]  # group 1 of channel 0: 2.0
    assert stored[1, :, 8:].sum() == 0  # channels that do not exist
    assert torch.equal(ops.group_scales(stored, 20), scales)
    odd = torch.zeros(stored.numel() + 1, dtype=torch.uint8)[1:].view(stored.shape).copy_(stored)
    assert torch.equal(ops.group_scales(odd, 20), scales)


@given(bits=st.sampled_from(list(ops.CODES)), n=st.integers(0, 70), k=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_pack_unpack(bits: int, n: int, k: int, seed: int):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    tiles = ops.pack(codes, bits)
    assert tiles.shape == (-(-n // 16), -(-k * bits // 32), 64)
    assert torch.equal(ops.unpack(tiles, n, k, bits), codes)
    offset, step, *_ = ops.CODES[bits]
    w = ops.to_rows(tiles, n, k, bits)
    assert torch.equal(w.long(), step * codes.long() - offset)
    if bits != 2 or not (codes == 3).any():
        assert torch.equal(ops.from_rows(w, bits), tiles)
    # pads are code 0, so what is counted twice is nothing
    fields = [(tiles.long() >> (bits * j)) & (2**bits - 1) for j in range(8 // bits)]
    assert sum(int(field.sum()) for field in fields) == int(codes.long().sum())


@given(order=st.permutations(list(range(20))))
def test_permuting_channels_permutes_rows(order: list[int]):
    w = torch.randint(-128, 128, (20, 9), dtype=torch.int8)
    assert torch.equal(ops.to_rows(ops.from_rows(w[order]), 20, 9), w[order])


def test_messages():
    with pytest.raises(ValueError, match=r"from_rows: weight is torch.float32 with 2 dimensions, expected int8 \[N, K\]"):
        ops.from_rows(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"unpack: weight_packed is \[1, 1, 64\], expected \[2, 1, 64\] for N=17, K=4"):
        ops.unpack(torch.zeros(1, 1, 64, dtype=torch.uint8), 17, 4)
    with pytest.raises(ValueError, match=r"pack: codes is torch.int8"):
        ops.pack(torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="pack: codes holds 16, expected 0 to 15 for bits=4"):
        ops.pack(torch.full((2, 2), 16, dtype=torch.uint8), 4)
    for bits, wrong, wanted in ((4, 8, "-8 to 7"), (4, -9, "-8 to 7"), (2, -2, "-1 to 1"), (2, 2, "-1 to 1"), (1, 0, "-1 and 1")):
        with pytest.raises(ValueError, match=f"from_rows: weight holds values from .*{wrong}.*, expected {wanted} for bits={bits}"):
            ops.from_rows(torch.full((2, 2), wrong, dtype=torch.int8), bits)
    for f in (lambda: ops.pack(torch.zeros(1, 1, dtype=torch.uint8), 3), lambda: ops.from_rows(torch.zeros(1, 1, dtype=torch.int8), 3),
              lambda: ops.unpack(torch.zeros(1, 1, 64, dtype=torch.uint8), 1, 1, 3), lambda: ops.packed_shape(1, 1, 16)):  # fmt: skip
        with pytest.raises(ValueError, match=r"bits is (3|16), expected one of: 8, 4, 2, 1"):
            f()
