"""Which format and which hardware: predictions from measured limits here, from data sheets elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recommend import Advice, advise

__all__ = ["Advice", "advise"]


def __getattr__(name: str) -> Any:
    # The command line imports this package for its options alone, without torch.
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(".recommend", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
