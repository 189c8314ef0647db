"""Finds and loads the compiled parts: `_numpy` (pybind11), `_torch` and `_torch_cuda` (torch ops).

Each may be absent, or made for another platform; everything then runs on the reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import re
from types import ModuleType

logger = logging.getLogger("tersor")

OLDEST_TORCH = (2, 10)  # whose stable ABI the kernels are built for, see CMakeLists.txt


def check_torch() -> None:
    """Raises ImportError where torch is older than the kernels and the ops can work with."""
    import torch

    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and (int(found[1]), int(found[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        way_out = f"get one by: pip install --upgrade 'torch>={oldest}'"
        raise ImportError(f"tersor needs torch {oldest} or later, this is torch {torch.__version__}; {way_out}")


def _disabled() -> bool:
    return os.environ.get("TERSOR_DISABLE_NATIVE", "") not in ("", "0")


@functools.cache
def _numpy_module() -> tuple[ModuleType | None, str]:
    """The pybind11 module, or None and what the warning says of it."""
    if _disabled():
        return None, "(TERSOR_DISABLE_NATIVE is set)"
    if importlib.util.find_spec("tersor._numpy") is None:
        return None, "in this installation"
    try:
        return importlib.import_module("tersor._numpy"), ""
    except ImportError as error:
        return None, f"that this system can load ({error})"


def numpy_module() -> ModuleType | None:
    """The pybind11 module, or None where this installation has none for this platform."""
    return _numpy_module()[0]


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
    import torch

    module, missing = _numpy_module()
    if module is not None:
        cpu_info()  # raises on a wrong TERSOR_ISA
        spec = importlib.util.find_spec("tersor._torch")
        if spec is not None and spec.origin is not None:
            try:
                torch.ops.load_library(spec.origin)
                return True
            except OSError as error:
                missing = f"that this torch can load ({error})"
        else:
            missing = "for torch in this installation"
    logger.warning(
        "tersor: no native kernels %s; every op runs as its plain-torch reference, exact but slow. %s",
        missing,
        "Unset it to use them." if _disabled() else "Reinstall from a wheel, or from source with a C++17 compiler at hand.",
    )
    return False


@functools.cache
def load_cuda_ops() -> bool:
    """Loads the CUDA kernels into torch's dispatcher; False where this installation has none. Asks for no GPU and no CUDA build of
    torch: what is missing is said by the first call that gets a CUDA tensor."""
    spec = importlib.util.find_spec("tersor._torch_cuda") if load_torch_ops() else None
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
