"""Each pattern of the graph pass: that it fires, that its result is that of the ops it replaces, and where it must not fire.

Every case runs twice: captured by torch.export (tersor.fuse) and by dynamo (the backend "tersor"). Int8 rows decide what a layer
gives, so a fused graph is equal bit for bit unless an epilogue (class E) or a norm (class F) rounds elsewhere; `bound` says how far,
in steps of the output's own quantisation where a tie may fall the other way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import assert_equal, assert_within
from torch import Tensor, nn

import tersor
from tersor import Int8Dynamic, Int8WeightOnly, QuantLinear, fusion, ops

K, F2 = 64, 96
SHAPE = (2, 5, K)


@pytest.fixture(autouse=True)
def _no_compiled_code_of_other_tests():
    torch._dynamo.reset()
    fusion.reports.clear()


def layer(n: int = K, k: int = K, bias: bool = True, fmt: Any = None) -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(k, n, bias=bias), fmt or Int8Dynamic())


class Net(nn.Module):
    """Modules by name, and forward as a function of (self, x)."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.of = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *xs: Tensor) -> Any:
        return self.of(self, *xs)


def by_export(model: nn.Module, xs: tuple[Tensor, ...], **options: Any) -> tuple[Any, fusion.FusionReport, str]:
    fused = tersor.fuse(model, xs, reference=True, **options)
    assert isinstance(fused, torch.fx.GraphModule)
    with torch.no_grad():
        return fused(*xs), fused.fusion_report, fused.code


