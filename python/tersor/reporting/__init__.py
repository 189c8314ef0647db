"""Two models side by side: speed, memory, accuracy, and what each layer has to do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import LayerRow, Report, report

__all__ = ["LayerRow", "Report", "report"]


def __getattr__(name: str) -> Any:
    # The command line imports this package for its options alone, without torch.
    if name in __all__:
        from . import measure

        return getattr(measure, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
