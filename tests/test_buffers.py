"""Intermediate results of a compiled graph in one arena: when there is a plan, that it holds, and where there must be none."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from cases import Case, assert_equal
from test_fusion_backend import K, compiled, model
from torch import Tensor, nn

import tersor
from tersor import Int8Dynamic, QuantLinear, fusion, ops
from tersor.graph_passes import memory


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch._dynamo.reset()
    fusion.reports.clear()


def layer(n: int = K, k: int = K) -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(k, n), Int8Dynamic())


class Two(nn.Module):
    """The first layer's result lives until the second is done; `tail` makes the result of the whole."""

    def __init__(self, tail=lambda y, z: y + z) -> None:
        super().__init__()
        self.a, self.b, self.tail = layer(), layer(), tail

    def forward(self, x: Tensor) -> object:
        y = self.a(x)
        return self.tail(y, self.b(y.sin()))


class AutocastWithin(Two):
    """Enters and leaves autocast as it runs: in the graph those are calls between the others."""

    def forward(self, x: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@torch.no_grad()
def test_a_planned_graph_gives_the_same_bits_and_keeps_its_results():
    net, x = model(), torch.randn(2, 7, K)
    want = compiled(net, disable=["buffers"])(x)
    assert fusion.reports[-1].count("buffers") == 0
    torch._dynamo.reset()
    run = compiled(net)
    first = run(x)
    assert fusion.reports[-1].count("buffers") >= 8
    assert_equal(first, want)
    kept = first.clone()
    other = run(torch.randn(2, 7, K))
    assert_equal(first, kept)  # not overwritten by the next call
    assert not torch.equal(other, kept)
    assert_equal(run(x), want)


@torch.no_grad()
def test_what_lives_at_a_time_does_not_overlap():
    slots = [memory.Slot((n,), torch.uint8, first, last) for n, first, last in
             ((100, 0, 2), (64, 1, 1), (640, 1, 4), (100, 2, 3), (1, 3, 9), (70, 4, 9), (640, 5, 9), (0, 0, 9))]  # fmt: skip
    offsets = memory._offsets(slots)
    for i, (a, at) in enumerate(zip(slots, offsets, strict=True)):
        assert at % memory.ALIGNMENT == 0
        for b, bt in list(zip(slots, offsets, strict=True))[:i]:
            apart = at + a.size <= bt or bt + b.size <= at
            assert apart or a.last < b.first or b.last < a.first
    buffers = memory.Buffers(slots, offsets)
    assert buffers.size < sum(slot.size for slot in slots)  # some place is used twice
    assert [tuple(t.shape) for t in buffers()] == [slot.shape for slot in slots]


@torch.no_grad()
@pytest.mark.parametrize(
    ("tail", "planned"),
    [
        (lambda y, z: y + z, 2),
        (lambda y, z: z, 1),  # the caller gets z
        (lambda y, z: z.view(-1), 1),
        (lambda y, z: (y + 1, z.transpose(0, 1)[:1]), 1),
        (lambda y, z: (y.view(-1), z.exp()), 1),
        (lambda y, z: (y, z), 0),
    ],
)
def test_what_the_caller_gets_is_no_buffer(tail, planned: int):
    net, x = Two(tail).eval(), torch.randn(6, K)
    run = compiled(net, disable=["activation", "residual"])
    want, got = net(x), run(x)
    assert fusion.reports[-1].count("buffers") == planned
    run(torch.randn(6, K))
    for g, w in zip(*(t if isinstance(t, tuple) else (t,) for t in (got, want)), strict=True):
        assert_equal(g, w)


class Embedded(nn.Module):
    """The start of a transformer: `embed` makes the layer's rows of token ids."""

    def __init__(self, embed, max_norm: float | None = None) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, K, padding_idx=0, max_norm=max_norm), nn.Embedding(7, K)
        self.layer, self.embed = layer(), embed

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embed(self, ids)).exp()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("embed", "planned"),
    [
        (lambda m, ids: m.words(ids) + m.places(torch.arange(7)[None]), 4),
        (lambda m, ids: torch.add(m.words(ids), m.places(torch.arange(7)), alpha=2), 3),  # the sum stays torch's
        (lambda m, ids: m.words(ids) + 1, 2),
        (lambda m, ids: (m.words(ids).double() + m.places.weight).float(), 3),  # dtypes differ: a sum in float64
        (lambda m, ids: (m.words(ids).mT + m.places(torch.arange(7)).mT).mT, 3),  # a sum that is not contiguous
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embeddings_and_sums_are_planned(embed, planned: int, dtype: torch.dtype):
    net, ids = Embedded(embed).eval(), torch.randint(50, (3, 7), dtype=dtype)
    run = compiled(net, disable=["activation"])
    assert_equal(run(ids), net(ids))
    assert fusion.reports[-1].count("buffers") == planned
    assert_equal(run(ids.flip(0)), net(ids.flip(0)))
    with pytest.raises(IndexError, match="out of range"):
        run(ids + 50)


@torch.no_grad()
def test_an_embedding_that_rescales_its_weight_is_left():
    net, ids = Embedded(lambda m, ids: m.words(ids), max_norm=0.5).eval(), torch.randint(1, 50, (3, 7))
    want = net(ids)
    assert_equal(compiled(net)(ids), want)
    assert fusion.reports[-1].reasons("buffers") == ["the graph writes to a tensor"]


@torch.no_grad()
def test_a_view_keeps_its_memory():
    """y is read for the last time through a view, after a node that could have taken its place."""

    def tail(y: Tensor, z: Tensor) -> Tensor:
        view = y.view(3, 2, K).transpose(0, 1)
        return view.flatten(0, 1) * 2 + z

    net, x = Two(tail).eval(), torch.randn(6, K)
    assert_equal(compiled(net)(x), net(x))


@torch.no_grad()
def test_threads_have_an_arena_each():
    net = model().eval()
    xs = [torch.randn(2, 7, K) for _ in range(4)]
    run = compiled(net)
    wants = [run(x) for x in xs]
    wrong: list[int] = []

    @torch.no_grad()
    def work(i: int) -> None:
        for _ in range(60):
            if not torch.equal(run(xs[i]), wants[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@torch.no_grad()
def test_graphs_of_a_thread_share_an_arena_and_it_goes_with_them():
    nets = [Two().eval() for _ in range(2)]
    runs = [compiled(net) for net in nets]
    x = torch.randn(40, K)
    wants = [run(x) for run in runs]
    arena = memory._arenas.ref()
    assert arena is not None and arena is memory.Arena.of(1)
    for run, want in zip(runs, wants, strict=True):
        assert_equal(run(x), want)
    gone = weakref.ref(arena)
    del arena, runs, run
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("then", [torch.no_grad, torch.inference_mode])
def test_modes_may_change_between_calls(mode, then):
    net, x = Two().eval(), torch.randn(6, K)
    run = compiled(net)
    with mode():
        first = run(x)
    with then():
        assert_equal(run(x), first)


@torch.no_grad()
def test_where_there_is_no_plan():
    net, x = Two().eval(), torch.randn(6, K)
    assert_equal(compiled(net, dynamic=True)(x), net(x))
    assert "sizes that may change" in fusion.reports[-1].reasons("buffers")[0]

    def writing(y: Tensor, z: Tensor) -> Tensor:
        return y.add_(z)

    net = Two(writing).eval()
    assert_equal(compiled(net)(x), net(x))
    assert fusion.reports[-1].reasons("buffers") == ["the graph writes to a tensor"]
    torch._dynamo.reset()
    net = Two().eval()
    with torch.autocast("cpu", torch.bfloat16):
        want = net(x)
        assert_equal(compiled(net, disable=["residual"])(x), want)
    assert fusion.reports[-1].count("buffers") == 0
    torch._dynamo.reset()
    net = AutocastWithin().eval()
    assert_equal(compiled(net, disable=["residual"])(x), net(x))
    assert fusion.reports[-1].reasons("buffers") == ["autocast decides on dtypes as the graph runs"]
    assert not torch.is_autocast_enabled("cpu")
    # A fused module is a graph to export: nothing in it writes.
    assert ".out" not in tersor.fuse(Two().eval(), x, reference=True).code


def test_gradients_have_no_plan():
    net, x = Two().eval(), torch.randn(6, K, requires_grad=True)
    compiled(net)(x).sum().backward()
    assert x.grad is not None and fusion.reports[-1].count("buffers") == 0


def calls() -> dict[str, tuple]:
    x, tiles, scale, bias = Case(5, 32, 40).make()
    rows = ops.quantize_rows(x)
    residual = torch.randn(5, 32)
    stored = (tiles, scale, bias)
    weight = torch.randn(40)
    return {
        "quantize_rows": (x,),
        "linear_dynamic": (x, *stored, "gelu", 8, residual),
        "linear_s8": (*rows, *stored, "relu", torch.bfloat16, 8, residual.bfloat16()),
        "linear_dynamic_quantize": (x, *stored, "gelu"),
        "linear_s8_quantize": (*rows, *stored, "none", torch.float16),
        "linear_glu": (x, *stored, "silu"),
        "linear_glu_s8": (*rows, *stored, "silu", torch.float32),
        "linear_glu_quantize": (x, *stored, "silu"),
        "linear_glu_s8_quantize": (*rows, *stored, "gelu", torch.float16),
        "norm_quantize": (x, None, weight, weight, 1e-5, "layer", True, False),
    }


def test_every_out_overload_is_called_here():
    assert set(calls()) == {op.name for op in ops.OPS.values() if op.out is not None}


@torch.no_grad()
@pytest.mark.parametrize("name", calls())
def test_out_overloads(name: str):
    args = calls()[name]
    op = ops.OPS[name]
    made = op(*args)
    want = (made,) if isinstance(made, Tensor) else made
    outs = {f"out{i}": torch.full_like(t, 7) for i, t in enumerate(want)}
    assert op.out(*args, **outs) is None
    for got, w in zip(outs.values(), want, strict=True):
        assert_equal(got, w)
    first = outs["out0"]
    wrong = [first[:-1], first.double(), first.repeat(1, 2)[:, ::2]]
    if ops.NATIVE:
        for t in wrong:
            with pytest.raises((RuntimeError, ValueError), match="out0 must be contiguous"):
                op.out(*args, **(outs | {"out0": t}))
    for got, w in zip(op(*args) if isinstance(made, tuple) else (op(*args),), want, strict=True):
        assert_equal(got, w)  # a refused call leaves nothing behind


@torch.no_grad()
def test_a_layer_that_one_layer_reads_gives_rows():
    net = nn.Sequential(layer(96), nn.GELU(), layer(K, 96)).eval()
    x = torch.randn(70, K)
    run = compiled(net)
    assert (run(x) - net(x)).abs().max() <= 3 * 4 / 127 / 8  # ties, as in test_fusion.py
    assert fusion.reports[-1].count("layer_rows") == 1


@torch.no_grad()
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(y := m.a(x)) + y,  # used elsewhere
        lambda m, x: m.b(m.a(x) + x),  # adds a residual
        lambda m, x: m.b(m.a(x).exp()),  # something in between
        lambda m, x: m.c(m.a(x)),  # a float layer reads it
    ],
)
def test_layers_that_do_not_give_rows(forward):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = layer(), layer(), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    net, x = Net().eval(), torch.randn(9, K)
    assert (compiled(net)(x) - net(x)).abs().max() <= 1e-4
    assert fusion.reports[-1].count("layer_rows") == 0


@torch.no_grad()
@pytest.mark.parametrize("case", [Case(m, 24, 67) for m in (0, 1, 5, 64, 65, 200)] + [Case(3, 1540, 40, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("epilogue", ops.EPILOGUES)
def test_layers_to_rows_are_the_layer_then_its_rows(case: Case, epilogue: str):
    x, tiles, scale, bias = case.make()
    want = ops.quantize_rows(ops.linear_dynamic(x, tiles, scale, bias, epilogue))
    rows = ops.quantize_rows(x)
    for got in (
        ops.linear_dynamic_quantize(x, tiles, scale, bias, epilogue),
        ops.linear_s8_quantize(*rows, tiles, scale, bias, epilogue, case.dtype),
    ):
        for g, w in zip(got, want, strict=True):
            assert_equal(g, w)
    reference = ops.linear_dynamic_quantize.reference(x, tiles, scale, bias, epilogue)
    difference = (reference[0].int() - want[0].int()).abs()
    assert not difference.numel() or int(difference.max()) <= (epilogue not in ("none", "relu"))
