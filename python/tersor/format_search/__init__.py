"""Which format for which layer: the damage that each does alone, and the fastest mix within a bound."""

from .damage import LayerDamage, Sensitivity, sensitivity
from .mix import Search, Trial, search

__all__ = ["LayerDamage", "Search", "Sensitivity", "Trial", "search", "sensitivity"]
