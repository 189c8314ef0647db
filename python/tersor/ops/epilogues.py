"""What may follow the matmul in the same kernel: one entry per row of csrc/core/epilogue.inc, as plain torch on float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_FAR = 1000.0  # beyond it these functions are 0 or x to the last bit


def _with_limits(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """f with its limits where x is huge or infinite: torch's own functions give NaN or inf for some such values. NaN is kept."""
    return lambda x: torch.where(x > _FAR, x, f(x.clamp(-_FAR, _FAR)))


EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": _with_limits(F.gelu),
    "gelu_tanh": _with_limits(partial(F.gelu, approximate="tanh")),
    "silu": _with_limits(F.silu),
}


# Device type -> what computes pull_back there, where torch.func cannot.
PULL_BACK_ON_DEVICE: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {}


def pull_back(epilogue: str, before: Tensor, grad: Tensor) -> Tensor:
    """The gradient before an activation from the one after it; float32, of the shape of `before`."""
    if before.device.type in PULL_BACK_ON_DEVICE:
        return PULL_BACK_ON_DEVICE[before.device.type](epilogue, before, grad)
    return torch.func.vjp(EPILOGUES[epilogue], before)[1](grad)[0]


def check_epilogue(function: str, epilogue: str) -> None:
    if epilogue not in EPILOGUES:
        raise ValueError(f"{function}: epilogue is {epilogue!r}, expected one of: {', '.join(EPILOGUES)}")