def by_dynamo(model: nn.Module, xs: tuple[Tensor, ...], **options: Any) -> tuple[Any, fusion.FusionReport, str]:
    seen = []

    def spy(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        # buffers, which have a test of their own, would change the names of ops in the code
        disable = [*options.get("disable", ()), "buffers"]
        run = fusion.backend(module, inputs, options={"reference": True, **options, "disable": disable})
        seen.append(fusion.code_of(run))
        return run

    with torch.no_grad():
        result = torch.compile(model, backend=spy, fullgraph=True)(*xs)
    return result, fusion.reports[-1], seen[0]


@pytest.fixture(params=[by_export, by_dynamo], ids=["export", "dynamo"])
def run(request):
    return request.param


def residual(m: Any, x: Tensor, r: Tensor) -> Tensor:
    return r + m.a(x)


def qkv(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p(x).view(2, 5, 4, -1).transpose(1, 2) for p in (m.a, m.b, m.c))
    return F.scaled_dot_product_attention(q, k, v)


def swiglu(m: Any, x: Tensor) -> Tensor:
    return m.c(F.silu(m.a(x)) * m.b(x))


def spelled_rms(m: Any, x: Tensor) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.a(m.norm.weight * h.to(x.dtype))


def pre_norm(m: Any, x: Tensor, r: Tensor) -> Tensor:
    s = x + r
    return s + m.a(m.norm(s))


# Of the class that the pattern's op has. One step of int8 rows is absmax / 127 of a row; where a tie falls to the other side a
# result moves by that step times one weight: rows here have absmax < 4, weights < 1/8 (nn.Linear's 1/sqrt(64)), times 3 ties.
TIES = 3 * 4 / 127 / 8
# Our own gelu and silu: see epilogue_bound in cases.py; |y| < 4.
EPILOGUE = 1e-5


def fires() -> dict[str, tuple[str, Net, int, list[str], float]]:
    """name -> (pattern, model, number of inputs, ops in the fused graph, bound)."""
    norm, rms = nn.LayerNorm(K), nn.RMSNorm(K, eps=1e-6)
    for p in (*norm.parameters(), *rms.parameters()):
        nn.init.normal_(p, 1.0, 0.2)
    a, b, c = layer(), layer(), layer()
    return {
        "gelu": ("activation", Net(lambda m, x: F.gelu(m.a(x)), a=a), 1, ["linear_dynamic"], EPILOGUE),
        "gelu tanh": ("activation", Net(lambda m, x: F.gelu(m.a(x), approximate="tanh"), a=a), 1, ["linear_dynamic"], EPILOGUE),
        "silu": ("activation", Net(lambda m, x: F.silu(m.a(x)), a=a), 1, ["linear_dynamic"], EPILOGUE),
        "relu": ("activation", Net(lambda m, x: torch.relu(m.a(x)), a=a), 1, ["linear_dynamic"], 0.0),
        "relu of weight-only": (
            "activation",
            Net(lambda m, x: m.a(x).relu(), a=layer(fmt=Int8WeightOnly())),
            1,
            ["linear_weight_only"],
            0.0,
        ),
        "residual": ("residual", Net(residual, a=a), 2, ["linear_dynamic"], 0.0),
        "q, k, v": ("together", Net(qkv, a=a, b=b, c=layer(K, bias=False)), 1, ["linear_dynamic"], 0.0),
        "two on one x": (
            "share_rows",
            Net(lambda m, x: (m.a(x), m.b(x)), a=layer(37), b=layer(20)),
            1,
            ["quantize_rows", "linear_s8", "linear_s8"],
            0.0,
        ),
        "swiglu": ("glu", Net(swiglu, a=layer(F2), b=layer(F2), c=layer(K, F2)), 1, ["linear_glu_quantize", "linear_s8"], TIES),
        "layer norm": ("norm", Net(lambda m, x: m.a(m.norm(x)), norm=norm, a=a), 1, ["norm_quantize", "linear_s8"], TIES),
        "rms norm": ("norm", Net(lambda m, x: m.a(m.norm(x)), norm=rms, a=a), 1, ["norm_quantize", "linear_s8"], TIES),
        "rms norm spelled out": ("norm", Net(spelled_rms, norm=rms, a=a), 1, ["norm_quantize", "linear_s8"], TIES),
        "norm of a sum used again": ("norm", Net(pre_norm, norm=norm, a=a), 2, ["norm_quantize", "linear_s8"], TIES),
        "norm used again": (
            "norm",
            Net(lambda m, x: m.a(y := m.norm(x)) * 2.5 - y, norm=norm, a=a),
            1,
            ["norm_quantize", "linear_s8"],
            2.5 * TIES,
        ),
        "norm with q, k, v": (
            "norm",
            Net(lambda m, x: qkv(m, m.norm(x)), norm=rms, a=a, b=b, c=c),
            1,
            ["norm_quantize", "linear_s8"],
            TIES,
        ),
        "norm with swiglu": (
            "norm",
            Net(lambda m, x: swiglu(m, m.norm(x)), norm=rms, a=layer(F2), b=layer(F2), c=layer(K, F2)),
            1,
            ["norm_quantize", "linear_glu_s8_quantize", "linear_s8"],
            2 * TIES,
        ),
        "glu to rows": (
            "glu_rows",
            Net(swiglu, a=layer(F2), b=layer(F2), c=layer(K, F2)),
            1,
            ["linear_glu_quantize", "linear_s8"],
            TIES,
        ),
        "dropout": (
            "remove_identities",
            Net(lambda m, x: m.a(m.drop(x)), a=a, drop=nn.Dropout(0.5)),
            1,
            ["linear_dynamic"],
            0.0,
        ),
        "casts and copies": (
            "remove_identities",
            Net(lambda m, x: m.a((x * 2).to(torch.float32).contiguous()), a=a),
            1,
            ["linear_dynamic"],
            0.0,
        ),
        "transposed twice": (
            "common_subexpressions",
            Net(lambda m, x: m.a((x.transpose(0, 1).exp() + x.transpose(0, 1).cos()).transpose(0, 1)), a=a),
            1,
            ["linear_dynamic"],
            0.0,
        ),
        "times a number": ("fold_scales", Net(lambda m, x: m.a(x) / 8, a=a), 1, ["linear_dynamic"], 1e-6),
    }


FIRES = fires()


@pytest.mark.parametrize("name", FIRES)
def test_fires_with_the_result_of_the_ops_it_replaces(name: str, run):
    pattern, model, n, want_ops, bound = FIRES[name]
    model.eval()
    xs = tuple(torch.randn(SHAPE) for _ in range(n))
    with torch.no_grad():
        want = model(*xs)
    got, report, code = run(model, xs)
    assert report.count(pattern) >= 1, report
    assert ours(code) == want_ops
    if pattern == "norm":
        assert not re.search(r"(layer_norm|rms_norm|rsqrt)(\.default)?\(", code)
    for g, w in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True):
        assert_equal(g, w) if bound == 0 else assert_within(g, w, bound)
    # its switch
    got, report, code = run(model, xs, disable=[pattern])
    assert report.count(pattern) == 0
    for g, w in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True):
        assert_equal(g, w) if bound == 0 else assert_within(g, w, bound)


