"""Fusions around one int8 linear layer or several on the same input: activation, residual, GLU, one GEMM, one quantisation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import fx

from .. import ops
from ..ops.tiles import TILE_N
from .editor import Editor, is_call, same_shape
from .layers import (
    LAYERS,
    ON_ROWS,
    biases,
    call_ours,
    concatenated,
    dtype_of,
    has_argument,
    name_of,
    only_user,
    ours,
    stored_layer,
)
from .vocabulary import kind_of

ELSEWHERE = "a value between is used elsewhere"
WRITTEN = "something is written in place between"


def activation(node: fx.Node) -> str | None:
    """The epilogue that the call is, None where there is none."""
    call = is_call(node, "gelu", "silu", "relu")
    if call is None or call.args.get("inplace"):
        return None
    if call.kind == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(call.args["approximate"])
    return call.kind


def fuse_activations(edit: Editor) -> None:
    """linear, then gelu, silu or relu -> the layer's epilogue."""
    for node in list(edit.graph.nodes):
        epilogue = activation(node)
        layer = node.all_input_nodes[0] if epilogue else None
        args = ours(layer, *LAYERS)
        if epilogue is None or layer is None or args is None or epilogue not in ops.EPILOGUES:
            continue
        reason = ""
        if args["epilogue"] != "none":
            reason = "the layer has an activation already"
        elif args.get("residual") is not None:
            reason = "the layer adds a residual, which comes after the activation"
        elif not only_user(layer):
            reason = ELSEWHERE
        elif not edit.same_epoch(layer, node):
            reason = WRITTEN
        if reason:
            edit.report.leave("activation", node.name, reason)
            continue
        with edit.before(node):
            fused = call_ours(edit, name_of(layer), args | {"epilogue": epilogue}, like=layer)
        edit.replace(node, fused)
        edit.report.did("activation", f"{layer.name} + {epilogue}")
    edit.clean()


def fuse_residuals(edit: Editor) -> None:
    """linear, then + a tensor of its shape and dtype -> added in the layer's epilogue."""
    for node in list(edit.graph.nodes):
        call = is_call(node, "add")
        if call is None or call.args["alpha"] != 1:
            continue
        sides = [(call.args["input"], call.args["other"]), (call.args["other"], call.args["input"])]
        # Of two layers the later one: the other's result is there by then.
        sides.sort(key=lambda pair: -edit.position.get(pair[0], -1) if isinstance(pair[0], fx.Node) else 1)
        for layer, residual in sides:
            args = ours(layer, "linear_dynamic", "linear_s8")
            if args is None or not has_argument(name_of(layer), "residual") or args.get("residual") is not None:
                continue
            reason = _why_no_residual(edit, node, layer, residual)
            if reason:
                edit.report.leave("residual", node.name, reason)
                continue
            with edit.before(node):
                fused = call_ours(edit, name_of(layer), args | {"residual": residual}, like=layer)
            edit.replace(node, fused)
            edit.report.did("residual", f"{layer.name} + {residual.name}")
            break
    edit.clean()


def _why_no_residual(edit: Editor, node: fx.Node, layer: fx.Node, residual: Any) -> str:
    y, r = edit.tensor(layer), edit.tensor(residual)
    if y is None or r is None or not isinstance(residual, fx.Node):
        return "what is added is no tensor"
    if r.dtype != y.dtype or not same_shape(r.shape, y.shape):
        return "what is added has another shape or dtype"
    if residual is layer or not only_user(layer):
        return ELSEWHERE
    return "" if edit.same_epoch(layer, node) else WRITTEN


