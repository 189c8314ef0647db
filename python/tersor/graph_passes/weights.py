"""What can be done to the weights once: a format for float linear layers, BatchNorm and scales folded into the layer before."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..formats import Format, format_from_dict
from .editor import Editor, is_call
from .layers import LAYERS, call_ours, name_of, only_user, ours, stored_layer
from .linears import ELSEWHERE, WRITTEN
from .vocabulary import aten

CONVOLUTIONS = {target: None for target in (torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d)}
CONVOLUTIONS |= dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default))


# ---- a format for float layers


def stored_tensors(weight: Tensor, tag: str) -> tuple[Tensor, ...]:
    """Float weight [N, K] -> the tensors that the format of `tag` (its JSON) stores, in the order it lists them."""
    fmt = format_from_dict(json.loads(tag))
    constants = {name: t.to(weight.device) for name, t in fmt.constants().items()}
    parts = fmt.quantize(weight, fmt.scales(weight)) if fmt.scales_need_all_rows else fmt.quantize(weight)
    specs = fmt.tensors(*weight.shape)
    return tuple(parts[s.name] if s.name in parts else constants[s.name].expand(s.shape).contiguous() for s in specs)


def pack_linears(edit: Editor, fmt: Format | None) -> None:
    """Every float linear layer of the graph in `fmt`, its weight quantised once."""
    for node in list(edit.graph.nodes) if fmt is not None else []:
        call = is_call(node, "linear")
        if call is None or fmt is None:
            continue
        x, weight, bias = call.args["input"], call.args["weight"], call.args["bias"]
        reason = _why_float(edit, x, weight, bias, fmt)
        if reason:
            edit.report.leave("format", node.name, reason)
            continue
        with edit.before(node):
            specs = fmt.tensors(*weight.meta["val"].shape)
            # Quantisers look at values, which fake tensors do not have.
            value = tuple(edit.fake(spec.shape, spec.dtype, weight) for spec in specs)
            tag = json.dumps(fmt.to_dict())
            made = edit.parts(edit.call(stored_tensors, weight, tag, stored=True, value=value), stored=True)
            given = {spec.name: part for spec, part in zip(specs, made, strict=True)}
            new = call_ours(edit, fmt.op.name, {"x": x, "bias": bias, "bits": fmt.bits, **given}, like=node)
        edit.replace(node, new)
        edit.report.did("format", f"{node.name} in {fmt!r}")
    edit.clean()


def _why_float(edit: Editor, x: Any, weight: Any, bias: Any, fmt: Format) -> str:
    value, w = edit.tensor(x), edit.tensor(weight)
    if not edit.is_stored(weight) or (bias is not None and not edit.is_stored(bias)):
        return "its weight is not a stored tensor"
    if value is None or w is None or w.dim() != 2 or value.dim() < 1:
        return "its weight is no matrix"
    if value.dtype != w.dtype or w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {value.dtype}, its weight {w.dtype}"
    if any(is_call(user, "linear") is None for user in weight.users if user.op != "output") or len(weight.users) == 0:
        return "its weight is tied to what stays float"
    try:
        fmt.check_sizes(*w.shape)
    except ValueError as error:
        return str(error)
    return ""


# ---- BatchNorm and scales


def fold_scales(edit: Editor) -> None:
    """BatchNorm in eval mode, and products with a number, after a linear layer or a convolution -> its weight and bias."""
    for node in list(edit.graph.nodes):
        for read in (_batch_norm, _product):
            found = read(edit, node)
            if found is None:
                continue
            layer, factor, shift, reason = found
            reason = reason or _why_no_fold(edit, layer, node, factor)
            if reason:
                edit.report.leave("fold_scales", node.name, reason)
                break
            _fold(edit, layer, node, factor, shift)
            break
    edit.clean()


Factor = Callable[[], fx.Node] | float
Found = tuple[fx.Node, Factor, Callable[[], fx.Node] | None, str]


def batch_norm_factor(variance: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    factor = torch.rsqrt(variance + eps)
    return factor if weight is None else factor * weight


def batch_norm_shift(mean: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    return -mean * factor if bias is None else bias - mean * factor


def _batch_norm(edit: Editor, node: fx.Node) -> Found | None:
    call = is_call(node, "batch_norm")
    layer: Any = call.args["input"] if call else None
    if call is None or not _is_layer(layer):
        return None
    a = call.args
    if a["training"] is not False or a["running_mean"] is None:
        return layer, 1.0, None, "BatchNorm in training mode"
    tensors = [a["running_mean"], a["running_var"], a["weight"], a["bias"]]
    if not all(t is None or edit.is_stored(t) for t in tensors):
        return layer, 1.0, None, "a tensor of BatchNorm is not stored"
    if not _channels_last(layer) and not _is_convolution(layer):
        return None
    value = edit.tensor(layer)
    if value is None or (_channels_last(layer) and value.dim() != 2):
        return layer, 1.0, None, "BatchNorm runs over another dim than the layer's channels"
    made: list[fx.Node] = []

    def factor() -> fx.Node:
        made.append(edit.call(batch_norm_factor, a["running_var"], a["weight"], a["eps"], stored=True))
        return made[0]

    return layer, factor, lambda: edit.call(batch_norm_shift, a["running_mean"], made[0], a["bias"], stored=True), ""


def _product(edit: Editor, node: fx.Node) -> Found | None:
    call = is_call(node, "mul", "div")
    if call is None or call.args.get("rounding_mode") is not None:
        return None
    sides = [(call.args["input"], call.args["other"])]
    if call.kind == "mul":
        sides.append((call.args["other"], call.args["input"]))
    for layer, number in sides:
        if _is_layer(layer) and type(number) in (int, float) and not (call.kind == "div" and number == 0):
            return layer, float(number) if call.kind == "mul" else 1.0 / number, None, ""
    return None


def _is_convolution(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in CONVOLUTIONS


def _channels_last(node: Any) -> bool:
    return is_call(node, "linear") is not None or ours(node, *LAYERS) is not None


def _is_layer(node: Any) -> bool:
    return _is_convolution(node) or _channels_last(node)


def _why_no_fold(edit: Editor, layer: fx.Node, node: fx.Node, factor: Factor) -> str:
    args = ours(layer, *LAYERS)
    if args is not None:
        if args["epilogue"] != "none" or args.get("residual") is not None:
            return "the layer has an epilogue already"
        stored = stored_layer(edit, args)
    else:
        stored = len(layer.args) > 1 and all(edit.is_stored(n) for n in layer.args[1:3] if n is not None) and not _named(layer)
    if not stored:
        return "a weight is not a stored tensor"
    if not only_user(layer):
        return ELSEWHERE
    if isinstance(factor, float) and not (abs(factor) < float("inf") and factor == factor):
        return f"the factor is {factor}"
    return "" if edit.same_epoch(layer, node) else WRITTEN


def _named(layer: fx.Node) -> bool:
    return bool({"weight", "bias"} & layer.kwargs.keys())


def scaled_rows(t: Tensor, factor: Tensor | float) -> Tensor:
    """t times factor along dim 0, in float32, in t's dtype."""
    f = factor.float().reshape(-1, *[1] * (t.dim() - 1)) if isinstance(factor, Tensor) else factor
    return (t.float() * f).to(t.dtype)


