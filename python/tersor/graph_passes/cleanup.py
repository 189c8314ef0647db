"""Work that need not be done: calls that change nothing, calls made twice, results nobody reads."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

from .editor import Editor, same_shape
from .vocabulary import kind_of, read

_DROPOUTS = ("dropout", "feature_dropout")


def remove_identities(edit: Editor) -> None:
    """Dropout in eval mode, casts to the dtype a tensor has, views of the shape it has, times 1, plus 0."""
    for node in list(edit.graph.nodes):
        kind = kind_of(node)
        if kind is None:
            continue
        if kind.name in ("log_usage", "assert_metadata") and not node.users:
            edit.graph.erase_node(node)
            continue
        source, fresh = _same_as(edit, node)
        if source is None:
            continue
        # A view or a copy is another tensor: the caller may tell the two apart, and a write to one may not reach the other.
        if fresh and (edit.escapes(node) or edit.escapes(source) or edit.writes):
            edit.report.leave("remove_identities", node.name, "the caller gets the result, or something is written in place")
            continue
        edit.replace(node, source)
        edit.report.did("remove_identities", f"{kind.name} {node.name}")
        edit.graph.erase_node(node)
    edit.clean()


def _same_as(edit: Editor, node: fx.Node) -> tuple[fx.Node | None, bool]:
    """(the argument whose values the call gives back, whether as another tensor); None where it changes something."""
    kind, call = kind_of(node), read(node)
    assert kind is not None
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node):
        return None, False
    if kind.name in _DROPOUTS:
        if call is None or (call.args["training"] is not False and call.args["p"] != 0):
            edit.report.leave("remove_identities", node.name, "dropout in training mode")
            return None, False
        return source, False
    if kind.name in ("mul", "add") and call is not None:
        neutral = 1 if kind.name == "mul" else 0
        for a, b in ((call.args["input"], call.args["other"]), (call.args["other"], call.args["input"])):
            # x + 0 makes 0 of -0: the same number.
            if isinstance(a, fx.Node) and type(b) in (int, float) and b == neutral and _same_memory(edit, a, node):
                return (a, True) if call.args.get("alpha", 1) == 1 else (None, False)
        return None, False
    if not kind.view or kind.name in ("select", "squeeze", "t") or not _same_memory(edit, source, node):
        return None, False
    if kind.name == "getitem" and not _plain_slices(node.args[1]):
        return None, False
    returns_self = kind.name in ("cast", "contiguous") and not _copies(node)
    return source, not returns_self


def _plain_slices(index: Any) -> bool:
    entries = index if isinstance(index, tuple) else (index,)
    return all(entry is Ellipsis or (isinstance(entry, slice) and entry.step in (None, 1)) for entry in entries)


def _copies(node: fx.Node) -> bool:
    return node.target is torch.ops.aten._to_copy.default or True in node.args or bool(node.kwargs.get("copy"))


def _same_memory(edit: Editor, source: fx.Node, node: fx.Node) -> bool:
    """Whether the values have one dtype, device, shape and strides, as far as is known without a guard."""
    a, b = edit.tensor(source), edit.tensor(node)
    if a is None or b is None or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    strides = a.layout is torch.strided and same_shape(a.stride(), b.stride())
    return strides and same_shape(a.shape, b.shape) and same_shape([a.storage_offset()], [b.storage_offset()])


def common_subexpressions(edit: Editor) -> None:
    """One call in place of several that are equal: repeated transposes, masks, casts, rotary tables."""
    first: dict[Hashable, fx.Node] = {}
    for node in list(edit.graph.nodes):
        kind = kind_of(node)
        key: Hashable
        if node.op == "get_attr":
            key = ("get_attr", node.target)
        elif kind is not None and (kind.pure or kind.view) and isinstance(node.meta.get("val"), Tensor):
            key = (node.target, edit.epoch[node], _hashable(node.args), _hashable(node.kwargs))
        else:
            continue
        try:
            known = first.setdefault(key, node)
        except TypeError:  # an argument without a hash
            continue
        if known is node:
            continue
        if node.op != "get_attr" and (edit.escapes(node) or edit.escapes(known)):
            edit.report.leave("common_subexpressions", node.name, "the caller gets the result")
            continue
        edit.replace(node, known)
        edit.graph.erase_node(node)
        if node.op != "get_attr":
            edit.report.did("common_subexpressions", f"{kind.name if kind else ''} {known.name}")
    edit.clean()


def _hashable(value: Any) -> Hashable:
    """Arguments as a key: nodes by identity, numbers with their type (1, 1.0 and True are equal), slices and lists as tuples."""
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((name, _hashable(value[name])) for name in sorted(value))
    if isinstance(value, slice):
        return "slice", _hashable((value.start, value.stop, value.step))
    return (type(value), value) if not isinstance(value, fx.Node) else value


def remove_dead(edit: Editor) -> None:
    """Calls whose results nobody reads."""
    before = len(edit.graph.nodes)
    edit.clean()
    if gone := before - len(edit.graph.nodes):
        edit.report.did("remove_dead", f"{gone} calls")
