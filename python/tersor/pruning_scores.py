"""What a weight is worth, and which weights go: magnitude, Wanda, SparseGPT."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .pruning_patterns import Pattern, lowest

DAMPING = 0.01  # of the mean diagonal of the Hessian; section 4 of arXiv:2301.00774
COLUMNS = 128  # of the weight that SparseGPT handles before it updates the rest


def at_least_float32(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


class FeatureNorms:
    """Root mean square of each input feature over all rows seen, float64 [K]: ||x||_2 of Wanda over the root of the number of
    rows, so that layers which see more rows compare with those which see fewer."""

    def __init__(self) -> None:
        self._squares: Tensor | float = 0.0
        self._rows = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        self._squares = self._squares + rows.float().square().sum(0, dtype=torch.float64)
        self._rows += rows.shape[0]

    def value(self) -> Tensor:
        assert isinstance(self._squares, Tensor)
        return (self._squares / max(1, self._rows)).sqrt()


class Hessian:
    """Mean of x x^T over all rows seen, float32 [K, K]: half the Hessian of the layer's squared error."""

    def __init__(self) -> None:
        self._products: Tensor | None = None
        self._rows = 0

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        with torch.autocast(rows.device.type, enabled=False):
            products = rows.T @ rows
        self._products = products if self._products is None else self._products.add_(products)
        self._rows += rows.shape[0]

    def value(self) -> Tensor:
        assert self._products is not None
        return self._products / max(1, self._rows)


def magnitude(weight: Tensor) -> Tensor:
    """abs(w), float32 [N, K]."""
    return at_least_float32(weight).abs()


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """abs(w) * ||x||_2 of its input feature, float32 [N, K]. Sun et al., arXiv:2306.11695, equation 1."""
    return magnitude(weight) * norms.to(torch.float32)


def keep_highest(
    scores: Sequence[Tensor], masks: Sequence[Tensor], pattern: Pattern, progress: float, per_row: bool
) -> list[Tensor]:
    """The new mask of each weight, bool [N, K]: never an element that the old one dropped.

    scores, masks  of the weights that compete with each other
    per_row        every row of the pattern's grid drops its own share
    """
    grids = [pattern.units(s, m) for s, m in zip(scores, masks, strict=True)]
    if per_row or pattern.per_row:
        dropped = [lowest(grid, pattern.count(grid.shape[1], progress)) for grid in grids]
    else:
        flat = torch.cat([grid.flatten() for grid in grids]).unsqueeze(0)
        parts = lowest(flat, pattern.count(flat.shape[1], progress))[0].split([grid.numel() for grid in grids])
        dropped = [part.view_as(grid) for part, grid in zip(parts, grids, strict=True)]
    return [m & ~pattern.expand(d, *m.shape) for d, m in zip(dropped, masks, strict=True)]


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Drops weights column by column and lets those to the right make up for it.

    weight   float [N, K]
    hessian  float32 [K, K], mean of x x^T
    returns  mask bool [N, K], weight float32 [N, K] as it must now be, zero where dropped

    Columns are decided together as the pattern needs it: COLUMNS of them for Unstructured and Block, m for NM.
    Source: Frantar & Alistarh, arXiv:2301.00774, algorithm 1.
    """
    w = at_least_float32(weight).clone()
    inverse = inverse_factor(hessian).to(w.dtype)
    diagonal = inverse.diagonal()
    mask = torch.ones(w.shape, dtype=torch.bool, device=w.device)
    decided = pattern.columns(COLUMNS)
    step = max(1, COLUMNS // decided) * decided
    seen = 0  # units of the grid to the left

    def kept(i: int, end: int) -> Tensor:
        nonlocal seen
        if (i % step) % decided == 0:
            part = slice(i, min(end, i + decided))
            scores = w[:, part].abs() / diagonal[part]
            mask[:, part], seen = _decide(scores, pattern, seen)
        return torch.where(mask[:, i], w[:, i], 0.0)

    replace_columns_(w, inverse, step, kept)
    return mask, w


def replace_columns_(w: Tensor, inverse: Tensor, step: int, replacement: Callable[[int, int], Tensor]) -> None:
    """Replaces the columns of w [N, K] from left to right, and lets those to the right of each make up for its error.

    inverse      what inverse_factor gave
    step         columns after which the rest is updated
    replacement  (i, end) -> what column i becomes, [N]; end: where its step ends, up to which w is up to date

    Source: Frantar et al., arXiv:2210.17323 (GPTQ), algorithm 1.
    """
    n, k = w.shape
    diagonal = inverse.diagonal()
    for begin in range(0, k, step):
        end = min(k, begin + step)
        errors = torch.zeros(n, end - begin, dtype=w.dtype, device=w.device)
        for i in range(begin, end):
            new = replacement(i, end)
            error = (w[:, i] - new) / diagonal[i]
            w[:, i:end] -= torch.outer(error, inverse[i, i:end])
            w[:, i] = new
            errors[:, i - begin] = error
        w[:, end:] -= errors @ inverse[begin:end, end:]


def _decide(scores: Tensor, pattern: Pattern, seen: int) -> tuple[Tensor, int]:
    """(mask of these columns, units seen by now). Counts are taken over all columns so far: their roundings do not add up."""
    grid = pattern.units(scores, torch.ones_like(scores, dtype=torch.bool))
    if pattern.per_row:
        dropped = lowest(grid, pattern.count(grid.shape[1], 1.0))
    else:
        count = pattern.count(seen + grid.numel(), 1.0) - pattern.count(seen, 1.0)
        dropped = lowest(grid.reshape(1, -1), count).view_as(grid)
    return ~pattern.expand(dropped, *scores.shape), seen + grid.numel()


def inverse_factor(hessian: Tensor) -> Tensor:
    """float64 [K, K], upper: U with U^T U = (H + damping)^-1. In float64 the damped matrix is positive definite in any case."""
    h = hessian.double()
    damping = DAMPING * h.diagonal().mean()
    h.diagonal().add_(torch.where(damping > 0, damping, 1.0))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
