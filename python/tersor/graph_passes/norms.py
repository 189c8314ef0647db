"""Norms that write int8 rows: layer_norm, rms_norm, and RMS norm spelled out as transformers spells it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from .. import ops
from ..ops.checks import FLOATS
from .editor import Editor, is_call, same_shape
from .layers import ON_ROWS, dtype_of, ours
from .linears import WRITTEN, on_rows
from .vocabulary import kind_of


class Norm(NamedTuple):
    """A norm over the last dim. nodes: every call that is part of it."""

    kind: str  # "layer" or "rms"
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    nodes: tuple[fx.Node, ...]


def read_norm(edit: Editor, node: fx.Node) -> Norm | None:
    call = is_call(node, "layer_norm", "rms_norm")
    if call is None:
        return _spelled_out(edit, node)
    shape = call.args["normalized_shape"]
    if not isinstance(call.args["input"], fx.Node) or (isinstance(shape, list | tuple) and len(shape) != 1):
        return None
    if call.kind == "layer_norm":
        return Norm("layer", call.args["input"], call.args["weight"], call.args["bias"], call.args["eps"], (node,))
    eps = call.args["eps"]
    value = edit.tensor(call.args["input"])
    if eps is None:
        eps = torch.finfo(value.dtype).eps if value is not None else 0.0
    return Norm("rms", call.args["input"], call.args["weight"], None, eps, (node,))


def _spelled_out(edit: Editor, node: fx.Node) -> Norm | None:
    """weight * cast(x * rsqrt(mean(x ** 2, -1, keepdim) + eps)), with or without casts of x to float32 and back."""
    for weight, scaled in _either_way(node, "mul"):
        if not edit.is_stored(weight):
            continue
        chain = [node]
        scaled = _through_cast(scaled, chain)
        for x, root in _either_way(scaled, "mul"):
            inner = is_call(root, "rsqrt")
            total: Any = inner.args["input"] if inner else None
            for mean, eps in _either_way(total, "add"):
                reading = is_call(mean, "mean")
                square = is_call(reading.args["input"], "pow", "mul") if reading else None
                if reading is None or square is None or not isinstance(eps, float) or not isinstance(x, fx.Node):
                    continue
                squared = (square.args["input"], 2 if square.kind == "pow" else x)
                over = (square.args["input"], square.args["exponent" if square.kind == "pow" else "other"])
                last = reading.args["dim"] in (-1, [-1], (-1,)) and (reading.args["keepdim"], reading.args["dtype"]) == (True, None)
                if over != squared or square.args["input"] is not x or not last:
                    continue
                chain += [scaled, root, total, mean, reading.args["input"]]
                source = _through_cast(x, chain)
                k = edit.features(source)
                w = edit.tensor(weight)
                if k is None or w is None or tuple(w.shape) != (k,) or dtype_of(edit, source) != dtype_of(edit, node):
                    return None
                return Norm("rms", source, weight, None, eps, tuple(chain))
    return None


def _either_way(node: Any, kind: str) -> list[tuple[Any, Any]]:
    call = is_call(node, kind)
    if call is None or call.args.get("alpha", 1) != 1:
        return []
    a, b = call.args["input"], call.args["other"]
    return [(a, b), (b, a)]


def _through_cast(node: Any, chain: list[fx.Node]) -> Any:
    kind = kind_of(node) if isinstance(node, fx.Node) else None
    if kind is not None and kind.name == "cast":
        chain.append(node)
        return node.args[0]
    return node


def fuse_norms(edit: Editor) -> None:
    """(residual add,) norm, then int8 layers -> one pass that writes the sum, the norm where it is used, and its int8 rows."""
    for node in list(edit.graph.nodes):
        norm = read_norm(edit, node)
        if norm is None:
            continue
        readers = [user for user in node.users if (args := ours(user, *ON_ROWS)) and args["x"] is node and _reads_once(user, node)]
        reason = _why_not(edit, node, norm, readers)
        if reason:
            edit.report.leave("norm", node.name, reason)
            continue
        _write(edit, node, norm, readers)
    edit.clean()


def _reads_once(user: fx.Node, node: fx.Node) -> bool:
    return sum(arg is node for arg in user.all_input_nodes) == 1


def _why_not(edit: Editor, node: fx.Node, norm: Norm, readers: list[fx.Node]) -> str:
    if "norm_quantize" not in ops.OPS:
        return "this build has no norm_quantize"
    if not readers:
        return "no int8 layer reads it"
    if dtype_of(edit, norm.x) not in FLOATS:
        return f"its input is {dtype_of(edit, norm.x)}"
    if not edit.same_epoch(node, *norm.nodes, *readers):
        return WRITTEN
    return edit.op_runs(ops.OPS["norm_quantize"])


def _residual(edit: Editor, norm: Norm, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, residual) where the norm's input is their sum, and the sum can be made by the same pass."""
    add = is_call(norm.x, "add")
    if add is None or add.args["alpha"] != 1 or not edit.same_epoch(norm.x, node):
        return None
    a, b = add.args["input"], add.args["other"]
    x, residual, total = edit.tensor(a), edit.tensor(b), edit.tensor(norm.x)
    if x is None or residual is None or total is None:
        return None
    alike = x.dtype == residual.dtype == total.dtype and same_shape(x.shape, residual.shape)
    stored = all(n is None or edit.is_stored(n) for n in (norm.weight, norm.bias))
    # The pass moves up to where the sum is made, so what it reads must be there.
    return (a, b) if alike and stored and not edit.escapes(norm.x) else None


def _write(edit: Editor, node: fx.Node, norm: Norm, readers: list[fx.Node]) -> None:
    added = _residual(edit, norm, node)
    x, residual = added or (norm.x, None)
    want_sum = added is not None and any(user not in norm.nodes for user in norm.x.users)
    want_y = any(user not in readers or not _reads_once(user, node) for user in node.users)
    at = norm.x if added else node
    with edit.before(at):
        made = edit.call(
            ops.OPS["norm_quantize"].raw, x, residual, norm.weight, norm.bias, norm.eps, norm.kind, want_sum, want_y, like=node
        )
        q, scale, row_sum, total, y = edit.parts(made)
    for reader in readers:
        on_rows(edit, reader, [q, scale, row_sum])
    if want_y:
        edit.replace(node, y)
    if want_sum:
        edit.replace(norm.x, total)
    # Gone at once: the sum may have been read by this norm alone, which the next pattern must see.
    edit.clean()
    edit.report.did("norm", f"{norm.kind} {node.name} -> {len(readers)} layers" + (", with residual" if added else ""))
