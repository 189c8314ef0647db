"""tersor.fuse: capture with torch.export, the pass, and everything that depends on weights alone computed once."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..formats import Format
from .compile import check_format
from .passes import check_names, run_patterns
from .report import FusionReport, logger
from .stored import computed, hoist

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def fuse(
    model: nn.Module,
    example_inputs: Any,
    *,
    format: Format | str | None = None,
    disable: Collection[str] = (),
    dynamic_shapes: Any = None,
    reference: bool = False,
    verbose: bool = False,
) -> nn.Module:
    """A fused copy of `model` for inference: torch.fx.GraphModule, captured with torch.export. The model is left as it is.

    example_inputs  a tensor, a tuple of arguments or a dict of keyword arguments, as the model will be called
    format          for float nn.Linear layers, a format or its name; None: they stay as they are
    disable         names of patterns that are not to run (tersor.fusion.PATTERNS)
    dynamic_shapes  of torch.export: which sizes may change; None: the result takes the shapes of example_inputs only
    reference       also fuse to ops that have no kernel on this machine
    verbose         print the report as a table

    The result's `fusion_report` says what was fused, what was left, and why; so does the logger "tersor". Where torch.export cannot
    capture the model, its submodules are captured one by one, and the result is a module of the model's own class that holds them.
    Weights that nothing fuses are shared with the model, joined ones are copies. Raises ValueError for a model in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model is {type(model).__name__}, expected an nn.Module")
    if model.training:
        raise ValueError("fuse: model is in training mode, and the result is for inference; call model.eval() first")
    check_names("fuse", disable)
    report = FusionReport(type(model).__name__)
    capture = _Capture(report, fmt=check_format("fuse", format), disable=disable, reference=reference)
    with torch.no_grad():
        arguments = _arguments(example_inputs)
        whole = capture.whole(model, arguments, dynamic_shapes, "")
        fused: Any = capture.by_parts(model, arguments) if whole is None else whole
    fused.fusion_report = report
    report.log()
    if verbose:
        from rich.console import Console

        Console(stderr=True).print(report.table())
    return fused


def _arguments(example_inputs: Any) -> Arguments:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        f"fuse: example_inputs is {type(example_inputs).__name__}, expected a tensor, a tuple of arguments or a dict of them"
    )


class _Capture:
    """Captures and fuses a model, or what of it can be captured."""

    def __init__(self, report: FusionReport, **options: Any) -> None:
        self.report, self.options = report, options
        self.done: dict[int, nn.Module] = {}  # a module in two places is fused once

    def whole(self, model: nn.Module, arguments: Arguments, dynamic_shapes: Any, name: str) -> fx.GraphModule | None:
        """The fused graph; None, with a line in the report, where torch.export refuses."""
        try:
            program = torch.export.export(model, *arguments, dynamic_shapes=dynamic_shapes, strict=False)
            module = program.module()
        except Exception as error:  # anything that a model's own code, or export's reading of it, may raise
            reason = f"torch.export: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            self.report.leave("capture", name or "model", reason)
            logger.warning("tersor: %s is not captured whole; its parts are tried: %s", name or "the model", reason)
            return None
        assert isinstance(module, fx.GraphModule)
        return self.fused(module)

    def fused(self, module: fx.GraphModule) -> fx.GraphModule:
        """The pass on an exported module, in place."""
        nodes = [node for node in module.graph.nodes if node.op == "get_attr" and isinstance(_attribute(module, node), Tensor)]
        edit = run_patterns(module, nodes, self.report, **self.options)
        prologue, sources = hoist(edit, "fused_{}".format)
        if prologue is not None:
            values = computed(prologue, [_attribute(module, node) for node in sources])
            for i, value in enumerate(values):
                module.register_buffer(f"fused_{i}", value)
        _drop_unused(module)
        module.graph.lint()
        module.recompile()
        return module

    def by_parts(self, model: nn.Module, arguments: Arguments) -> nn.Module:
        """The model with those submodules fused that can be captured, seen in one run on the example inputs."""
        calls: dict[int, Arguments] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(id(module), (args, kwargs))

        with contextlib.ExitStack() as hooks:
            for module in model.modules():
                hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            model(*arguments[0], **arguments[1])
        return self._parts_of(model, calls, "")

    def _parts_of(self, module: nn.Module, calls: dict[int, Arguments], name: str) -> nn.Module:
        shallow = copy.copy(module)
        shallow._modules = dict(module._modules)
        for child_name, child in module._modules.items():
            if child is None or not any(True for _ in child.children()):
                continue  # a layer by itself has nothing to be fused with
            if id(child) not in self.done:
                self.done[id(child)] = self._part(child, calls, f"{name}.{child_name}".lstrip("."))
            shallow._modules[child_name] = self.done[id(child)]
        return shallow

    def _part(self, child: nn.Module, calls: dict[int, Arguments], name: str) -> nn.Module:
        if id(child) in calls:
            arguments = calls[id(child)]
            before = len(self.report.fused)
            fused = self.whole(child, arguments, _any_size(arguments), name)
            if fused is not None:
                return fused if len(self.report.fused) > before else child
        return self._parts_of(child, calls, name)


def _any_size(arguments: Arguments) -> Any:
    """Dynamic shapes that leave it to torch.export which sizes a part fixes."""

    def of(t: Any) -> Any:
        return dict.fromkeys(range(t.dim()), torch.export.Dim.AUTO) if isinstance(t, Tensor) else None

    args, kwargs = torch.utils._pytree.tree_map(of, arguments)
    return (*args, *kwargs.values())


def _attribute(module: nn.Module, node: fx.Node) -> Any:
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _drop_unused(module: fx.GraphModule) -> None:
    """Parameters and buffers that the graph no longer reads."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for path in [name for name, _ in [*module.named_parameters(), *module.named_buffers()] if name not in used]:
        parent, _, name = path.rpartition(".")
        delattr(module.get_submodule(parent), name)
    module.delete_all_unused_submodules()
