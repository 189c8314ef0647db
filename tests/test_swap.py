"""quantize_ and its relatives: what is swapped, what is not and why, and that a refusal changes nothing."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from cases import assert_equal
from torch import nn

import tersor
from tersor import Int8Dynamic, Int8WeightOnly, QuantLinear


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
        self.head = nn.Linear(16, 40, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def formats_of(model: nn.Module) -> dict[str, object]:
    return {
        name: m.format if isinstance(m, QuantLinear) else None
        for name, m in model.named_modules()
        if isinstance(m, QuantLinear | nn.Linear)
    }


def test_swaps_every_linear_in_place():
    model = Tiny().eval()
    ids = torch.arange(40).view(2, 20)
    want = model(ids)
    assert tersor.quantize_(model, Int8Dynamic()) is model
    assert set(formats_of(model).values()) == {Int8Dynamic()}
    assert not model.blocks[0][0].training
    assert ((model(ids) - want).norm() / want.norm()) < 0.02


def test_dict_config():
    model = Tiny()
    tersor.quantize_(
        model,
        {
            "_default": Int8WeightOnly(),
            r"re:blocks\.\d+\.0": Int8Dynamic(),
            r"re:blocks\..*": None,
            "blocks.1.2": Int8Dynamic(),
        },
    )
    assert formats_of(model) == {
        "blocks.0.0": Int8Dynamic(),  # the first pattern that matches
        "blocks.0.2": None,
        "blocks.1.0": Int8Dynamic(),
        "blocks.1.2": Int8Dynamic(),  # exact before patterns
        "head": Int8WeightOnly(),
    }
    model = Tiny()
    tersor.quantize_(model, {"head": Int8Dynamic()})
    assert sum(f is not None for f in formats_of(model).values()) == 1


def test_filter_fn():
    model = Tiny()
    tersor.quantize_(model, Int8Dynamic(), lambda module, fqn: module.in_features == 32)
    assert [name for name, f in formats_of(model).items() if f] == ["blocks.0.2", "blocks.1.2"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"block.0": Int8Dynamic()}, ValueError, r"keys match no nn.Linear: 'block.0'; the model has: blocks.0.0"),
        ({"re:blocks": Int8Dynamic()}, ValueError, "keys match no nn.Linear: 're:blocks'"),  # fullmatch
        ({"re:(": Int8Dynamic()}, ValueError, "not a regular expression"),
        ({"head": "int8"}, TypeError, r"config\['head'\] is 'int8', expected a format"),
        ({3: Int8Dynamic()}, TypeError, "config key 3 is not a string"),
        ("int8", TypeError, "config is 'int8', expected a format such as"),
        (Int8Dynamic, TypeError, "expected a format such as tersor.Int8Dynamic()"),
    ],
)
def test_bad_config_touches_nothing(config, error, message):
    model = Tiny()
    with pytest.raises(error, match=message):
        tersor.quantize_(model, config)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_bad_weight_touches_nothing():
    model = Tiny()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"head.weight holds NaN or inf; nothing was changed"):
        tersor.quantize_(model, Int8Dynamic())
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


@pytest.mark.parametrize("fmt", [Int8Dynamic(), tersor.Ternary()])
def test_a_float64_weight_touches_nothing(fmt):
    model = Tiny()
    model.head.double()
    with pytest.raises(TypeError, match=r"quantize_: head.weight is torch.float64, expected float32, .* nothing was changed"):
        tersor.quantize_(model, fmt)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())


class Conv1D(nn.Module):
    """Named as transformers names the layers of GPT-2."""


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Sequential(nn.ReLU()), "quantize_: no layer is swapped: the model has 0 nn.Linear$"),
        (
            nn.Sequential(Conv1D(), Conv1D()),
            r"the model has 0 nn.Linear; its 2 Conv1D \(transformers' form of GPT-2's layers\) are none",
        ),
    ],
)
def test_a_swap_of_nothing_says_so(model, said, recwarn):
    with pytest.warns(UserWarning, match=said) as caught:
        tersor.quantize_(model, Int8Dynamic())
    assert caught[0].filename == __file__
    for asked in ({"_default": None}, {}):  # that was the wish
        tersor.quantize_(model, asked)
    tersor.quantize_(model, Int8Dynamic(), lambda module, fqn: False)
    assert not recwarn


def test_that_warning_is_at_the_callers_line_from_any_depth():
    with pytest.warns(UserWarning, match="no layer is") as caught, pytest.raises(ValueError, match="reach no layer"):
        tersor.advise(nn.Sequential(nn.ReLU()), torch.randn(1, 4))
    with pytest.warns(UserWarning, match="no layer is") as further, pytest.raises(ValueError, match="choose no layer"):
        tersor.prune_(nn.Sequential(nn.ReLU()), tersor.Unstructured(0.5))
    assert {warning.filename for warning in (*caught, *further)} == {__file__}


def test_root_linear():
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="QuantLinear.from_linear"):
        tersor.quantize_(linear, Int8Dynamic())
    with pytest.raises(TypeError, match="model is str"):
        tersor.quantize_("model", Int8Dynamic())


def test_tied_head_stays_unless_asked(caplog):
    model = Tiny()
    model.head.weight = model.embed.weight
    with pytest.warns(UserWarning, match=r"head stays float: its weight is tied to embed.weight"):
        tersor.quantize_(model, Int8Dynamic())
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.blocks[0][0], QuantLinear)

    model = Tiny()
    model.head.weight = model.embed.weight
    with caplog.at_level(logging.WARNING, "tersor"):
        tersor.quantize_(model, {"head": Int8Dynamic()})
    assert isinstance(model.head, QuantLinear)
    assert "adds 928 bytes" in caplog.text  # 3 n tiles x 4 k steps x 64 bytes + 40 scales


def test_shared_modules_and_weights_stay_shared():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    model["d"] = model["c"]
    tersor.quantize_(model, Int8Dynamic())
    assert model["d"] is model["c"]
    assert model["a"] is not model["b"]
    assert model["a"].weight_packed is model["b"].weight_packed
    assert model["a"].weight_scale is model["b"].weight_scale
    assert model["a"].bias is not model["b"].bias


def test_hooks_and_parametrizations_stay(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    torch.nn.utils.parametrizations.weight_norm(model[1])
    with caplog.at_level(logging.WARNING, "tersor"):
        tersor.quantize_(model, Int8Dynamic())
    assert "0 stays float: it has hooks" in caplog.text
    assert not isinstance(model[0], QuantLinear)
    assert not isinstance(model[1], QuantLinear)
    assert isinstance(model[2], QuantLinear)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(batch_first):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        want = model(x)
        tersor.quantize_(model, Int8Dynamic())
        got = model(x)
    assert type(model.layers[0].self_attn.out_proj) is not QuantLinear
    assert isinstance(model.layers[0].linear1, QuantLinear)
    assert ((got - want).norm() / want.norm()) < 0.03


def test_memory_of_the_swap():
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
    weights = [weakref.ref(m.weight) for m in model]
    seen = []
    original = QuantLinear.from_linear.__func__

    def spy(cls, linear, fmt=None):
        seen.append(sum(w() is not None for w in weights))
        return original(cls, linear, fmt)

    QuantLinear.from_linear = classmethod(spy)
    try:
        tersor.quantize_(model, Int8Dynamic())
    finally:
        QuantLinear.from_linear = classmethod(original)
    assert seen == [4, 3, 2, 1]  # each float weight is gone before the next layer is made


def test_device_and_progress(capsys):
    model = tersor.quantize_(Tiny(), Int8Dynamic(), device="meta", progress=True)
    assert model.head.weight_packed.is_meta
    assert "quantizing layers" in capsys.readouterr().err


def test_dequantize():
    model = Tiny()
    ids = torch.arange(10)
    want = model(ids)
    tersor.dequantize_(tersor.quantize_(model, Int8Dynamic()))
    assert all(f is None for f in formats_of(model).values())
    assert ((model(ids) - want).norm() / want.norm()) < 0.02
    with pytest.raises(ValueError, match=r"use model.dequantize()"):
        tersor.dequantize_(QuantLinear(4, 4))


def test_quantize_dynamic_as_torch_ao():
    model = Tiny()
    out = tersor.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert out is not model
    assert all(f is None for f in formats_of(model).values())
    assert set(formats_of(out).values()) == {Int8Dynamic()}
    assert tersor.quantize_dynamic(model, {"head"}, inplace=True) is model
    assert [name for name, f in formats_of(model).items() if f] == ["head"]
    by_name = tersor.quantize_dynamic(Tiny(), {"blocks.0": object(), "head": None})
    assert [name for name, f in formats_of(by_name).items() if f] == ["blocks.0.0", "blocks.0.2"]
    root = tersor.quantize_dynamic(nn.Linear(4, 4))
    assert isinstance(root, QuantLinear)


def test_quantize_dynamic_messages():
    with pytest.raises(ValueError, match=r"dtype is torch.float16, expected torch.qint8"):
        tersor.quantize_dynamic(Tiny(), dtype=torch.float16)
    with pytest.raises(ValueError, match="mapping is not supported"):
        tersor.quantize_dynamic(Tiny(), mapping={})
    with pytest.raises(ValueError, match="names 'foot', which the model does not have"):
        tersor.quantize_dynamic(Tiny(), {"foot"})
    with pytest.warns(UserWarning, match="LSTM stays float"):
        tersor.quantize_dynamic(nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4)), {nn.LSTM, nn.Linear})


def test_quantize_weights():
    assert set(formats_of(tersor.quantize_weights(Tiny())).values()) == {Int8Dynamic()}
    assert set(formats_of(tersor.quantize_weights(Tiny(), 8, None)).values()) == {Int8WeightOnly()}
    for bits, act in ((3, "int8"), ("8", "int8"), (None, "int8"), (8, "binary"), (True, "int8"), (8.0, "int8")):
        with pytest.raises(ValueError, match=r"expected one of: \(8, 'int8'\), \(8, None\)"):
            tersor.quantize_weights(Tiny(), bits, act)


def test_same_results_after_a_swap_in_inference_mode():
    torch.manual_seed(1)
    a, b = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    b.load_state_dict(a.state_dict())
    tersor.quantize_(a, Int8Dynamic())
    with torch.inference_mode():
        tersor.quantize_(b, Int8Dynamic())
    x = torch.randn(2, 8)
    assert_equal(b(x), a(x))
    b(x.requires_grad_()).sum().backward()


def test_layer_that_the_format_cannot_hold_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(132105, 4))
    with pytest.raises(ValueError, match=r"quantize_: 1: Int8Dynamic\(\): in_features=132105 is above 132104.*nothing was changed"):
        tersor.quantize_(model, Int8Dynamic())
    assert type(model[0]) is nn.Linear
