"""What may follow the matmul in the same kernel: one entry per row of csrc/core/epilogue.inc, as plain torch on float32."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
}


def check_epilogue(function: str, epilogue: str) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"{function}: epilogue is {epilogue!r}, expected one of: {', '.join(EPILOGUES)}")
