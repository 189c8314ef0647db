"""Finds and loads the compiled parts: `_numpy` (pybind11), `_torch` and `_torch_cuda` (torch ops).

Each may be absent; everything then runs on the reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

logger = logging.getLogger("tersor")


def _disabled() -> bool:
    return os.environ.get("TERSOR_DISABLE_NATIVE", "") not in ("", "0")


@functools.cache
def numpy_module() -> ModuleType | None:
    """The pybind11 module, or None where this installation has none."""
    if _disabled() or importlib.util.find_spec("tersor._numpy") is None:
        return None
    return importlib.import_module("tersor._numpy")


def cpu_info() -> dict | None:
    """Variants of this build, what this CPU can run and which variant serves each kernel; None without native parts.

    Raises RuntimeError where TERSOR_ISA names a variant that does not exist or cannot run here.
    """
    module = numpy_module()
    if module is None:
        return None
    info = module.cpu_info()
    if info["error"]:
        raise RuntimeError(info["error"])
    return info


@functools.cache
def load_torch_ops() -> bool:
    """Loads the CPU kernels into torch's dispatcher; False (and one warning) where there are none.

    `_numpy` is imported first: in an editable install that import is what triggers the rebuild of both.
    """
    info = cpu_info()
    spec = None if info is None else importlib.util.find_spec("tersor._torch")
    if spec is None or spec.origin is None:
        logger.warning(
            "tersor: no native kernels %s; every op runs as its plain-torch reference, exact but slow. %s",
            "(TERSOR_DISABLE_NATIVE is set)" if _disabled() else "in this installation",
            "Unset it to use them." if _disabled() else "Reinstall from a wheel, or from source with a C++17 compiler at hand.",
        )
        return False
    import torch

    torch.ops.load_library(spec.origin)
    return True


@functools.cache
def load_cuda_ops() -> bool:
    """Loads the CUDA kernels into torch's dispatcher; False where this installation has none. Asks for no GPU and no CUDA build of
    torch: what is missing is said by the first call that gets a CUDA tensor."""
    spec = None if _disabled() else importlib.util.find_spec("tersor._torch_cuda")
    if spec is None or spec.origin is None:
        return False
    import torch

    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        logger.warning("tersor: the CUDA kernels cannot be loaded, CUDA tensors run on the references: %s", error)
        return False
    return True


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)