def ours(code: str) -> list[str]:
    """Names of our ops in the order of the code."""
    return [part.split(".default")[0] for part in code.split("torch.ops.tersor.")[1:]]


def used_elsewhere(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return F.gelu(y) - y


def written_between(m: Any, x: Tensor, r: Tensor) -> Tensor:
    y = m.a(x)
    r.add_(1.0)
    return y + r


def flat_view(m: Any, x: Tensor) -> Tensor:
    return m.a(x).view(-1) * m.b(x).view(-1)


STAYS: dict[str, tuple[str, Net, int, str]] = {
    "value used elsewhere": ("activation", Net(used_elsewhere, a=layer()), 1, "used elsewhere"),
    "relu in place": ("activation", Net(lambda m, x: torch.relu_(m.a(x)), a=layer()), 1, ""),
    "activation of an activation": (
        "activation",
        Net(lambda m, x: F.silu(ops.linear_dynamic(x, m.a.weight_packed, m.a.weight_scale, None, "relu")), a=layer()),
        1,
        "has an activation already",
    ),
    "residual of another shape": ("residual", Net(lambda m, x: m.a(x) + x[:1], a=layer()), 1, "another shape or dtype"),
    "residual of another dtype": ("residual", Net(lambda m, x: m.a(x) + x.double(), a=layer()), 1, "another shape or dtype"),
    "residual used elsewhere": ("residual", Net(lambda m, x: (y := m.a(x)) + x - y, a=layer()), 1, "used elsewhere"),
    "residual written between": ("residual", Net(written_between, a=layer()), 2, "written in place"),
    "residual times alpha": ("residual", Net(lambda m, x: torch.add(x, m.a(x), alpha=2), a=layer()), 1, ""),
    "channels that are no tiles": (
        "together",
        Net(lambda m, x: m.a(x).exp() @ m.b(x).exp().mT, a=layer(20), b=layer(20)),
        1,
        "not whole tiles",
    ),
    "a view in one piece": ("together", Net(flat_view, a=layer(), b=layer()), 1, "in one piece"),
    "the caller gets q": ("together", Net(lambda m, x: (m.a(x), m.b(x)), a=layer(), b=layer()), 1, "the caller gets"),
    "gate used elsewhere": (
        "glu",
        Net(lambda m, x: F.silu(g := m.a(x)) * m.b(x) - g, a=layer(), b=layer()),
        1,
        "used elsewhere",
    ),
    "gate and up on two inputs": (
        "glu",
        Net(lambda m, x: F.silu(m.a(x)) * m.b(x + 1), a=layer(), b=layer()),
        1,
        "different inputs",
    ),
    "glu of odd sizes": ("glu", Net(lambda m, x: F.silu(m.a(x)) * m.b(x), a=layer(40), b=layer(40)), 1, "not whole tiles"),
    "glu read twice": (
        "glu_rows",
        Net(lambda m, x: (g := F.silu(m.a(x)) * m.b(x)) - m.c(g), a=layer(), b=layer(), c=layer()),
        1,
        "not one int8 layer alone",
    ),
    "norm that no layer reads": (
        "norm",
        Net(lambda m, x: m.norm(x).exp() - m.a(x), norm=nn.LayerNorm(K), a=layer()),
        1,
        "no int8 layer",
    ),
    "norm in float64": (
        "norm",
        Net(lambda m, x: m.a(m.norm(x.double()).float()), norm=nn.LayerNorm(K, dtype=torch.float64), a=layer()),
        1,
        "no int8 layer",
    ),
    "norm over two dims": ("norm", Net(lambda m, x: m.a(m.norm(x)), norm=nn.LayerNorm((5, K)), a=layer()), 1, ""),
    "layers on two inputs": ("share_rows", Net(lambda m, x: m.a(x) * m.b(x.exp()), a=layer(37), b=layer(37)), 1, ""),
    "float layers": ("activation", Net(lambda m, x: F.gelu(m.a(x)), a=nn.Linear(K, K)), 1, ""),
    "a scale used elsewhere": ("fold_scales", Net(lambda m, x: (y := m.a(x)) * 3 - y, a=layer()), 1, "used elsewhere"),
    "times a tensor": ("fold_scales", Net(lambda m, x: m.a(x) * x, a=layer()), 1, ""),
}


@pytest.mark.parametrize("name", STAYS)
def test_does_not_fire(name: str, run):
    pattern, model, n, reason = STAYS[name]
    model.eval()
    xs = tuple(torch.randn(SHAPE) for _ in range(n))
    with torch.no_grad():
        want = model(*(x.clone() for x in xs))
    got, report, _ = run(model, tuple(x.clone() for x in xs))
    # "written between" changes its argument: each run of a model gets its own
    assert report.count(pattern) == 0, report
    assert any(reason in said for said in report.reasons(pattern)) or not reason, report.reasons(pattern)
    if name != "residual written between":
        for g, w in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True):
            assert_within(g, w, TIES)


