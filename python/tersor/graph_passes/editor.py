"""Reading and changing one graph: values of nodes, which of them are stored tensors, where things may move, and insertion."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import native, ops
from .report import FusionReport
from .vocabulary import Call, kind_of, mutates, read

# node.meta key of nodes that depend on stored tensors alone and were made by a pass: they are computed once, not at every call.
FOLDED = "tersor_folded"


class Editor:
    """A graph under change. Nodes carry their fake value in meta["val"], whichever dialect they came in.

    stored  placeholders or get_attr nodes of parameters and buffers that nothing in the graph writes to
    """

    def __init__(self, module: fx.GraphModule, stored: Iterable[fx.Node], report: FusionReport, reference: bool = False) -> None:
        self.module, self.graph, self.report = module, module.graph, report
        self.reference = reference
        for node in self.graph.nodes:
            if "val" not in node.meta and "example_value" in node.meta:
                node.meta["val"] = node.meta["example_value"]
        self._at: fx.Node | None = None
        self.fake_mode = next((m for m in map(_mode_of, self.graph.nodes) if m is not None), None)
        self.renumber()
        stored = set(stored)
        written = {_memory(source) for node in self.graph.nodes if mutates(node) for source in node.all_input_nodes}
        self.stored_nodes = {node for node in stored if _memory(node) not in written}
        heads = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node in [node for node in self.graph.nodes if node.op == "get_attr"]:
            (heads[-1] if heads else next(iter(self.graph.nodes))).append(node)
            heads.append(node)
        self._tail = heads[-1] if heads else self.graph._root

    # ---- facts

    def renumber(self) -> None:
        """Positions and epochs, after nodes were inserted or erased. An epoch ends with each node that may write to a tensor."""
        self.position: dict[fx.Node, int] = {}
        self.epoch: dict[fx.Node, int] = {}
        epoch = 0
        for i, node in enumerate(self.graph.nodes):
            write = mutates(node)
            epoch += write
            self.position[node] = i
            self.epoch[node] = epoch
            epoch += write

        self.writes = epoch > 0
        self.results = self.graph.output_node().all_input_nodes

    def same_epoch(self, *nodes: fx.Node) -> bool:
        return len({self.epoch[node] for node in nodes}) == 1

    def escapes(self, node: fx.Node) -> bool:
        """Whether the caller gets this tensor, or a view of it."""
        memory = _memory(node)
        return any(memory == _memory(out) for out in self.results)

    def is_stored(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and (node in self.stored_nodes or FOLDED in node.meta)

    def value(self, node: Any) -> Any:
        return node.meta.get("val") if isinstance(node, fx.Node) else node

    def tensor(self, node: Any) -> Tensor | None:
        value = self.value(node)
        return value if isinstance(value, Tensor) else None

    def features(self, node: Any) -> int | None:
        """The last dim where it is a plain number."""
        value = self.tensor(node)
        size = value.shape[-1] if value is not None and value.dim() else None
        if isinstance(size, torch.SymInt):  # what a guard has settled is a number by now
            size = int(size.node.expr) if size.node.expr.is_number else None
        return size

    def op_runs(self, op: ops.Op) -> str:
        """ "" where the op is no slower than what it would replace, else the reason."""
        if self.reference or not ops.NATIVE:
            return ""  # everything is a reference here
        kernels = (native.cpu_info() or {"kernels": {}})["kernels"]
        missing = [name for name in op.kernels if name not in kernels]
        if missing or not op.kernels:
            return f"tersor::{op.name} has no kernel in this build"
        return ""

    # ---- changes

    @contextlib.contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        outer, self._at = self._at, node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._at = outer

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        stored: bool = False,
        like: fx.Node | None = None,
        value: Any = None,
        **kwargs: Any,
    ) -> fx.Node:
        """A new call at the insertion point. stored: it is to be computed once; value: what it gives, None: worked out on fakes.

        Raises what the op's shape rule raises; the node is then gone again.
        """
        value = self.propagate(target, args, kwargs) if value is None else value
        # Folded calls stand in the order they are made, behind all that is stored: a later layer's may be read by an earlier one's.
        with self.graph.inserting_after(self._tail) if stored else contextlib.nullcontext():
            node = self.graph.call_function(target, args, kwargs)
        if stored:
            self._tail = node
        node.meta["val"] = value
        if self._at is not None:
            self.position[node], self.epoch[node] = self.position[self._at], self.epoch[self._at]
        if like is not None and "stack_trace" in like.meta:
            node.meta["stack_trace"] = like.meta["stack_trace"]
        if stored:
            node.meta[FOLDED] = True
        return node

    def propagate(self, target: Any, args: Any, kwargs: Any, values: dict[fx.Node, Any] | None = None) -> Any:
        """What the call gives for the fake values of its arguments."""

        def look(n: fx.Node) -> Any:
            return values[n] if values and n in values else n.meta["val"]

        args, kwargs = fx.map_arg(args, look), fx.map_arg(kwargs, look)
        with self.fake_mode or contextlib.nullcontext(), torch.no_grad():
            if isinstance(target, str):
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    def fake(self, shape: tuple[int, ...], dtype: torch.dtype, like: fx.Node) -> Tensor:
        """A fake tensor on the device of `like`."""
        with self.fake_mode or contextlib.nullcontext():
            return torch.empty(shape, dtype=dtype, device=like.meta["val"].device)

    def parts(self, node: fx.Node, stored: bool = False) -> list[fx.Node]:
        """The entries of a node that gives a tuple."""
        return [self.call(operator.getitem, node, i, stored=stored) for i in range(len(node.meta["val"]))]

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)

    def clean(self) -> None:
        """Takes out what nothing uses, and counts anew."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("call_function", "call_method", "get_attr") and self._removable(node):
                if node is self._tail:
                    self._tail = node.prev
                self.graph.erase_node(node)
        self.renumber()

    def _removable(self, node: fx.Node) -> bool:
        kind = kind_of(node)
        if node.op == "get_attr" or FOLDED in node.meta or _is_ours(node):
            return True
        return kind is not None and (kind.pure or kind.view)


def is_call(node: Any, *kinds: str) -> Call | None:
    """The node as a call of one of `kinds`, else None."""
    call = read(node)
    return call if call is not None and call.kind in kinds else None


def same_shape(a: Any, b: Any) -> bool:
    """Whether both shapes are known to be equal; asks for no new guard."""
    return len(a) == len(b) and all(x is y or statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def _memory(node: fx.Node) -> int:
    """What two nodes have in common where one is a view of the other: fake tensors share their storage as real ones do."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) and value.layout is torch.strided else id(node)


def _mode_of(node: fx.Node) -> FakeTensorMode | None:
    value = node.meta.get("val")
    return value.fake_mode if isinstance(value, FakeTensor) else None


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tersor"
