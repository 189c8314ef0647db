"""Swapped models as graphs: torch.compile, torch.export, AOTInductor, torch.jit, torch.fx and fake tensors."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ANY_K, GROUPED, assert_equal, assert_within
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import tersor
from tersor import Int8WeightOnly, QuantLinear

BACKENDS = ["eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch._dynamo.reset()


# One of each op, and of linear_dynamic two widths: a graph sees the op and its arguments, not the codes. GROUPED has tests of its own.
GRAPH_FORMATS = [fmt for fmt in ANY_K if not isinstance(fmt, tersor.Ternary | tersor.Binary) or isinstance(fmt, tersor.BinaryXnor)]


@pytest.fixture(params=GRAPH_FORMATS, ids=repr)
def fmt(request):
    return request.param


def mlp(fmt=GRAPH_FORMATS[0]) -> nn.Sequential:
    return tersor.quantize_(nn.Sequential(nn.Linear(70, 37), nn.ReLU(), nn.Linear(37, 20)), fmt).eval()


def encoder_layer(fmt) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    return layer if fmt is None else tersor.quantize_(layer, fmt)


def inputs(*ms: int) -> list[Tensor]:
    return [torch.randn(m, 70) for m in ms]


# ---- torch.compile


@pytest.mark.parametrize("how", ["mark_dynamic", "dynamic=True", "automatic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_once_for_every_m(backend: str, how: str):
    model = mlp()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True if how == "dynamic=True" else None)
    # "automatic": the first M is compiled for itself, the second makes M a symbol
    for i, x in enumerate(inputs(5, 9, 17, 64, 130)):
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 1):
            assert_equal(compiled(x), model(x))
    assert counter.frame_count == (2 if how == "automatic" else 1)
    # 0 and 1 are torch's own special sizes; they may compile again, once
    with torch.no_grad():
        for m in (1, 0):
            (x,) = inputs(m)
            assert_equal(compiled(x), model(x))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for x in inputs(1, 0, 33):
                assert_equal(compiled(x), model(x))


@pytest.mark.parametrize("backend", ["eager", *(pytest.param(b, marks=pytest.mark.slow) for b in ("aot_eager", "inductor"))])
def test_compile_a_transformer_layer(backend: str, fmt):
    counts = []
    for model in (encoder_layer(None), encoder_layer(fmt)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
        for length in (5, 9, 6):
            x = torch.randn(2, length, 32)
            # attention is torch's own and fused differently; what it changes may move a value to the other side of a rounding
            assert_within(compiled(x), model(x), 0.02)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]  # as often as the float layer, whatever torch does with attention


class Adapted(nn.Module):
    """A frozen int8 layer with a trained low-rank adapter beside it."""

    def __init__(self, fmt) -> None:
        super().__init__()
        self.base = QuantLinear.from_linear(nn.Linear(70, 70), fmt).requires_grad_(False)
        self.down, self.up = nn.Linear(70, 4, bias=False), nn.Linear(4, 70, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_step_with_adapters(backend: str, fmt):
    eager = nn.Sequential(Adapted(fmt), nn.ReLU(), Adapted(fmt))
    packed = eager[0].base.weight_packed.clone()
    other = copy.deepcopy(eager)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(other, fullgraph=True, backend=counter, dynamic=True)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (eager, other)]
    for x in inputs(6, 11, 7):
        losses = []
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(model(x).square().mean())
            losses[-1].backward()
            optimizer.step()
        assert_within(losses[1], losses[0].detach(), 1e-4 * losses[0].item())
    assert counter.frame_count == 1
    assert_equal(other[0].base.weight_packed.data, packed)
    # the first adapter learns through the second int8 layer
    assert other[0].up.weight.grad.abs().sum() > 0
    for (name, p), q in zip(eager.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_within(q.grad, p.grad, 1e-3 * p.grad.abs().max().item())


def test_compiled_code_follows_new_weights(fmt):
    """Stored tensors are inputs of the compiled code, not constants in it."""
    model, other = mlp(fmt), mlp(fmt)
    (x,) = inputs(4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    model.load_state_dict(other.state_dict())
    assert not torch.equal(compiled(x), before)
    assert_equal(compiled(x), other(x))


def test_wrong_k_while_compiling(fmt):
    compiled = torch.compile(mlp(fmt), backend="eager")
    with pytest.raises(ValueError, match=r"QuantLinear: x is \[3, 69\], expected \[..., 70\] \(in_features\)"):
        compiled(torch.randn(3, 69))


# ---- fake tensors


def test_fake_tensors(fmt):
    model = mlp(fmt)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(torch.empty(4, 2, 70)))
        made = QuantLinear(70, 37, format=fmt, dtype=torch.bfloat16)
        z = made(torch.empty(3, 70, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match=r"x is \[3, 8\], expected \[..., 70\]"):
            made(torch.empty(3, 8))
        swapped = tersor.quantize_(nn.Sequential(nn.Linear(70, 37)), fmt)
        assert isinstance(swapped[0].weight_packed, FakeTensor) and swapped(torch.empty(2, 70)).shape == (2, 37)
        assert isinstance(swapped[0].dequantize().weight, FakeTensor)
    assert isinstance(y, FakeTensor) and y.shape == (4, 2, 20)
    assert isinstance(z, FakeTensor) and z.shape == (3, 37) and z.dtype == torch.bfloat16


def test_swap_of_a_meta_model(fmt):
    with torch.device("meta"):
        model = tersor.quantize_(nn.Sequential(nn.Linear(70, 37)), fmt)
    assert model[0].weight_packed.is_meta and model(torch.empty(2, 70, device="meta")).shape == (2, 37)


# ---- torch.export


def tersor_calls(program: torch.export.ExportedProgram) -> list[str]:
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [t.removeprefix("tersor.").removesuffix(".default") for t in targets if t.startswith("tersor.")]


def export(model: nn.Module, strict: bool = False, m: int = 4) -> torch.export.ExportedProgram:
    return torch.export.export(model, tuple(inputs(m)), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_export(fmt, strict: bool, grad_mode: bool):
    model = mlp(fmt)
    with torch.set_grad_enabled(grad_mode):
        program = export(model, strict)
    # under no_grad the program holds the raw ops, which run without Python
    assert tersor_calls(program) == [fmt.op.name + ("_differentiable" if grad_mode else "")] * 2
    decomposed = program.run_decompositions()
    assert tersor_calls(decomposed) == tersor_calls(program)  # an op of ours stays one node
    for x in inputs(1, 2, 9, 130, 0):
        assert_equal(program.module()(x), model(x))
        assert_equal(decomposed.module()(x), model(x))
    with pytest.raises((RuntimeError, AssertionError), match="70"):
        program.module()(torch.randn(3, 69))


def test_export_a_transformer_layer(fmt):
    model = encoder_layer(fmt)
    x = torch.randn(2, 5, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},))
    for shape in ((2, 5, 32), (3, 9, 32)):
        x = torch.randn(shape)
        assert_within(program.module()(x), model(x), 0.02)


def fresh_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter, outside the repository, with the package that these tests run on."""
    where = str(Path(tersor.__file__).parent.parent)
    path = os.pathsep.join([where, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )


# Loads each file of the folder and compares its results with the saved ones. The import is the caller's.
LOAD = """
import sys
import torch
{imports}
folder = sys.argv[1]
xs, want = torch.load(folder + "/want.pt")
loaders = {{
    "export": lambda: torch.export.load(folder + "/export.pt2").module(),
    "with_gradients": lambda: torch.export.load(folder + "/with_gradients.pt2").module(),
    "trace": lambda: torch.jit.load(folder + "/trace.pt"),
    "aoti": lambda: torch._inductor.aoti_load_package(folder + "/aoti.pt2"),
}}
for name in sys.argv[2:]:
    try:
        model = loaders[name]()
    except RuntimeError as error:
        print(name, "refused:", str(error).strip().splitlines()[0])
        continue
    print(name, "equal" if all(torch.equal(model(x), y) for x, y in zip(xs, want, strict=True)) else "differs")
"""


def save_answers(model: nn.Module, folder: Path) -> None:
    xs = inputs(1, 2, 9, 40)
    torch.save((xs, [model(x).detach() for x in xs]), folder / "want.pt")


def test_load_in_a_fresh_process(tmp_path):
    model = mlp()
    model[2] = QuantLinear.from_linear(nn.Linear(37, 20), Int8WeightOnly())
    save_answers(model, tmp_path)
    torch.export.save(export(model), tmp_path / "with_gradients.pt2")
    with torch.no_grad():
        torch.export.save(export(model), tmp_path / "export.pt2")
        torch.jit.trace(model, inputs(4)[0]).save(tmp_path / "trace.pt")
    names = ("export", "with_gradients", "trace")
    done = fresh_process(LOAD.format(imports="import tersor.ops"), tmp_path, *names)
    assert done.stdout.splitlines() == ["export equal", "with_gradients equal", "trace equal"], done.stderr
    # Without the ops torch refuses the files, and says which op it misses. `import tersor` alone does no work.
    done = fresh_process(LOAD.format(imports="import tersor"), tmp_path, *names)
    refusals = done.stdout.splitlines()
    assert [line.split(":")[0] for line in refusals] == [f"{name} refused" for name in names], done.stderr
    assert "Unknown builtin op: tersor::linear_dynamic" in refusals[2]
    assert "We failed to resolve torch.ops.tersor.linear_dynamic.default to an operator" in done.stderr
    assert "Please import the custom op to register it before deserializing" in done.stderr


# ---- AOTInductor


@pytest.mark.slow
@pytest.mark.native  # g++ is at hand where the package was built
def test_aot_inductor_in_a_fresh_process(tmp_path):
    model = QuantLinear.from_linear(nn.Linear(70, 37)).eval()
    save_answers(model, tmp_path)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(export(model), package_path=str(tmp_path / "aoti.pt2"))
    done = fresh_process(LOAD.format(imports="import tersor.ops"), tmp_path, "aoti")
    assert done.stdout.splitlines() == ["aoti equal"], done.stderr
    done = fresh_process(LOAD.format(imports=""), tmp_path, "aoti")
    assert done.stdout.splitlines() == ["aoti refused: Could not find schema for tersor::linear_dynamic."], done.stderr


# ---- torch.jit


def test_jit_trace(fmt):
    model = mlp(fmt)
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs(4)[0])
    for x in inputs(1, 4, 9, 0):
        assert_equal(traced(x), model(x))
        assert_equal(torch.jit.freeze(traced)(x), model(x))
    message = (
        rf"{fmt.op.name}: torch.jit.trace cannot record gradients of this op; trace under torch.no_grad\(\), or use torch.export"
    )
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(model, inputs(4)[0])
    # nothing needs a gradient: nothing to lose
    assert_equal(torch.jit.trace(model.requires_grad_(False), inputs(4)[0])(x), model(x))