def test_dropout_in_training_mode_stays(run):
    model = Net(lambda m, x: F.dropout(m.a(x), 0.5, training=True), a=layer())
    torch.manual_seed(3)
    got, report, _ = run(model.eval(), (torch.ones(SHAPE),))
    assert "dropout in training mode" in report.reasons("remove_identities")
    assert (got == 0).float().mean() > 0.2


@pytest.mark.parametrize("make", [lambda: layer(48), lambda: nn.Linear(K, 48), lambda: nn.Linear(K, 48, bias=False)])
def test_batch_norm_is_folded(make, run):
    model = nn.Sequential(make(), nn.BatchNorm1d(48)).eval()
    for t in (model[1].running_mean, model[1].weight, model[1].bias):
        nn.init.normal_(t)
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    x = torch.randn(9, K)
    with torch.no_grad():
        want = model(x)
    got, report, code = run(model, (x,))
    assert report.count("fold_scales") == 1 and "batch_norm" not in code
    # two more roundings of the weight or its scale, K products of at most 0.5 each, factors below 6
    assert_within(got, want, 3 * 2.0**-24 * K * 6)


def test_batch_norm_behind_a_convolution(run):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    nn.init.normal_(model[1].weight)
    x = torch.randn(2, 3, 9, 9)
    got, report, code = run(model, (x,))
    assert report.count("fold_scales") == 1 and "batch_norm" not in code
    with torch.no_grad():
        assert_within(got, model(x), 1e-5)


def test_batch_norm_in_training_mode_stays(run):
    model = Net(lambda m, x: F.batch_norm(m.a(x), m.mean, m.var, training=True), a=layer(48))
    model.register_buffer("mean", torch.zeros(48))
    model.register_buffer("var", torch.ones(48))
    _, report, code = run(model.eval(), (torch.randn(9, K),))
    assert report.count("fold_scales") == 0 and "batch_norm" in code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, run):
    model = Net(lambda m, x, r: r + m.c(F.gelu(m.a(m.norm(x)))), norm=nn.LayerNorm(K), a=layer(), c=layer()).eval().to(dtype)
    xs = torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)
    with torch.no_grad():
        want = model(*xs)
    got, report, _ = run(model, xs)
    assert [report.count(name) for name in ("norm", "activation", "residual")] == [1, 1, 1]
    assert got.dtype == dtype
    # one rounding of |y| < 8 to dtype less or more, and ties
    assert_within(got, want, 8 * torch.finfo(dtype).eps + TIES)


def test_patterns_are_documented_and_known_by_name():
    assert all(pattern.doc for pattern in fusion.PATTERNS)
    with pytest.raises(ValueError, match="fuse: disable names 'nrom', expected a list of: remove_identities"):
        tersor.fuse(nn.Sequential(layer()).eval(), torch.zeros(1, K), disable=["nrom"])


def test_only_ops_with_a_kernel_unless_asked(monkeypatch):
    """An op without a kernel would be slower than what it replaces."""
    from tersor.graph_passes import editor

    monkeypatch.setattr(editor.native, "cpu_info", lambda: {"kernels": {}})
    monkeypatch.setattr(editor.ops, "NATIVE", True)
    model = Net(lambda m, x: m.a(m.norm(x)), norm=nn.LayerNorm(K), a=layer()).eval()
    report = tersor.fuse(model, torch.randn(SHAPE)).fusion_report
    assert report.reasons("norm") == ["tersor::norm_quantize has no kernel in this build"]
    assert ops.NATIVE
