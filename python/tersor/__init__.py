"""Tersor: PyTorch layers that are smaller and really faster on the machine at hand.

    import tersor
    tersor.quantize_(model, tersor.Int8Dynamic())

Names are resolved on first use: `import tersor` does no work and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_PUBLIC = {
    "Binary": "formats",
    "BinaryXnor": "formats",
    "Block": "pruning_patterns",
    "CubicSchedule": "pruning_patterns",
    "Int4": "formats",
    "Int8Dynamic": "formats",
    "Int8Static": "formats",
    "Int8WeightOnly": "formats",
    "NM": "pruning_patterns",
    "Pruner": "pruning",
    "QuantLinear": "nn",
    "SparseFloat": "formats",
    "SparseInt8": "formats",
    "Ternary": "formats",
    "Unstructured": "pruning_patterns",
    "advise": "advice",
    "calibrate": "static_scales",
    "correct_bias_": "rounding",
    "dequantize_": "swap",
    "distill": "distillation",
    "finalize_": "pruning",
    "from_bitnet_": "bitnet",
    "fuse": "fusion",
    "gptq_": "rounding",
    "info": "information",
    "load_": "checkpoint",
    "prune_": "pruning",
    "quantize_": "swap",
    "quantize_dynamic": "swap",
    "quantize_weights": "swap",
    "report": "reporting",
    "save": "checkpoint",
    "search": "format_search",
    "sensitivity": "format_search",
    "shrink": "shrinking",
    "smooth_": "smoothing",
}
_SUBMODULES = ("formats", "fusion", "nn", "numpy", "observers", "ops", "parallel", "train")

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]

if TYPE_CHECKING:
    from . import formats, fusion, nn, numpy, observers, ops, parallel, train
    from .advice import advise
    from .bitnet import from_bitnet_
    from .checkpoint import load_, save
    from .distillation import distill
    from .format_search import search, sensitivity
    from .formats import Binary, BinaryXnor, Int4, Int8Dynamic, Int8Static, Int8WeightOnly, SparseFloat, SparseInt8, Ternary
    from .fusion import fuse
    from .information import info
    from .nn import QuantLinear
    from .pruning import Pruner, finalize_, prune_
    from .pruning_patterns import NM, Block, CubicSchedule, Unstructured
    from .reporting import report
    from .rounding import correct_bias_, gptq_
    from .shrinking import shrink
    from .smoothing import smooth_
    from .static_scales import calibrate
    from .swap import dequantize_, quantize_, quantize_dynamic, quantize_weights


def __getattr__(name: str) -> Any:
    if name in _PUBLIC or (name in _SUBMODULES and name != "numpy"):  # which works without torch
        importlib.import_module(".native", __name__).check_torch()
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'tersor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
