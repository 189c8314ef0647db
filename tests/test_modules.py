"""Modules of torch around swapped layers: attention, transformers, hooks, parametrizations, ties; memory and the progress bar."""

from __future__ import annotations

import copy
import functools
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_models import swap_tied, tied
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tersor
from tersor import Int8Dynamic, QuantLinear


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


# ---- attention


class Attention(nn.Module):
    def __init__(self, plain=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        if plain:  # as users do who replace the layer, and as dequantising tools leave it
            self.attention.out_proj = nn.Linear(32, 32)
        self.ffn = nn.Linear(32, 32)

    def forward(self, x):
        return self.ffn(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("plain", [False, True])
def test_attention_stays_as_it_is(plain, caplog):
    model, x = Attention(plain).eval(), torch.randn(2, 5, 32)
    want, attended = model(x), model.attention(x, x, x)
    tersor.quantize_(model, Int8Dynamic())
    assert isinstance(model.ffn, QuantLinear)
    assert isinstance(model.attention.out_proj, nn.Linear)
    assert torch.equal(model.attention(x, x, x)[0], attended[0])
    assert torch.equal(model.attention(x, x, x)[1], attended[1])
    assert 0 < relative_error(model(x), want) < 0.03
    assert ("attention.out_proj stays float: it cannot be packed: nn.MultiheadAttention reads" in caplog.text) is plain
    with torch.no_grad():  # its own fused path
        torch.testing.assert_close(model.attention(x, x, x, need_weights=False)[0], attended[0], rtol=1e-5, atol=1e-5)


def test_naming_out_proj_is_an_error():
    for plain, match in (
        (
            False,
            r"match no nn.Linear: 'attention.out_proj' \(a NonDynamicallyQuantizableLinear: nn.MultiheadAttention reads the weight",
        ),
        (True, r"attention.out_proj cannot be swapped: nn.MultiheadAttention reads the weight of its out_proj itself"),
    ):
        model = Attention(plain)
        with pytest.raises(ValueError, match=match):
            tersor.quantize_(model, {"_default": Int8Dynamic(), "attention.out_proj": Int8Dynamic()})
        assert type(model.ffn) is nn.Linear
    model = Attention(plain=True)
    with pytest.raises(ValueError, match="attention.out_proj cannot be swapped"):
        tersor.quantize_(model, Int8Dynamic(), lambda module, fqn: True)
    assert type(model.ffn) is nn.Linear
    tersor.quantize_(Attention(), Int8Dynamic(), lambda module, fqn: True)  # a filter is only shown what can be swapped


def test_attention_that_calls_its_out_proj_is_swapped():
    class Own(nn.MultiheadAttention):
        def forward(self, x):
            return self.out_proj(x)

    model = nn.Sequential(Own(8, 2))
    model[0].out_proj = nn.Linear(8, 8)
    tersor.quantize_(model, Int8Dynamic())
    assert isinstance(model[0].out_proj, QuantLinear)


# ---- transformers of torch


SIZES = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "dropout": 0.0, "batch_first": True}
X, MEMORY = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1)), torch.randn(
    3, 5, 32, generator=torch.Generator().manual_seed(2)
)  # fmt: skip
PADDING = torch.arange(7) >= torch.tensor([[7], [4], [5]])

TRANSFORMERS = {
    "layer": (lambda: nn.TransformerEncoderLayer(**SIZES), lambda m: m(X, src_key_padding_mask=PADDING)),
    "gelu": (lambda: nn.TransformerEncoderLayer(**SIZES, activation="gelu"), lambda m: m(X, src_key_padding_mask=PADDING)),
    "norm first": (lambda: nn.TransformerEncoderLayer(**SIZES, norm_first=True), lambda m: m(X)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**SIZES), 2),
        lambda m: m(X, src_key_padding_mask=PADDING),
    ),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(**SIZES), lambda m: m(X, MEMORY, tgt_key_padding_mask=PADDING)),
    "decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**SIZES), 2),
        lambda m: m(X, MEMORY, tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(7)),
    ),
    "transformer": (
        lambda: nn.Transformer(**SIZES, num_encoder_layers=2, num_decoder_layers=2),
        lambda m: m(X, MEMORY, src_key_padding_mask=PADDING, memory_key_padding_mask=PADDING),
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_of_torch(name, caplog):
    make, run = TRANSFORMERS[name]
    torch.manual_seed(0)
    model = nn.ModuleDict({"it": make()})
    kept = PADDING.logical_not() if "padding" in str(run.__code__.co_consts) + str(run.__code__.co_names) else None
    model.train()
    want = run(model["it"])  # the plain path: the fused one makes padded rows zero
    with caplog.at_level(logging.INFO, "tersor"):
        tersor.quantize_(model, Int8Dynamic())
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) >= 2
    fused = any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())
    assert sum("fused eval path" in r.message for r in caplog.records) == fused  # one line for all layers

    def check(got):
        assert got.shape == want.shape
        if kept is None or name == "transformer":
            assert relative_error(got, want) < 0.05
        else:
            assert relative_error(got[kept], want[kept]) < 0.05

    got = run(model["it"])
    check(got.detach())
    got.square().sum().backward()
    for key, p in model.named_parameters():
        assert (p.grad is None) == ("weight_packed" in key), key
    model.eval()
    check(run(model["it"]).detach())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            check(run(model["it"]))
    again = copy.deepcopy(model)
    with torch.no_grad():
        check(run(again["it"]))


