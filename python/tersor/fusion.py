"""Whole graphs: tersor.fuse(model, example_inputs), and the backend of torch.compile(model, backend="tersor")."""

from __future__ import annotations

from torch._dynamo.backends import registry

from .graph_passes.capture import fuse
from .graph_passes.compile import Options, backend, code_of, reports
from .graph_passes.passes import PATTERNS, Pattern
from .graph_passes.report import Entry, FusionReport

# An installed package is found by its entry point; this serves everyone else, and whoever imports this module first.
if "tersor" not in registry._COMPILER_FNS:
    registry.register_backend(backend, name="tersor")

__all__ = ["PATTERNS", "Entry", "FusionReport", "Options", "Pattern", "backend", "code_of", "fuse", "reports"]