def shifted(bias: Tensor | None, factor: Tensor | float, shift: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias behind a factor and a shift, in float32, as dtype."""
    new = None if bias is None else bias.float() * factor
    if shift is not None:
        new = shift.float() if new is None else new + shift.float()
    return None if new is None else new.to(dtype)


def _fold(edit: Editor, layer: fx.Node, node: fx.Node, factor: Factor, shift: Callable[[], fx.Node] | None) -> None:
    args = ours(layer, *LAYERS)
    dtype = edit.value(layer).dtype
    with edit.before(node):
        f = factor() if callable(factor) else factor
        s = shift() if shift else None

        def bias_of(bias: Any) -> fx.Node | None:
            return None if bias is None and s is None else edit.call(shifted, bias, f, s, dtype, stored=True)

        if args is not None:
            scale = edit.call(scaled_rows, args["weight_scale"], f, stored=True)
            new = call_ours(edit, name_of(layer), args | {"weight_scale": scale, "bias": bias_of(args["bias"])}, like=layer)
        else:
            x, weight, bias, *rest = layer.args if len(layer.args) > 2 else (*layer.args, None)
            target: Any = layer.target
            kwargs: dict[str, Any] = dict(layer.kwargs)
            rows = edit.call(scaled_rows, weight, f, stored=True)
            new = edit.call(target, x, rows, bias_of(bias), *rest, like=layer, **kwargs)
    edit.replace(node, new)
    edit.graph.erase_node(node)  # BatchNorm is not pure in general
    edit.report.did("fold_scales", f"{layer.name} * {node.name}")