# ---- what stays, and why


def weight_norm_of_old(layer):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)


HOOKS = "has hooks or a forward of its own"
STAYS = {
    "forward hook": (lambda m: m.register_forward_hook(lambda m, args, out: out * 2), HOOKS),
    "forward hook with kwargs": (lambda m: m.register_forward_hook(lambda m, args, kw, out: out * 2, with_kwargs=True), HOOKS),
    "forward pre-hook": (lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)), HOOKS),
    "backward hook": (lambda m: m.register_full_backward_hook(lambda m, gi, go: None), HOOKS),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(lambda m, go: None), HOOKS),
    "forward of the object": (lambda m: setattr(m, "forward", functools.partial(nn.Linear.forward, m)), HOOKS),
    "weight_norm, old": (weight_norm_of_old, HOOKS),
    "spectral_norm, old": (lambda m: nn.utils.spectral_norm(m), HOOKS),
    "weight_norm": (lambda m: parametrizations.weight_norm(m), "is parametrised"),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m), "is parametrised"),
    "orthogonal": (lambda m: parametrizations.orthogonal(m), "is parametrised"),
    "of the bias": (lambda m: parametrize.register_parametrization(m, "bias", nn.Identity()), "is parametrised"),
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.5), HOOKS),
    "prune.identity": (lambda m: prune.identity(m, "weight"), HOOKS),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_a_swap_would_lose_stays(name, caplog):
    apply, reason = STAYS[name]
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    apply(model[0])
    layer, x = model[0], torch.randn(3, 8)
    want = layer(x)
    tersor.quantize_(model, Int8Dynamic())
    assert model[0] is layer
    assert isinstance(model[2], QuantLinear)
    assert torch.equal(model[0](x), want)
    assert f"tersor: 0 stays float: it {reason}" in caplog.text
    assert sum(r.levelname == "WARNING" for r in caplog.records) == 1


@pytest.mark.parametrize(
    "how", [{"config": {"0": Int8Dynamic()}}, {"config": Int8Dynamic(), "filter_fn": lambda m, fqn: fqn == "0"}]
)
def test_what_is_lost_by_asking_is_told(how, caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    tersor.quantize_(model, **how)
    assert isinstance(model[0], QuantLinear)
    assert type(model[1]) is nn.Linear
    assert [r.message for r in caplog.records] == [f"tersor: 0 is swapped as asked, though it {HOOKS}, which a swap would lose"]


def test_swapped_once_the_reason_is_gone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrizations.weight_norm(model[0])
    prune.l1_unstructured(model[1], "weight", 0.5)
    tersor.quantize_(model, Int8Dynamic())
    parametrize.remove_parametrizations(model[0], "weight")
    prune.remove(model[1], "weight")
    x = torch.randn(3, 8)
    want = model(x)
    tersor.quantize_(model, Int8Dynamic())
    assert all(isinstance(m, QuantLinear) for m in model)
    assert relative_error(model(x), want) < 0.05
    assert (model[1].dequantize().weight == 0).sum() == 32  # zeros stay zeros


def test_naming_a_parametrised_layer_is_an_error():
    model = nn.Sequential(nn.Linear(8, 8))
    parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"match no nn.Linear: '0' \(a ParametrizedLinear\)"):
        tersor.quantize_(model, {"0": Int8Dynamic()})


