"""How a weight becomes codes of a few bits: first the step of each channel or group, then the codes chosen with the step as stored.

Everything goes by row blocks of the weight, so that what is needed beside it stays below a few MiB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops.quantize_rows import TINY_ABSMAX, row_absmax
from .ops.tiles import CODES, TILE_N

# Rows of the weight quantised at a time: below this many elements, 1 MiB of float32. Larger ones are no faster, and those of
# 16 MiB left 50 MiB behind in the heap (tests/memory_worker.py).
_BLOCK_ELEMENTS = 1 << 18

# Largest code that is used, times the step, over the absmax of a channel or group. Of normal weights a group of 32 is best at about
# 0.9, a channel of 4096 at about 0.65; 14/16 is the ratio at which code -8 stands for the absmax itself (docs/formats.md).
CLIP_RATIOS = tuple(i / 16 for i in range(16, 7, -1))


def row_blocks(n: int, k: int) -> list[tuple[int, int]]:
    """[begin, end) of blocks of whole n tiles."""
    if torch.compiler.is_compiling():
        return [(0, n)]  # a loop would be unrolled into the graph
    step = max(TILE_N, _BLOCK_ELEMENTS // max(k, 1) // TILE_N * TILE_N)
    return [(begin, min(n, begin + step)) for begin in range(0, n, step)]


def without_tiny(steps: Tensor) -> Tensor:
    """Steps below 2**-100 count as 0: a quotient by them could leave the float range."""
    return torch.where(steps >= TINY_ABSMAX, steps, 0.0)


def grouped(rows: Tensor, groups: int) -> Tensor:
    """[n, K] -> float32 [n, G, K / G]."""
    return rows.float().reshape(rows.shape[0], groups, rows.shape[1] // groups if groups else 0)


def nearest(values: Tensor, steps: Tensor, lowest: int, highest: int) -> Tensor:
    """rint(clamp(values / steps, lowest, highest)), ties to even; 0 where the step is 0. float32, steps broadcast to values."""
    usable = steps > 0
    # A quotient of two float32, not a product with 1 / step, which rounds twice.
    quotients = values / torch.where(usable, steps, 1.0)
    return torch.where(usable, quotients.clamp(lowest, highest).round(), 0.0)


def mean_abs(rows: Tensor) -> Tensor:
    """Mean of abs(w) over each row, float32 [n]; summed in float64, so that no order of the sum shows."""
    k = rows.shape[1]
    return without_tiny((rows.abs().sum(1, dtype=torch.float64) / max(1, k)).float())


def mean_abs_of_all(weight: Tensor) -> Tensor:
    """Mean of abs(w) over the whole weight, float32 []."""
    n, k = weight.shape
    sums = [weight[begin:end].abs().sum(1, dtype=torch.float64) for begin, end in row_blocks(n, k)]
    total = torch.cat(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=weight.device)
    return without_tiny((total / max(1, n * k)).float())


def least_squares_steps(rows: Tensor, groups: int) -> Tensor:
    """float32 [n, G]: of the steps absmax / 7 * CLIP_RATIOS that with the least squared error of 4-bit codes."""
    *_, lowest, highest = CODES[4]
    values = grouped(rows, groups)
    absmax = row_absmax(values)
    best, least = torch.zeros_like(absmax), torch.full_like(absmax, torch.inf)
    # Errors relative to the absmax: squares of tiny weights would vanish, those of huge ones overflow.
    values = values / torch.where(absmax > 0, absmax, 1.0).unsqueeze(-1)
    for ratio in CLIP_RATIOS:
        step = torch.full((), ratio / highest, dtype=torch.float32, device=rows.device)
        error = (nearest(values, step, lowest, highest) * step - values).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, absmax * step, best)
    return without_tiny(best)
