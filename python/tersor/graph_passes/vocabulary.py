"""One vocabulary for two dialects: what torch.export writes (ATen overloads) and what dynamo writes (torch functions and methods).

A pattern names kinds ("linear", "gelu"); the table says which call targets are of a kind and what its arguments are called.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten
_NO_DEFAULT: Any = object()


class Kind(NamedTuple):
    """Calls that mean the same. `parameters`: names in order, each with its default."""

    name: str
    parameters: tuple[tuple[str, Any], ...]
    pure: bool  # same arguments, same result, nothing else happens: equal calls may become one
    view: bool  # the result may share memory with the first argument


class Call(NamedTuple):
    """A node as its kind reads it."""

    kind: str
    args: dict[str, Any]


def _kind(name: str, parameters: str, *targets: Any, pure: bool = True, view: bool = False, **defaults: Any) -> None:
    names = parameters.split()
    kind = Kind(name, tuple((p, defaults.get(p, _NO_DEFAULT)) for p in names), pure, view)
    for target in targets:
        KINDS[target] = kind


# Targets are functions, ATen overloads, or the name of a Tensor method.
KINDS: dict[Any, Kind] = {}
_kind("linear", "input weight bias", F.linear, torch._C._nn.linear, aten.linear.default, bias=None)
_kind(
    "layer_norm",
    "input normalized_shape weight bias eps cudnn_enable",
    *(F.layer_norm, torch.layer_norm, aten.layer_norm.default),
    weight=None,
    bias=None,
    eps=1e-5,
    cudnn_enable=True,
)
_kind("rms_norm", "input normalized_shape weight eps", F.rms_norm, torch.rms_norm, aten.rms_norm.default, weight=None, eps=None)
_BATCH_NORM: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5, "cudnn_enabled": True}
_kind(
    "batch_norm",
    "input running_mean running_var weight bias training momentum eps cudnn_enabled",
    *(F.batch_norm, torch.batch_norm, aten.batch_norm.default),
    pure=False,
    **_BATCH_NORM,
)
_target: Any
# torch.batch_norm and ATen take weight and bias before the running statistics
for _target in (torch.batch_norm, aten.batch_norm.default):
    _first = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
    KINDS[_target] = KINDS[F.batch_norm]._replace(parameters=tuple((p, _BATCH_NORM.get(p, _NO_DEFAULT)) for p in _first))
_kind("gelu", "input approximate", F.gelu, torch._C._nn.gelu, aten.gelu.default, approximate="none")
_kind("silu", "input inplace", F.silu, aten.silu.default, inplace=False)
_kind("relu", "input inplace", F.relu, torch.relu, "relu", aten.relu.default, inplace=False)
_kind("tanh", "input", torch.tanh, F.tanh, "tanh", aten.tanh.default)
_kind("sigmoid", "input", torch.sigmoid, F.sigmoid, "sigmoid", aten.sigmoid.default)
_kind("add", "input other alpha", operator.add, torch.add, "add", aten.add.Tensor, aten.add.Scalar, alpha=1)
_kind("sub", "input other alpha", operator.sub, torch.sub, "sub", aten.sub.Tensor, aten.sub.Scalar, alpha=1)
_kind("mul", "input other", operator.mul, torch.mul, "mul", aten.mul.Tensor, aten.mul.Scalar)
_kind("div", "input other rounding_mode", operator.truediv, torch.div, "div", aten.div.Tensor, aten.div.Scalar, rounding_mode=None)
_kind("neg", "input", operator.neg, torch.neg, "neg", aten.neg.default)
_kind("pow", "input exponent", operator.pow, torch.pow, "pow", aten.pow.Tensor_Scalar)
_kind("mean", "input dim keepdim dtype", torch.mean, "mean", aten.mean.dim, keepdim=False, dtype=None)
_kind("rsqrt", "input", torch.rsqrt, "rsqrt", aten.rsqrt.default)
_kind("cos", "input", torch.cos, "cos", aten.cos.default)
_kind("sin", "input", torch.sin, "sin", aten.sin.default)
_kind("exp", "input", torch.exp, "exp", aten.exp.default)
_kind("cat", "tensors dim", torch.cat, aten.cat.default, dim=0)
_EMBEDDING: dict[str, Any] = {"max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "sparse": False}
_kind("embedding", f"input weight padding_idx {' '.join(_EMBEDDING)}", F.embedding, padding_idx=None, **_EMBEDDING)
_kind("embedding", "weight input padding_idx scale_grad_by_freq sparse", aten.embedding.default, padding_idx=-1, **_EMBEDDING)
_kind("dropout", "input p training inplace", F.dropout, p=0.5, training=True, inplace=False, pure=False)
_kind("dropout", "input p training", torch.dropout, aten.dropout.default, pure=False)
_kind("feature_dropout", "input p training", torch.feature_dropout, aten.feature_dropout.default, pure=False)
_kind("identity", "input", aten.alias.default, aten.detach.default, "detach", view=True)
_kind("cast", "input", "float", view=True)
_kind("cast", "input", "half", view=True)
_kind("cast", "input", "bfloat16", view=True)
for _target in ("to", aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default):
    _kind("cast", "input", _target, view=True)
_kind("contiguous", "input memory_format", "contiguous", aten.contiguous.default, view=True, memory_format=torch.contiguous_format)
for _name in ("view", "reshape", "expand", "permute", "transpose", "unsqueeze", "squeeze", "flatten", "t"):
    _overload = {"transpose": "int"}.get(_name, "default")
    if _name in ("squeeze", "flatten"):
        _targets = [aten.squeeze.dim, aten.squeeze.default] if _name == "squeeze" else [aten.flatten.using_ints]
    else:
        _targets = [getattr(getattr(aten, _name), _overload)]
    _functions = [getattr(torch, _name)] if hasattr(torch, _name) else []
    _kind(_name, "input", _name, *_functions, *_targets, view=True)
_kind("slice", "input", aten.slice.Tensor, view=True)
_kind("select", "input", aten.select.int, view=True)
_kind("getitem", "input index", operator.getitem, view=True)
_kind("log_usage", "event", torch._C._log_api_usage_once, pure=False)
_kind("assert_metadata", "input", aten._assert_tensor_metadata.default, pure=False)


def kind_of(node: fx.Node) -> Kind | None:
    """The kind of a call, None for what the table does not know."""
    if node.op not in ("call_function", "call_method"):
        return None
    try:
        return KINDS.get(node.target)
    except TypeError:  # a target that cannot be hashed
        return None


def read(node: Any) -> Call | None:
    """The node as a call of its kind with every argument by name; None where it is no such call or has arguments the kind lacks."""
    kind = kind_of(node) if isinstance(node, fx.Node) else None
    if kind is None or not kind.parameters:
        return None
    names = [name for name, _ in kind.parameters]
    if len(node.args) > len(names):
        return None
    args = dict(zip(names, node.args, strict=False))
    for key, value in node.kwargs.items():
        if key not in names or key in args:
            return None
        args[key] = value
    for name, default in kind.parameters:
        if name not in args:
            if default is _NO_DEFAULT:
                return None
            args[name] = default
    return Call(kind.name, args)


def mutates(node: fx.Node) -> bool:
    """Whether the call may write to a tensor that exists: nothing is moved across it."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    if node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None:
        return True
    call = read(node)
    if call is not None and (call.args.get("inplace") is True or call.args.get("max_norm") is not None):
        return True  # an embedding with a max_norm rescales the rows it reads
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if node.op == "call_module":  # of modules only the check of inputs that torch.export adds is known
        return target != "_guards_fn"
    if isinstance(target, str):
        return (target.endswith("_") and not target.endswith("__")) or target == "__setitem__"
    if target in _IN_PLACE:
        return True
    if getattr(target, "__module__", "") == "_operator":  # and_, or_ and not_ are not in place
        return False
    name = getattr(target, "__name__", "")
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    return name.endswith("_") and not name.endswith("__")


_IN_PLACE: set[Any] = {operator.setitem, operator.delitem} | {
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator) and name != "is_"
}
