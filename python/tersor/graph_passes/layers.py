"""Our layers in a graph: reading a call of one of our ops, and writing it again with other arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .. import ops
from .editor import Editor

# Ops that quantise their own float x per row: what takes rows that are int8 already in its place, by name.
ON_ROWS = {"linear_dynamic": "linear_s8", "linear_glu": "linear_glu_s8"}
LAYERS = ("linear_dynamic", "linear_s8", "linear_static", "linear_weight_only", "linear_grouped", "linear_xnor")


def ours(node: Any, *names: str) -> dict[str, Any] | None:
    """The arguments of a call of one of our ops by name, defaults filled in; None where it is none of `names`."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    target = node.target
    if target.namespace != "tersor" or target._schema.name.split("::")[1] not in names:
        return None
    arguments = target._schema.arguments
    given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in arguments}


def name_of(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1]  # type: ignore[union-attr]


def call_ours(edit: Editor, name: str, args: dict[str, Any], like: fx.Node | None = None) -> fx.Node:
    """A call of our op with its arguments by name; trailing ones that equal their defaults are left out."""
    target = ops.OPS[name].raw
    arguments = list(target._schema.arguments)
    while arguments and arguments[-1].has_default_value() and args.get(arguments[-1].name) == arguments[-1].default_value:
        arguments.pop()
    values = [args.get(a.name, a.default_value) for a in arguments]
    return edit.call(target, *values, like=like)


def only_user(node: fx.Node) -> bool:
    """Whether one call reads it, once."""
    return len(node.users) == 1 and sum(arg is node for user in node.users for arg in _flat(user)) == 1


def _flat(user: fx.Node) -> list[Any]:
    found: list[Any] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return found


def has_argument(name: str, argument: str) -> bool:
    """Whether the op `name` exists and takes `argument`."""
    return name in ops.OPS and argument in ops.OPS[name].arguments


def dtype_of(edit: Editor, node: Any) -> torch.dtype | None:
    value = edit.tensor(node)
    return None if value is None else value.dtype


def concatenated(edit: Editor, tensors: Sequence[fx.Node]) -> fx.Node:
    return edit.call(torch.cat, list(tensors), 0, stored=True)


def biases(edit: Editor, layers: Sequence[dict[str, Any]]) -> list[fx.Node] | None:
    """The biases as nodes, zeros where a layer has none; None where no layer has one."""
    if all(args["bias"] is None for args in layers):
        return None
    dtype = next(dtype_of(edit, args["bias"]) for args in layers if args["bias"] is not None)
    return [
        edit.call(torch.zeros_like, args["weight_scale"], dtype=dtype, stored=True) if args["bias"] is None else args["bias"]
        for args in layers
    ]


def stored_layer(edit: Editor, args: dict[str, Any]) -> bool:
    """Whether everything but the activations is stored."""
    kept = (args["weight_packed"], args["weight_scale"], args["bias"])
    return all(node is None or edit.is_stored(node) for node in kept)
