"""What may follow the matmul in the same kernel: one entry per row of csrc/core/epilogue.inc, as plain torch on float32."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

_LOWEST = -1000.0  # every one of these functions is 0 there; torch's own give NaN at -inf, where the limit is 0


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.clamp(min=_LOWEST))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x.clamp(min=_LOWEST), approximate="tanh")


def _silu(x: Tensor) -> Tensor:
    return F.silu(x.clamp(min=_LOWEST))


EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
}


def check_epilogue(function: str, epilogue: str) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"{function}: epilogue is {epilogue!r}, expected one of: {', '.join(EPILOGUES)}")
