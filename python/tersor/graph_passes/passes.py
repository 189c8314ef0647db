"""The pass: one table of patterns, in the order in which they run, over one graph of either dialect."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from torch import fx

from ..formats import Format
from .cleanup import common_subexpressions, remove_dead, remove_identities
from .editor import Editor
from .linears import fuse_activations, fuse_glu, fuse_glu_rows, fuse_layer_rows, fuse_residuals, fuse_together, share_rows
from .norms import fuse_norms
from .report import FusionReport
from .weights import fold_scales, pack_linears


@dataclass(frozen=True)
class Pattern:
    """One step of the pass; `name` is its switch."""

    name: str
    run: Callable[[Editor], None]

    @property
    def doc(self) -> str:
        return (self.run.__doc__ or "").strip()


# An earlier step leaves less to a later one: GLU before "together" would join gate and up, a residual goes to the layer before it
# rather than to the norm behind, and layers are joined before they share what is left.
PATTERNS = (
    Pattern("remove_identities", remove_identities),
    Pattern("common_subexpressions", common_subexpressions),
    Pattern("fold_scales", fold_scales),
    Pattern("glu", fuse_glu),
    Pattern("activation", fuse_activations),
    Pattern("residual", fuse_residuals),
    Pattern("together", fuse_together),
    Pattern("norm", fuse_norms),
    Pattern("share_rows", share_rows),
    Pattern("glu_rows", fuse_glu_rows),
    Pattern("layer_rows", fuse_layer_rows),
    Pattern("remove_dead", remove_dead),
)
# What the backend does after them (memory.py) has a switch, too.
NAMES = (*(pattern.name for pattern in PATTERNS), "buffers")


def check_names(function: str, disable: Collection[str]) -> None:
    unknown = sorted(set(disable) - set(NAMES)) if not isinstance(disable, str) else [disable]
    if unknown:
        raise ValueError(f"{function}: disable names {', '.join(map(repr, unknown))}, expected a list of: {', '.join(NAMES)}")


def run_patterns(
    module: fx.GraphModule,
    stored: Iterable[fx.Node],
    report: FusionReport,
    *,
    fmt: Format | None = None,
    disable: Collection[str] = (),
    reference: bool = False,
) -> Editor:
    """Rewrites the graph in place; what depends on stored tensors alone is marked, for stored.hoist to take out.

    stored     nodes (placeholders, get_attr) of parameters and buffers
    fmt        for float linear layers, after scales are folded into them; None: they stay
    disable    names of patterns that are not to run
    reference  also use ops without a kernel on this machine (slow)
    """
    edit = Editor(module, stored, report, reference)
    for pattern in PATTERNS:
        if pattern.name == "glu":
            pack_linears(edit, fmt)
        if pattern.name not in disable:
            pattern.run(edit)
    return edit