def fuse_glu(edit: Editor) -> None:
    """act(gate(x)) * up(x) -> one GEMM over interleaved tiles, the product in its epilogue."""
    for node in list(edit.graph.nodes):
        call = is_call(node, "mul")
        if call is None:
            continue
        for left, right in ((call.args["input"], call.args["other"]), (call.args["other"], call.args["input"])):
            epilogue = activation(left) if isinstance(left, fx.Node) else None
            if epilogue is None:
                continue
            gate = left.all_input_nodes[0]
            args, up = ours(gate, "linear_dynamic"), ours(right, "linear_dynamic")
            if args is None or up is None:
                continue
            reason = _why_no_glu(edit, node, (left, gate, right), args, up, epilogue)
            if reason:
                edit.report.leave("glu", node.name, reason)
                break
            with edit.before(node):
                pair: Any = biases(edit, (args, up))
                halves = {name: (args[name], up[name]) for name in ("weight_packed", "weight_scale")} | {"bias": pair}
                made = {name: two and edit.call(ops.interleave_glu, *two, stored=True) for name, two in halves.items()}
                made |= {"x": args["x"], "activation": epilogue, "bits": args["bits"]}
                fused = call_ours(edit, "linear_glu", made, gate)
            edit.replace(node, fused)
            edit.report.did("glu", f"{gate.name}, {right.name}")
            break
    edit.clean()


def _why_no_glu(
    edit: Editor, node: fx.Node, between: tuple[fx.Node, ...], gate: dict[str, Any], up: dict[str, Any], epilogue: str
) -> str:
    if "linear_glu" not in ops.OPS:
        return "this build has no linear_glu"
    if gate["x"] is not up["x"]:
        return "gate and up read different inputs"
    if gate["epilogue"] != "none" or up["epilogue"] != "none" or gate.get("residual") or up.get("residual"):
        return "gate or up has an epilogue already"
    if not all(only_user(n) for n in between):
        return ELSEWHERE
    n = edit.features(between[1])
    if gate["bits"] != up["bits"] or n != edit.features(between[2]):
        return "gate and up differ in size or width of code"
    if n is None or n % TILE_N:
        return f"{n} channels are not whole tiles of {TILE_N}"
    if not (stored_layer(edit, gate) and stored_layer(edit, up)):
        return "a weight is not a stored tensor"
    if not edit.same_epoch(node, *between):
        return WRITTEN
    return edit.op_runs(ops.OPS["linear_glu"])


def fuse_together(edit: Editor) -> None:
    """q, k and v (any layers on one x, one width, one epilogue) -> one GEMM over concatenated tiles, its output split."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in edit.graph.nodes:
        args = ours(node, "linear_dynamic")
        if args is not None:
            groups[args["x"], args["bits"], args["epilogue"], edit.epoch[node]].append(node)
    for layers in groups.values():
        if len(layers) < 2:
            continue
        fit = []
        for layer in layers:
            reason = _why_not_together(edit, layer)
            if reason:
                edit.report.leave("together", layer.name, reason)
            else:
                fit.append(layer)
        if len(fit) > 1:
            _join(edit, fit)
    edit.clean()


def _why_not_together(edit: Editor, layer: fx.Node) -> str:
    args, n = ours(layer, "linear_dynamic"), edit.features(layer)
    assert args is not None
    if n is None or n % TILE_N:
        return f"{n} channels are not whole tiles of {TILE_N}"
    if args.get("residual") is not None:
        return "the layer adds a residual"
    if not stored_layer(edit, args):
        return "a weight is not a stored tensor"
    if edit.escapes(layer):
        return "the caller gets the result"
    return ""


def _join(edit: Editor, layers: list[fx.Node]) -> None:
    parts = [args for layer in layers if (args := ours(layer, "linear_dynamic"))]
    sizes = [edit.features(layer) for layer in layers]
    with edit.before(layers[0]):
        added = biases(edit, parts)
        stored = {
            "weight_packed": concatenated(edit, [args["weight_packed"] for args in parts]),
            "weight_scale": concatenated(edit, [args["weight_scale"] for args in parts]),
            "bias": added and concatenated(edit, added),
        }
        whole = call_ours(edit, "linear_dynamic", parts[0] | stored, like=layers[0])
        split = edit.call(torch.split_with_sizes, whole, sizes, -1)  # torch.split is Python
        pieces = edit.parts(split)
    names = ", ".join(layer.name for layer in layers)
    if not _views_stay_possible(edit, dict(zip(layers, pieces, strict=True))):
        edit.report.leave("together", names, "a view of a result needs it in one piece")
        edit.clean()
        return
    for layer, piece in zip(layers, pieces, strict=True):
        edit.replace(layer, piece)
    edit.report.did("together", names)


def _views_stay_possible(edit: Editor, pieces: dict[fx.Node, fx.Node]) -> bool:
    """Whether every view downstream can still be taken of a slice; keeps the new strides where it can."""
    values: dict[fx.Node, Any] = {layer: piece.meta["val"] for layer, piece in pieces.items()}
    todo = sorted({user for layer in pieces for user in layer.users}, key=edit.position.__getitem__)
    seen = set(todo)
    while todo:
        node = todo.pop(0)
        kind = kind_of(node)
        if kind is None or not (kind.view or kind.name in ("add", "mul", "neg", "cat")):
            continue  # a call that works on values, whatever the strides
        try:
            values[node] = edit.propagate(node.target, node.args, node.kwargs, values)
        except (RuntimeError, ValueError):
            return False
        old = edit.tensor(node)
        if old is not None and same_shape(old.stride(), values[node].stride()):
            continue
        for user in node.users:
            if user not in seen and user.op != "output":
                seen.add(user)
                todo.append(user)
        todo.sort(key=edit.position.__getitem__)
    for node, value in values.items():
        node.meta["val"] = value
    return True


def share_rows(edit: Editor) -> None:
    """One quantisation for the layers that are left on one x."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in edit.graph.nodes:
        args = ours(node, *ON_ROWS)
        if args is not None and isinstance(args["x"], fx.Node):
            groups[args["x"], edit.epoch[node]].append(node)
    for (x, _), layers in groups.items():
        if len(layers) > 1:
            with edit.before(layers[0]):
                rows = edit.parts(edit.call(ops.quantize_rows.raw, x))
            for layer in layers:
                on_rows(edit, layer, rows)
            edit.report.did("share_rows", ", ".join(layer.name for layer in layers))
    edit.clean()