def test_jit_script_names_the_way_out(fmt):
    message = "QuantLinear: torch.jit.script is not supported; use torch.export or torch.compile, or torch.jit.trace under no_grad"
    for model in (mlp(fmt), mlp(fmt)[0]):
        with pytest.raises(TypeError, match=message):
            torch.jit.script(model)


# ---- torch.fx


def test_fx_records_a_layer_as_one_node(fmt):
    model = mlp(fmt)
    graph = torch.fx.symbolic_trace(model)
    assert [(node.op, node.target) for node in graph.graph.nodes][1:-1] == [("call_module", name) for name in "012"]
    (x,) = inputs(5)
    for module in (graph, copy.deepcopy(graph), copy.deepcopy(copy.deepcopy(graph)), pickle.loads(pickle.dumps(graph))):
        assert isinstance(module.get_submodule("0"), QuantLinear)
        assert_equal(module(x), model(x))
    with pytest.raises(ValueError, match=r"QuantLinear: x is \[5, 69\]"):
        graph(x[:, :69])
    # a trace before the swap gives the same
    floats = nn.Sequential(nn.Linear(70, 37), nn.ReLU(), nn.Linear(37, 20)).eval()
    late = tersor.quantize_(torch.fx.symbolic_trace(copy.deepcopy(floats)), fmt)
    assert_equal(late(x), tersor.quantize_(floats, fmt)(x))


