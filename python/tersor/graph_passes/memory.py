"""The last step of the backend: intermediate results of our ops, of sums and of embeddings live in one arena, at places that follow
from how long each lives.

    node      q, scale = norm_quantize(x)    y = linear_s8(q, scale)    z = linear_s8(..., residual=y)     return z.sum()
    arena     [ q ][ s ][ y           ]      [ z        ]  over q and s, which nothing reads any more

torch allocates and frees each intermediate instead, and what the C library's heap makes of the holes differs from run to run: on
MiniLM it held five times what lives at a time.
"""

from __future__ import annotations

import math
import operator
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..ops import OPS
from .editor import FOLDED, Editor
from .vocabulary import read

ALIGNMENT = 64  # of each tensor in the arena: a cache line
AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)  # what dynamo makes of a `with`
WITH_OUT = {op.raw: op.out for op in OPS.values() if op.out is not None}
_arenas = threading.local()


class Arena:
    """Memory of one thread, shared by its graphs: none is in the middle of another. It goes with the last plan that uses it."""

    def __init__(self, size: int) -> None:
        with torch.inference_mode(False):  # or nothing outside of inference mode could write to it
            self.memory = torch.empty(size, dtype=torch.uint8)

    @classmethod
    def of(cls, size: int) -> Arena:
        """This thread's, of at least `size` bytes."""
        known = getattr(_arenas, "ref", lambda: None)()
        if known is None or known.memory.numel() < size:
            known = cls(size)
            _arenas.ref = weakref.ref(known)
        return known


@dataclass(frozen=True)
class Slot:
    """A result in the arena; it is written at `first` and last read at `last`, positions in the graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int
    last: float

    @property
    def size(self) -> int:
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Buffers:
    """Calling it gives this thread's tensors for the slots."""

    def __init__(self, slots: list[Slot], offsets: list[int]) -> None:
        self.slots, self.offsets = slots, offsets
        self.size = max((at + slot.size for at, slot in zip(offsets, slots, strict=True)), default=0)
        self._local = threading.local()

    def __call__(self) -> tuple[Tensor, ...]:
        known: tuple[Arena, tuple[Tensor, ...]] | None = getattr(self._local, "known", None)
        if known is not None:
            return known[1]
        arena = Arena.of(self.size)
        with torch.inference_mode(False):
            views = tuple(self._view(arena.memory, at, slot) for at, slot in zip(self.offsets, self.slots, strict=True))
        self._local.known = arena, views
        return views

    @staticmethod
    def _view(memory: Tensor, at: int, slot: Slot) -> Tensor:
        count = math.prod(slot.shape) * slot.dtype.itemsize
        return memory[at : at + count].view(slot.dtype).view(slot.shape)


def no_buffers() -> tuple[Tensor, ...]:
    return ()


def plan_buffers(edit: Editor) -> Callable[[], tuple[Tensor, ...]]:
    """Turns calls whose results stay within the graph into calls that write them to placeholders after the graph's own. Returns
    what gives their tensors. Sizes must be plain numbers, devices the CPU, and nothing may be written to."""
    found = _results(edit)
    if isinstance(found, str):
        edit.report.leave("buffers", "graph", found)
        return no_buffers
    slots = [slot for _, group in found for slot in group]
    buffers = Buffers(slots, _offsets(slots))
    placeholders = [node for node in edit.graph.nodes if node.op == "placeholder"]
    at = placeholders[-1] if placeholders else edit.graph._root
    for node, group in found:
        outs = []
        for i, _ in enumerate(group):
            with edit.graph.inserting_after(at):
                at = edit.graph.placeholder(f"{node.name}_buffer{i}")
            outs.append(at)
        with edit.graph.inserting_before(node):
            _write(edit.graph, node, outs)
        if isinstance(node.meta["val"], Tensor):
            node.replace_all_uses_with(outs[0])
        else:
            for user in list(node.users):
                user.replace_all_uses_with(outs[user.args[1]])  # type: ignore[index]
                edit.graph.erase_node(user)
        edit.graph.erase_node(node)
        edit.report.did("buffers", node.name)
    return buffers