def on_rows(edit: Editor, layer: fx.Node, rows: list[fx.Node]) -> None:
    """The layer, which quantises its x itself, on int8 rows that are there."""
    args = ours(layer, *ON_ROWS)
    assert args is not None
    x = args.pop("x")
    dtype = dtype_of(edit, x)
    with edit.before(layer):
        given = dict(zip(("q", "scale", "row_sum"), rows, strict=True))
        new = call_ours(edit, ON_ROWS[name_of(layer)], args | given | {"out_dtype": dtype, "dtype": dtype}, like=layer)
    edit.replace(layer, new)


def fuse_glu_rows(edit: Editor) -> None:
    """A GLU that one layer alone reads -> the int8 rows of the product, no float between."""
    _fuse_rows(edit, "glu_rows", "linear_glu", "linear_glu_s8")


def fuse_layer_rows(edit: Editor) -> None:
    """A layer that one layer alone reads, but for an activation -> the int8 rows of its result, no float between."""
    _fuse_rows(edit, "layer_rows", "linear_dynamic", "linear_s8", seldom=True)


def _fuse_rows(edit: Editor, pattern: str, *names: str, seldom: bool = False) -> None:
    """seldom: most of these nodes have other readers than an int8 layer, which is not worth a line of the report."""
    for node in list(edit.graph.nodes):
        args = ours(node, *names)
        if args is None or not node.users:
            continue  # without users: this very step has replaced it
        reader = next(iter(node.users))
        if seldom and ours(reader, "linear_dynamic") is None:
            continue
        name = f"{name_of(node)}_quantize"
        reason = edit.op_runs(ops.OPS[name])
        if not only_user(node) or ours(reader, "linear_dynamic") is None:
            reason = "not one int8 layer alone reads it"
        elif args.get("residual") is not None:
            reason = "the layer adds a residual"
        elif not edit.same_epoch(node, reader):
            reason = WRITTEN
        if reason:
            edit.report.leave(pattern, node.name, reason)
            continue
        with edit.before(node):
            rows = edit.parts(call_ours(edit, name, args, like=node))
        on_rows(edit, reader, rows)
        edit.report.did(pattern, f"{node.name} -> {reader.name}")
    edit.clean()
