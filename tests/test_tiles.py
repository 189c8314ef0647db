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


@given(n=st.integers(0, 70), k=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_pack_unpack(n: int, k: int, seed: int):
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    tiles = ops.from_rows(w)
    assert tiles.shape == (-(-n // 16), -(-k // 4), 64)
    assert torch.equal(ops.to_rows(tiles, n, k), w)
    assert torch.equal(ops.unpack(ops.pack(w.view(torch.uint8)), n, k), w.view(torch.uint8))
    # pads are code 0, so what is counted twice is nothing
    assert int(tiles.long().sum()) == int((w.long() + 128).sum())


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