def _writes_out(node: fx.Node, value: Any) -> bool:
    """Whether _write knows the call. torch's own compute the same bits either way; out must have the result's dtype and strides."""
    if node.target in WITH_OUT:
        return FOLDED not in node.meta
    call = read(node)
    if call is None or not isinstance(value, Tensor) or not value.is_contiguous():
        return False
    if call.kind == "add":
        operands = [call.args["input"], call.args["other"]]
        return call.args["alpha"] == 1 and all(isinstance(x, fx.Node) for x in operands)
    return call.kind == "embedding"  # with a max_norm it is a write to the weight, and there is no plan


def _write(graph: fx.Graph, node: fx.Node, outs: list[fx.Node]) -> None:
    if node.target in WITH_OUT:
        graph.call_function(WITH_OUT[node.target], node.args, {**node.kwargs, **{f"out{i}": out for i, out in enumerate(outs)}})
        return
    call = read(node)
    assert call is not None  # as _writes_out saw
    args, out = call.args, outs[0]
    if call.kind == "add":
        graph.call_function(torch.add, (args["input"], args["other"]), {"out": out})
    else:  # what torch.embedding calls
        ids = graph.call_function(torch.reshape, (args["input"], (-1,)))
        rows = graph.call_function(torch.reshape, (out, (-1, node.meta["val"].shape[-1])))
        graph.call_function(torch.index_select, (args["weight"], 0, ids), {"out": rows})


def _results(edit: Editor) -> list[tuple[fx.Node, list[Slot]]] | str:
    """Nodes to be planned with the slot of each result, or why there is no plan."""
    if edit.writes:
        return "the graph writes to a tensor"
    nodes = list(edit.graph.nodes)
    if torch.is_autocast_enabled("cpu") or any(node.target in AUTOCAST for node in nodes):
        return "autocast decides on dtypes as the graph runs"
    values = _values(edit, nodes)
    if values is None:
        return "there are sizes that may change, or values that are no plain tensors of the CPU"
    position = {node: i for i, node in enumerate(nodes)}
    last: dict[int, float] = {}  # storage -> where it, or a view of it, is last read; results of the graph are never let go
    for node in nodes:
        for memory in _memories(values.get(node)):
            readers = [math.inf if user.op == "output" else position[user] for user in node.users]
            last[memory] = max([last.get(memory, 0), position[node], *readers])
    found = []
    for node in nodes:
        if not _writes_out(node, values.get(node)):
            continue
        value = values[node]
        tensors = (value,) if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor) and any(user.target is not operator.getitem for user in node.users):
            continue
        ends = [last[memory] for memory in _memories(value)]
        if math.inf in ends:
            continue
        found.append((node, [Slot(tuple(t.shape), t.dtype, position[node], end) for t, end in zip(tensors, ends, strict=True)]))
    return found


def _values(edit: Editor, nodes: list[fx.Node]) -> dict[fx.Node, Any] | None:
    """What each node gives, worked out anew: views share storage with what the graph now reads, not with what it once did."""
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "output":
            continue
        if node.op in ("placeholder", "get_attr"):
            values[node] = node.meta.get("val")
        elif node.op in ("call_function", "call_method"):
            try:
                values[node] = edit.propagate(node.target, node.args, node.kwargs, values)
            except Exception:  # whatever an op that is not ours may raise on fakes
                return None
        else:
            return None
        for t in torch.utils._pytree.tree_leaves(values[node]):
            if isinstance(t, Tensor) and (type(t) is not FakeTensor or t.device.type != "cpu" or t.layout is not torch.strided):
                return None
            if isinstance(t, torch.SymInt | torch.SymFloat) or (isinstance(t, Tensor) and any(type(s) is not int for s in t.shape)):
                return None
    return values


def _memories(value: Any) -> list[int]:
    return [t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _offsets(slots: list[Slot]) -> list[int]:
    """Places in the arena: the largest first, each at the lowest one where nothing lies that lives at the same time."""
    offsets = [0] * len(slots)
    placed: list[int] = []
    for i in sorted(range(len(slots)), key=lambda i: -slots[i].size):
        at = 0
        for j in sorted(placed, key=offsets.__getitem__):
            if slots[j].first <= slots[i].last and slots[i].first <= slots[j].last and at + slots[i].size > offsets[j]:
                at = max(at, offsets[j] + slots[j].size)
        offsets[i] = at
        placed.append(i)
    return offsets
