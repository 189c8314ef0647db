"""Work on stored tensors leaves the graph: it is done once for the weights there are, and again when they change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..nn import in_huge_pages
from .editor import FOLDED, Editor


def hoist(edit: Editor, name: Callable[[int], str] | None = None) -> tuple[fx.GraphModule | None, list[fx.Node]]:
    """Takes the folded calls out of the graph.

    name     None: the graph gets a placeholder for each result, after its own; else it reads attribute name(i) for result i
    returns  (a module of the stored tensors they read, in the order of the nodes in the second result, to a tuple of what the graph
             reads of them; those nodes); None and [] where nothing is folded
    """
    graph = edit.graph
    folded = [node for node in graph.nodes if FOLDED in node.meta]
    if not folded:
        return None, []
    sources: list[fx.Node] = []
    prologue, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in folded:
        for source in node.all_input_nodes:
            if source not in copies and FOLDED not in source.meta:
                copies[source] = prologue.placeholder(source.name)
                sources.append(source)
    for node in folded:
        copies[node] = prologue.node_copy(node, copies.__getitem__)
    results = [node for node in folded if any(FOLDED not in user.meta for user in node.users)]
    prologue.output(tuple(copies[node] for node in results))
    for i, node in enumerate(results):
        with graph.inserting_before(folded[0]):
            made = graph.create_node("get_attr", name(i)) if name else graph.placeholder(f"{node.name}_stored")
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made, delete_user_cb=lambda user: FOLDED not in user.meta)
    for node in reversed(folded):
        graph.erase_node(node)
    edit.clean()
    return fx.GraphModule({}, prologue), sources


def computed(prologue: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the prologue gives for these stored tensors: plain tensors, without gradients, large ones in huge pages."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple(in_huge_pages(t.detach()) for t in prologue(*tensors))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [t._version for t in tensors]
    except RuntimeError:  # inference tensors do not count their writes
        return [0 if t.is_inference() else t._version for t in tensors]


class StoredValues:
    """The results of a prologue for the stored tensors of each call: kept while those live and nothing writes to them.

    A graph that dynamo shares between layers is called with the weights of each in turn, so there is an entry for each set.
    """

    def __init__(self, prologue: Callable[..., Any]) -> None:
        self.prologue = prologue
        self.entries: dict[tuple[int, ...], tuple[list[int], tuple[Tensor, ...], list[Any]]] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        key = tuple(map(id, tensors))
        versions = _versions(tensors)
        known = self.entries.get(key)
        if known is not None and known[0] == versions:
            return known[1]
        values = computed(self.prologue, tensors)
        forget = weakref.WeakMethod(self._forget)

        def gone(_: Any) -> None:
            method = forget()
            if method is not None:
                method(key)

        # An id may be used again once its tensor is gone; the entry goes with the first of them.
        self.entries[key] = versions, values, [weakref.ref(t, gone) for t in tensors]
        return values

    def _forget(self, key: tuple[int, ...]) -> None:
        self.entries.pop(key, None)
