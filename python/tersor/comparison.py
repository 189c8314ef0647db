"""How far the outputs of two models, or of two layers, lie apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import float_tensors
from .nn import QuantLinear
from .swap import settle
from .weights import row_blocks

Layer = nn.Linear | QuantLinear


class Distance:
    """Sums over pairs of tensors, in float64; a row is what lies along the last dim."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self._cosines, self._rows = 0.0, 0

    def add(self, want: Any, got: Any) -> None:
        """Outputs of one call. Raises ValueError where their tensors do not correspond."""
        wanted, gotten = float_tensors(want), float_tensors(got)
        shapes = [[list(t.shape) for t in side] for side in (wanted, gotten)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the outputs do not correspond: their floating-point tensors are {shapes[0]} and {shapes[1]}")
        for w, g in zip(wanted, gotten, strict=True):
            self._add(w.detach(), g.detach())

    def _add(self, want: Tensor, got: Tensor) -> None:
        if not want.numel():
            return
        width = want.shape[-1] if want.dim() else 1
        want, got = want.reshape(-1, width), got.reshape(-1, width)
        for begin, end in row_blocks(*want.shape):
            w, g = want[begin:end].double(), got[begin:end].to(want.device).double()
            ww, gg = (w * w).sum(1), (g * g).sum(1)
            self.signal += ww.sum().item()
            self.noise += (w - g).square_().sum().item()
            # Two rows of zeros point the same way; one of them alone has no direction to share.
            product = (ww * gg).sqrt_()
            cosine = torch.where(product == 0, ((ww == 0) & (gg == 0)).double(), (w * g).sum(1) / product)
            self._cosines += cosine.sum().item()
            self._rows += end - begin

    @property
    def cosine(self) -> float:
        """Mean over rows; NaN where there was none."""
        return self._cosines / self._rows if self._rows else math.nan

    @property
    def sqnr_db(self) -> float:
        """10 log10(signal / noise); inf for equal outputs."""
        if math.isnan(self.noise) or math.isinf(self.noise):
            return math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def exchanged(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the model in which `layers` are replaced; it shares every tensor with the model, so that it costs no memory."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    memo |= {id(old): new for old, new in layers.items()}
    copied = copy.deepcopy(model, memo)
    settle(copied)
    return copied


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Every nn.Linear and QuantLinear by the first of its names."""
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear | QuantLinear)}


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared ones once, and of what else the state_dict holds (torch's packed weights and scales,
    small tags)."""

    def size(value: Any) -> int:
        if isinstance(value, tuple | list):
            return sum(map(size, value))
        if not isinstance(value, Tensor):
            return 0
        total = value.numel() * value.element_size()
        if value.is_quantized:
            per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
            total += 16 * (value.q_per_channel_scales().numel() if per_channel else 1)  # a double and an int64
        return total

    plain = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    packed = [value for name, value in model.state_dict().items() if name not in plain]
    return sum(map(size, {id(t): t for t in plain.values()}.values())) + sum(map(size, packed))
