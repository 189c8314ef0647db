"""How sparse int8 weights are stored. Values are s8 (absent = 0), as their bytes; everything is kept n tile by n tile.

    weight_offset  int64 [Nt + 1]   the entries of n tile t are [offset[t], offset[t + 1])
    weight_sum     int32 [Nt, 16]   sum of w over K, for instruction sets that can only multiply x + 128

By the shapes of the other two, Nt = ceil(N/16), Kt = ceil(K/4):

    tiles    weight_packed uint8 [T, 64]        the tiles that hold a non-zero (a tile: 16 channels x 4 k, see tiles.py)
             weight_index  uint8 [T, 2]         k step of each, little-endian
    masks    weight_packed uint8 [Z + 64]       the Z non-zero bytes, tile by tile, then 64 zeros
             weight_index  uint8 [Nt, Kt, 8]    a mask for each tile, little-endian: bit i is set where byte i is not 0
    windows  weight_packed uint8 [S, 128]       64 positions, then 64 values; channel n has bytes 4n .. 4n + 3 of both
             weight_index  uint8 [0]            Positions are the low 7 bits and count in a window of 128 k; bit 7 of positions
                                                0..15 are bits 0..15 of where it begins, in steps of 32 k
    pairs    weight_packed uint8 [Nt, Kb, 640]  of weights with two values in every four k, for GPUs (ops/sparse_pairs.py)
             weight_index  uint8 [0]            An entry is 16 channels x 64 k

A window's entry is one lookup of 64 bytes of x in 128 and one dot product. Each channel has its non-zeros in ascending order, four
at most in an entry; a window begins at the first k that any of the 16 channels still lacks, so that a channel with fewer zeros than
the others delays them only once they are a window ahead. Values of 0 pad: about 8 % at 80 % zeros, 15 % at 90 %.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sparse_pairs import BLOCK_BYTES, BLOCK_K, ascending, pack_pairs, pair_rows
from .tiles import TILE_BYTES, TILE_N, ceil_div, pack, packed_shape, unpack

MASK_SLACK = 64
WINDOW_K, WINDOW_STEP = 128, 32
_PER_ENTRY = 4  # values of a channel in an entry of a window
# Up to this share of the dense bytes tiles and windows are faster than masks at every number of rows, though masks are smaller: a
# byte of tiles takes as long as a dense one, one of windows 1 (one row) to 1.5 times as long, and masks take 2 (one row) to 1.35
# times the dense layer, whatever they leave out. bench/sparse.py.
_FAST_SHARE = 0.85


class Parts(NamedTuple):
    """The stored tensors of a sparse int8 weight, its scale apart."""

    weight_packed: Tensor
    weight_index: Tensor
    weight_offset: Tensor
    weight_sum: Tensor


def storage_of(weight_packed: Tensor, weight_index: Tensor) -> str:
    """ "tiles", "masks", "windows" or "pairs" by the shapes, or "" where they are none of these."""
    dims = (weight_packed.dim(), weight_index.dim())
    if dims == (2, 2) and weight_packed.shape[1] == TILE_BYTES and weight_index.shape[1] == 2:
        return "tiles"
    if dims == (1, 3) and weight_index.shape[2] == 8:
        return "masks"
    if dims == (2, 1) and weight_packed.shape[1] == 2 * TILE_BYTES and weight_index.shape[0] == 0:
        return "windows"
    if dims == (3, 1) and weight_packed.shape[2] == BLOCK_BYTES and weight_index.shape[0] == 0:
        return "pairs"
    return ""


def pack_sparse(weight: Tensor, storage: str | None = None) -> Parts:
    """int8 values [N, K] -> what is stored; storage None: the one that is faster, of those that are not larger than dense tiles."""
    n, k = weight.shape
    nt, kt, _ = packed_shape(n, k)
    sums = torch.nn.functional.pad(weight.sum(1, dtype=torch.int32), (0, nt * TILE_N - n)).reshape(nt, TILE_N)
    if storage == "pairs":
        blocks = pack_pairs(weight)
        offset = torch.arange(nt + 1, device=weight.device) * blocks.shape[1]
        return Parts(blocks, torch.zeros(0, dtype=torch.uint8, device=weight.device), offset, sums)
    tiles = pack(weight.contiguous().view(torch.uint8))
    full = (tiles != 0).any(-1)
    if storage is None:
        storage, windows = _choose(weight, int(full.sum()), nt * kt * TILE_BYTES)
    else:
        windows = _windows(weight) if storage == "windows" else None
    if windows is not None:
        return Parts(*windows, sums)
    if storage == "tiles":
        index = torch.arange(kt, dtype=torch.int32, device=weight.device).expand(nt, kt)[full]
        return Parts(tiles[full], u16_bytes(index), _offsets(full.sum(1)), sums)
    present = tiles != 0
    place = torch.arange(8, dtype=torch.uint8, device=weight.device)
    masks = (present.reshape(nt, kt, 8, 8).to(torch.uint8) << place).sum(-1, dtype=torch.uint8)
    values = torch.nn.functional.pad(tiles[present], (0, MASK_SLACK))
    return Parts(values, masks, _offsets(present.sum((1, 2))), sums)


def _choose(weight: Tensor, tiles: int, dense: int) -> tuple[str, tuple[Tensor, Tensor, Tensor] | None]:
    nonzero = int(torch.count_nonzero(weight))
    tiles_bytes, masks_bytes = tiles * (TILE_BYTES + 2), nonzero + dense // 8 + MASK_SLACK
    limit = min(tiles_bytes, _FAST_SHARE * dense)
    if 2 * nonzero < limit:  # without padding
        windows = _windows(weight)
        if windows[0].numel() < limit:
            return "windows", windows
    return ("tiles" if tiles_bytes <= max(masks_bytes, _FAST_SHARE * dense) else "masks"), None


def _windows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight_packed, weight_index, weight_offset) of windows. All n tiles advance together, an entry of each at a time."""
    n, k = weight.shape
    nt = ceil_div(n, TILE_N)
    device = weight.device
    weight = torch.nn.functional.pad(weight, (0, 0, 0, nt * TILE_N - n))
    count = torch.count_nonzero(weight, dim=1)
    most = int(count.max()) if count.numel() and k else 0
    end = k + 2 * WINDOW_K  # what stands past a channel's last non-zero
    channel, at = weight.nonzero(as_tuple=True)
    nth = torch.arange(len(at), device=device) - (count.cumsum(0) - count)[channel]
    positions = torch.full((nt * TILE_N, most + _PER_ENTRY), end, dtype=torch.int32, device=device)
    positions[channel, nth] = at.to(torch.int32)
    values = torch.zeros((nt * TILE_N, most + _PER_ENTRY), dtype=torch.int8, device=device)
    values[channel, nth] = weight[channel, at]
    done = torch.zeros(nt * TILE_N, dtype=torch.int64, device=device)
    four = torch.arange(_PER_ENTRY, device=device)
    sixteen = torch.arange(16, device=device)
    no_index = torch.zeros(0, dtype=torch.uint8, device=device)
    entries: list[Tensor] = []
    active: list[Tensor] = []
    while True:
        next_four = positions.gather(1, done.unsqueeze(1) + four)
        begin = next_four[:, 0].reshape(nt, TILE_N).amin(1) // WINDOW_STEP * WINDOW_STEP
        works = begin < k
        if not bool(works.any()):
            break
        relative = next_four - begin.repeat_interleave(TILE_N).unsqueeze(1)
        inside = (relative < WINDOW_K) & (next_four < end)
        four_values = torch.where(inside, values.gather(1, done.unsqueeze(1) + four), 0)
        entry = torch.stack([torch.where(inside, relative, 0).to(torch.uint8), four_values.view(torch.uint8)])
        entry = entry.reshape(2, nt, TILE_BYTES).permute(1, 0, 2)
        entry[:, 0, :16] += ((begin // WINDOW_STEP).unsqueeze(1) >> sixteen & 1).to(torch.uint8) << 7
        entries.append(entry[works])
        active.append(works)
        done += inside.sum(1)
    if not entries:
        return (
            torch.zeros((0, 2 * TILE_BYTES), dtype=torch.uint8, device=device),
            no_index,
            _offsets(torch.zeros(nt, dtype=torch.int64, device=device)),
        )
    works = torch.stack(active)  # [turn, n tile]
    tile = torch.arange(nt, device=device).expand(works.shape)[works]
    order = tile.sort(stable=True).indices
    return torch.cat(entries).reshape(-1, 2 * TILE_BYTES)[order], no_index, _offsets(works.sum(0))


def sparse_rows(weight_packed: Tensor, weight_index: Tensor, weight_offset: Tensor, n: int, k: int) -> Tensor:
    """The stored tensors -> int8 values [N, K]: the inverse of pack_sparse."""
    nt, kt, _ = packed_shape(n, k)
    storage = storage_of(weight_packed, weight_index)
    device = weight_packed.device
    if storage == "pairs":
        return pair_rows(weight_packed, n, k)
    if storage == "masks":
        place = torch.arange(8, dtype=torch.uint8, device=device)
        present = ((weight_index.unsqueeze(-1) >> place) & 1).bool().reshape(nt, kt, TILE_BYTES)
        tiles = torch.zeros((nt, kt, TILE_BYTES), dtype=torch.uint8, device=device)
        return unpack(tiles.masked_scatter(present, weight_packed), n, k).view(torch.int8)
    if storage == "tiles":
        tiles = torch.zeros((nt, kt, TILE_BYTES), dtype=torch.uint8, device=device)
        tiles[owners(weight_offset, weight_packed.shape[0]), as_u16(weight_index)] = weight_packed
        return unpack(tiles, n, k).view(torch.int8)
    rows = torch.zeros((nt * TILE_N, k + WINDOW_K), dtype=torch.int8, device=device)
    rows.index_put_(_window_places(weight_packed, weight_offset), weight_packed[:, TILE_BYTES:].view(torch.int8), accumulate=True)
    return rows[:n, :k].contiguous()


def holds_24(parts: Parts) -> bool:
    """Whether at most two values in every four neighbouring k are stored, read off the stored form. Waits for the device."""
    packed, index, offset, _ = parts
    storage = storage_of(packed, index)
    if storage == "pairs":
        return True
    if storage == "masks":  # four k of a channel are half a byte of its mask
        bits = index.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=index.device) & 1
        return not bool((bits.unflatten(-1, (2, 4)).sum(-1) > 2).any())
    if storage == "tiles":
        return not bool((torch.count_nonzero(packed.reshape(-1, 4), dim=1) > 2).any())
    channel, at = _window_places(packed, offset)
    fours = channel * (int(at.max()) // 4 + 1 if at.numel() else 1) + at // 4
    stored = fours[packed[:, TILE_BYTES:] != 0].sort().values
    return not bool((stored[2:] == stored[:-2]).any())


def _window_places(weight_packed: Tensor, weight_offset: Tensor) -> tuple[Tensor, Tensor]:
    """(channel, k) of the values of windows, int64 [S, 64] each; where the value is 0 they mean nothing."""
    tile = owners(weight_offset, weight_packed.shape[0])
    channel = (tile * TILE_N).unsqueeze(1) + torch.arange(TILE_BYTES, device=weight_packed.device) // _PER_ENTRY
    return channel, _window_begins(weight_packed).unsqueeze(1) + (weight_packed[:, :TILE_BYTES] & (WINDOW_K - 1))


def owners(offset: Tensor, entries: int) -> Tensor:
    """int64 [entries]: whose entry each is, by the offsets of all owners."""
    # How many owners ended before each entry. (searchsorted says the same, but not every device has all of it.)
    ended = torch.zeros(entries + 1, dtype=torch.int64, device=offset.device)
    ended = ended.index_add(0, offset[1:].clamp(0, entries).long(), torch.ones_like(offset[1:], dtype=torch.int64))
    return ended[:-1].cumsum(0).clamp(max=max(0, offset.shape[0] - 2))


def offset_dtype(offset: Tensor) -> torch.dtype:
    """int64, which JAX keeps as int32 unless it is told not to."""
    return torch.int32 if offset.device.type == "jax" and offset.dtype == torch.int32 else torch.int64


def check_shapes(function: str, packed: Tensor, index: Tensor, offset: Tensor, sums: Tensor, n: int, k: int) -> str:
    """Raises ValueError where shapes or dtypes do not fit each other or [N, K]; reads no values. Returns the storage."""
    nt, kt, _ = packed_shape(n, k)
    for name, t, dtype in (
        ("weight_packed", packed, torch.uint8),
        ("weight_index", index, torch.uint8),
        ("weight_offset", offset, offset_dtype(offset)),
        ("weight_sum", sums, torch.int32),
    ):
        if t.dtype != dtype:
            raise ValueError(f"{function}: {name} is {t.dtype}, expected {dtype}")
    storage = storage_of(packed, index)
    fits = storage != "" and (
        tuple(index.shape) == (nt, kt, 8) and packed.shape[0] >= MASK_SLACK
        if storage == "masks"
        else tuple(packed.shape) == (nt, ceil_div(k, BLOCK_K), BLOCK_BYTES)
        if storage == "pairs"
        else storage == "windows" or index.shape[0] == packed.shape[0]
    )
    if not fits:
        raise ValueError(
            f"{function}: weight_packed is {list(packed.shape)} and weight_index {list(index.shape)}, expected [T, 64] and [T, 2], "
            f"[S, 128] and [0], [64 or more] and [{nt}, {kt}, 8], or [{nt}, {ceil_div(k, BLOCK_K)}, {BLOCK_BYTES}] and [0] "
            f"for N={n}, K={k}"
        )
    if tuple(offset.shape) != (nt + 1,) or tuple(sums.shape) != (nt, TILE_N):
        raise ValueError(
            f"{function}: weight_offset is {list(offset.shape)} and weight_sum {list(sums.shape)}, expected [{nt + 1}] and "
            f"[{nt}, {TILE_N}] for N={n}"
        )
    return storage


def check_structure(function: str, parts: Parts, n: int, k: int) -> None:
    """Raises ValueError unless the stored tensors make an int8 weight [N, K]; reads all of them but the values."""
    packed, index, offset, sums = parts
    storage = check_shapes(function, packed, index, offset, sums, n, k)
    if storage == "pairs":
        if not ascending(packed):
            raise ValueError(f"{function}: weight_packed holds a pair of values whose places do not ascend")
        if not torch.equal(offset, torch.arange(len(offset), device=offset.device) * packed.shape[1]):
            raise ValueError(f"{function}: weight_offset is not in steps of {packed.shape[1]}, the blocks of an n tile")
        return
    entries = packed.shape[0] - (MASK_SLACK if storage == "masks" else 0)
    if int(offset[0]) != 0 or int(offset[-1]) != entries or bool((offset[1:] < offset[:-1]).any()):
        raise ValueError(f"{function}: weight_offset does not rise from 0 to {entries}, the entries of weight_packed")
    if storage == "masks":
        if packed[entries:].any():
            raise ValueError(f"{function}: weight_packed does not end with {MASK_SLACK} zeros")
        place = torch.arange(8, dtype=torch.uint8, device=index.device)
        bits = ((index.unsqueeze(-1) >> place) & 1).sum((1, 2, 3))
        if not torch.equal(bits, offset.diff()):
            raise ValueError(f"{function}: weight_index has other numbers of bits than weight_offset has entries")
        return
    if storage == "tiles":
        at, most, what = as_u16(index), ceil_div(k, 4) - 1, "weight_index holds k step"
    else:
        at, most, what = _window_begins(packed), k - 1, "weight_packed holds a window that begins at"
    if at.numel() and int(at.max()) > most:
        raise ValueError(f"{function}: {what} {int(at.max())}, expected up to {most} for K={k}")


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int64), (1, 0))


def _window_begins(weight_packed: Tensor) -> Tensor:
    place = torch.arange(16, device=weight_packed.device)
    return ((weight_packed[:, :16] >> 7).to(torch.int64) << place).sum(1) * WINDOW_STEP


def u16_bytes(values: Tensor) -> Tensor:
    return torch.stack([values & 255, values >> 8], dim=-1).to(torch.uint8)


def as_u16(stored: Tensor) -> Tensor:
    wide = stored.to(torch.int64)
    return wide[..., 0] + 256 * wide[..., 1]
