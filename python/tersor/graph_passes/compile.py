"""torch.compile(model, backend="tersor"): the pass on dynamo's graphs."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from ..formats import FORMATS, Format
from .memory import no_buffers, plan_buffers
from .passes import check_names, run_patterns
from .report import FusionReport, logger
from .stored import StoredValues, computed, hoist

INNER = ("eager", "inductor")
# Of the graphs compiled last; a model that breaks into many graphs has one for each.
reports: deque[FusionReport] = deque(maxlen=256)


@dataclasses.dataclass(frozen=True)
class Options:
    """What torch.compile(..., options={...}) may say to the backend.

    inner      "eager": the fused graph runs as torch calls; "inductor": it is given to inductor, which compiles what is left
    format     a format (or its name in files) for the float linear layers of the graph; None: they stay float
    disable    names of patterns that are not to run (tersor.fusion.PATTERNS)
    reference  also fuse to ops that have no kernel on this machine
    verbose    print the report of each graph as a table
    """

    inner: str = "eager"
    format: Format | None = None
    disable: Collection[str] = ()
    reference: bool = False
    verbose: bool = False


def check_format(function: str, fmt: Any) -> Format | None:
    """A format, or its name, as a format. Raises TypeError / ValueError naming the function."""
    if isinstance(fmt, str):
        if fmt not in FORMATS:
            raise ValueError(f"{function}: format is {fmt!r}, expected one of: {', '.join(FORMATS)}")
        fmt = FORMATS[fmt]()
    if fmt is not None and not isinstance(fmt, Format):
        raise TypeError(f"{function}: format is {fmt!r}, expected a format such as tersor.Int8Dynamic(), its name, or None")
    if fmt is not None:
        try:
            fmt.stored().constants()
        except ValueError:
            raise ValueError(f"{function}: {fmt!r} needs numbers of its own for each layer; swap with quantize_ first") from None
    return fmt


def parse_options(options: Mapping[str, Any] | None) -> Options:
    """Raises ValueError / TypeError on what is none of them."""
    given = dict(options or {})
    known = [field.name for field in dataclasses.fields(Options)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"tersor backend: options has {', '.join(map(repr, unknown))}, expected some of: {', '.join(known)}")
    parsed = Options(**given)
    if parsed.inner not in INNER:
        raise ValueError(f"tersor backend: inner is {parsed.inner!r}, expected one of: {', '.join(INNER)}")
    check_names("tersor backend", parsed.disable)
    return dataclasses.replace(parsed, format=check_format("tersor backend", parsed.format))


def backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The dynamo backend "tersor": fuses the graph around our ops and returns what runs it.

    Inference only: a graph compiled while gradients are needed is left as it is, with a line in the report and in the log. Results
    derived from weights (joined tiles, quantised float weights) are kept beside them, and made anew when a weight is replaced or
    written to; a write through `.data` is not seen.
    """
    chosen = parse_options(options)
    report = FusionReport(f"graph of {len(module.graph.nodes)} nodes")
    reports.append(report)
    if _needs_gradients(example_inputs):
        report.leave("all", "graph", "gradients are needed: call the model under torch.no_grad() or torch.inference_mode()")
        run = _compile_inner(module, example_inputs, chosen)
    else:
        run = _fused(module, example_inputs, chosen, report)
    report.log()
    if report.left and report.left[0].pattern == "all":
        logger.warning("tersor: nothing is fused: %s", report.left[0].reason)
    if chosen.verbose:
        from rich.console import Console

        Console(stderr=True).print(report.table())
    return run


def _needs_gradients(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)


def _is_stored(node: fx.Node) -> bool:
    """Whether dynamo says that the placeholder is a parameter or buffer of a module."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def _own_copy(module: fx.GraphModule) -> fx.GraphModule:
    """dynamo reads its graph again after the backend has run."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, values)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node].type = None  # the annotations name types that the copy does not import
    graph.output(result)
    return fx.GraphModule(module, graph)


def _fused(module: fx.GraphModule, example_inputs: Sequence[Any], chosen: Options, report: FusionReport) -> Callable[..., Any]:
    module = _own_copy(module)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    edit = run_patterns(
        module,
        [node for node in inputs if _is_stored(node)],
        report,
        fmt=chosen.format,
        disable=chosen.disable,
        reference=chosen.reference,
    )
    prologue, sources = hoist(edit)
    position = {node: i for i, node in enumerate(inputs)}
    read = [position[node] for node in sources]
    # Weights that only the prologue reads are no inputs of what is left.
    kept = [i for i, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            module.graph.erase_node(node)
    # inductor plans the memory of what it compiles itself
    buffers = plan_buffers(edit) if chosen.inner == "eager" and "buffers" not in chosen.disable else no_buffers
    module.graph.lint()
    module.recompile()
    examples = [example_inputs[i] for i in kept]
    values = StoredValues(prologue) if prologue is not None else lambda tensors: ()
    if chosen.inner != "eager" and prologue is not None:
        examples += _examples(prologue, [example_inputs[i] for i in read])
    inner = _compile_inner(module, examples, chosen)
    for part in (module, prologue):
        if part is not None:
            _forget_meta(part.graph)
    pick_kept, pick_read = _picker(kept), _picker(read)

    def run_fused(*args: Any) -> Any:
        return inner(*pick_kept(args), *values(pick_read(args)), *buffers())

    run_fused.code = module.code  # type: ignore[attr-defined]
    return run_fused


def _forget_meta(graph: fx.Graph) -> None:
    """Drops fake values and stack traces, which nothing reads after compilation: megabytes, for as long as the model lives."""
    for node in graph.nodes:
        node.meta.clear()


def code_of(run: Callable[..., Any]) -> str:
    """The Python code of the fused graph behind what the backend returned, without the work on weights."""
    return run.code  # type: ignore[attr-defined]


def _picker(positions: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(positions) < 2:
        return lambda args: tuple(args[i] for i in positions)
    return itemgetter(*positions)


def _examples(prologue: Callable[..., Any], tensors: list[Any]) -> list[Tensor]:
    return list(computed(prologue, tensors))


def _compile_inner(module: fx.GraphModule, examples: Sequence[Any], chosen: Options) -> Callable[..., Any]:
    if chosen.inner == "eager":
        return module.forward
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(module, list(examples))
    return compiled