def test_train_and_eval_propagate():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    model[1].eval()
    tersor.quantize_(model, Int8Dynamic())
    assert [model[0].training, model[1][0].training] == [True, False]
    for mode in (False, True):
        model.train(mode)
        assert [m.training for m in model.modules()] == [mode] * 4


# ---- ties


def assert_tied(model):
    for name in ("weight_packed", "weight_scale"):
        assert getattr(model.a, name).data_ptr() == getattr(model.b, name).data_ptr(), name
    assert model.b.weight_packed is model.a.weight_packed
    assert model.again is model.a
    assert model.b is not model.a
    assert model.b.bias.data_ptr() != model.a.bias.data_ptr()
    assert model.head.weight is model.embed.weight
    ids = torch.arange(8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.a.weight_packed[0, 0, 0] ^= 255  # k = 0 of the first channel
    assert not torch.equal(other.b(other.embed(ids)), model.b(model.embed(ids)))


def test_ties_survive_all_that_is_done_to_a_model(tmp_path):
    model = swap_tied(tied(0))
    assert_tied(model)
    assert_tied(copy.deepcopy(model))
    assert_tied(model.to(torch.bfloat16).float())
    model.load_state_dict({key: t.clone() for key, t in swap_tied(tied(1)).state_dict().items()})
    assert_tied(model)
    assert torch.equal(model(torch.arange(8)), swap_tied(tied(1))(torch.arange(8)))
    tersor.save(model, tmp_path / "m.safetensors")
    loaded = tersor.load_(tied(2), tmp_path / "m.safetensors")
    assert_tied(loaded)
    assert torch.equal(loaded(torch.arange(8)), model(torch.arange(8)))
    floats = tersor.dequantize_(loaded)
    assert floats.again is floats.a
    assert floats.a.weight is floats.b.weight
    assert not any(isinstance(m, QuantLinear) for m in floats.modules())


def test_graph_and_optimizer_survive_load_state_dict():
    from torch._dynamo.testing import CompileCounter

    counter, ids = CompileCounter(), torch.arange(8)
    model, other = swap_tied(tied(0)), swap_tied(tied(1))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(ids)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.load_state_dict(other.state_dict())
    assert torch.equal(compiled(ids), other(ids))
    assert counter.frame_count == 1
    for m in (model, other):
        m.zero_grad()
        m(ids).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.a.bias, other.a.bias - 0.1 * other.a.bias.grad)
    assert_tied(model)


# ---- progress


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_asked_for(progress, capfd):
    tersor.quantize_(Attention(), Int8Dynamic(), **({"progress": True} if progress else {}))
    out, err = capfd.readouterr()
    assert out == ""
    assert ("quantizing layers" in err) is progress
    assert progress or err == ""


# ---- memory


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Resident MiB of a swap of 576 MiB of float32 weights, and of loads of what it gave, each in a process of its own."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status on this system: VmHWM is not known")
    worker, path = Path(__file__).with_name("memory_worker.py"), tmp_path_factory.mktemp("memory") / "m.safetensors"
    results = {}
    for task in ("swap", "load_meta", "load_float"):
        run = subprocess.run([sys.executable, worker, task, path], capture_output=True, text=True, check=True)
        results[task] = json.loads(run.stdout)
    return results


FLOAT, PACKED, LARGEST = 576, 144, 64  # MiB of the model, of its tiles, of the tiles of the largest layer
SLACK = 12  # MiB of scales, blocks of 1 MiB and what the allocator keeps


def test_memory_falls_during_the_swap(measured):
    r = measured["swap"]
    assert r["peak"] <= r["start"] + 64  # what is promised
    assert r["peak"] <= r["start"] + 16 + SLACK  # the smallest layer's tiles: the largest goes last
    assert len(r["seen"]) == 6
    for done, now in enumerate(r["seen"]):
        assert now <= r["start"] - 48 * done + SLACK  # 64 MiB of float gone, 16 of tiles came
    assert r["end"] <= r["start"] - FLOAT + PACKED + SLACK


def test_memory_of_loading(measured):
    meta, floats = measured["load_meta"], measured["load_float"]
    assert meta["peak"] <= meta["start"] + SLACK  # nothing is read before it is used
    assert meta["used_peak"] <= meta["start"] + PACKED + SLACK  # and then once
    assert floats["peak"] <= floats["start"] + SLACK
    assert floats["end"] <= floats["start"] - FLOAT + PACKED + SLACK
    assert meta["touched"] == floats["touched"] == measured["swap"]["touched"]