def test_fx_with_the_layer_as_root(fmt):
    layer = mlp(fmt)[0]
    graph = torch.fx.symbolic_trace(layer)
    leaf = torch.randn(5, 70, requires_grad=True)
    assert_equal(copy.deepcopy(graph)(leaf), layer(leaf))
    graph(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"QuantLinear: x is \[5, 69\]"):  # the tiles of 69 and 70 are the same
        graph(torch.randn(5, 69))


class CallsTheOp(nn.Module):
    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return layer.format.linear(x, layer._parameters, layer._buffers, layer.bias)


def test_fx_of_an_op_keeps_gradients(fmt):
    model = CallsTheOp(mlp(fmt)[0].requires_grad_(False))
    graph = torch.fx.symbolic_trace(model)
    leaf = torch.randn(5, 70, requires_grad=True)
    y = graph(leaf)
    assert_equal(y, model(leaf))
    y.sum().backward()
    assert leaf.grad.abs().sum() > 0


def test_make_fx(fmt):
    from torch.fx.experimental.proxy_tensor import make_fx

    model = mlp(fmt)
    with torch.no_grad():
        graph = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(inputs(4)[0])
    for x in inputs(3, 8):
        assert_equal(graph(x), model(x))
    assert sum(node.target is fmt.op.raw for node in graph.graph.nodes) == 2


# ---- a layer with group scales


def test_graphs_of_groups():
    model = tersor.quantize_(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 20)), GROUPED).eval()
    x = torch.randn(5, 96)
    for backend in BACKENDS:
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
        for m in (5, 9):
            assert_equal(compiled(torch.randn(m, 96, generator=torch.Generator().manual_seed(m))),
                         model(torch.randn(m, 96, generator=torch.Generator().manual_seed(m))))  # fmt: skip
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(leaf).sum().backward()
        model(other).sum().backward()
        assert_within(leaf.grad, other.grad, 1e-5 * other.grad.abs().max().item())
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert tersor_calls(program) == ["linear_grouped"] * 2
        assert_equal(program.module()(x), model(x))
        assert_equal(torch.jit.trace(model, x)(x), model(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert QuantLinear(96, 37, format=GROUPED)(torch.empty(4, 96)).shape == (4, 37)
