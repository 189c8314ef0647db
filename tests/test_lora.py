"""peft's LoRA with swapped layers, in either order: adapters train, save and load; nothing is merged into a packed weight."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import tersor
from tersor import Int8Dynamic, QuantLinear

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")
from hf_models import IDS, llama, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora

from tersor.adapters import lora_linear

# peft says "proceed at your own risk" of every class that is not its own.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**changes):
    return LoraConfig(**({"r": 4, "target_modules": TARGETS} | changes))


def mapped(given):
    """What docs/models.md says."""
    given._register_custom_module({QuantLinear: lora_linear})
    return given


def adapters_first(seed=0, **changes):
    torch.manual_seed(seed)
    model = get_peft_model(llama(), config(**changes))
    stir(model)
    return model


def swap_first(seed=0, layer=lora_linear, **changes):
    model, given = tersor.quantize_(llama(), Int8Dynamic()), config(**changes)
    given._register_custom_module({QuantLinear: layer})
    torch.manual_seed(seed)
    return get_peft_model(model, given)


def stir(model):
    """B starts at zero; adapters that do nothing would hide what is lost."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))


def tuners(model):
    return [m for m in model.modules() if isinstance(m, lora.Linear)]


def train(model, steps=8):
    """The losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def frozen(model):
    return {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}


# ---- adapters first, then quantize_


def test_adapters_stay_float(caplog):
    model = adapters_first()
    want = model(IDS).logits
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    with caplog.at_level(logging.INFO, "tersor"):
        tersor.quantize_(model, Int8Dynamic())
    lines = [r.message for r in caplog.records if "peft" in r.message]
    assert len(lines) == 1
    assert lines[0].startswith(
        "tersor: 12 layers of peft adapters stay float, so that they train: base_model.model.model.layers.0."
    )
    assert len(tuners(model)) == 6
    for tuner in tuners(model):
        assert isinstance(tuner.base_layer, QuantLinear)
        assert type(tuner.lora_A["default"]) is type(tuner.lora_B["default"]) is nn.Linear
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert relative_error(model(IDS).logits, want) < 0.06
    with model.disable_adapter():
        assert relative_error(model(IDS).logits, want) > 0.1  # the adapter does something


def test_adapters_around_packed_layers_train():
    model = tersor.quantize_(adapters_first(), Int8Dynamic())
    before = frozen(model)
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(t, before[name]) for name, t in frozen(model).items())


def test_a_key_or_a_filter_can_still_name_an_adapter(caplog):
    model = adapters_first()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"
    tersor.quantize_(model, {name: Int8Dynamic()})
    assert isinstance(model.get_submodule(name), QuantLinear)
    assert f"{name} is swapped as asked, though it is part of a peft adapter, which then no longer trains" in caplog.text
    model = adapters_first()
    tersor.quantize_(model, Int8Dynamic(), lambda module, fqn: fqn.endswith("lora_B.default"))
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 6


def test_modules_to_save_stay_float_and_train():
    model = adapters_first(modules_to_save=["lm_head"])
    tersor.quantize_(model, Int8Dynamic())
    wrapper = model.base_model.model.lm_head
    assert type(wrapper.modules_to_save["default"]) is nn.Linear
    assert isinstance(wrapper.original_module, QuantLinear)
    before = wrapper.modules_to_save["default"].weight.detach().clone()
    train(model, steps=1)
    assert not torch.equal(wrapper.modules_to_save["default"].weight, before)


def test_dora_bases_stay_float(caplog):
    model = adapters_first(use_dora=True)
    want = model(IDS).logits
    with caplog.at_level(logging.WARNING, "tersor"):
        tersor.quantize_(model, Int8Dynamic())
    assert caplog.text.count("stays float: it is the base of a DoRA adapter, which reads its float weight") == 6
    assert all(type(tuner.base_layer) is nn.Linear for tuner in tuners(model))
    got = model(IDS).logits
    assert relative_error(got, want) < 0.06
    model.merge_and_unload()


# ---- merging


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("make", [adapters_first, swap_first])
@pytest.mark.parametrize("how", MERGES)
def test_merging_is_refused(how, make):
    model = make()
    stir(model)
    if make is adapters_first:
        tersor.quantize_(model, Int8Dynamic())
    want = model(IDS).logits
    for case in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(
            ValueError, match=r"peft merge: the base layer of \S+q_proj is packed.*tersor.dequantize_\(model\), merge"
        ):
            MERGES[how](case)
        assert not any(tuner.merged for tuner in tuners(case))
        assert torch.equal(case(IDS).logits, want)


def test_merging_after_dequantize():
    model = adapters_first()
    float_logits = model(IDS).logits
    tersor.quantize_(model, Int8Dynamic())
    tersor.dequantize_(model)
    want = model(IDS).logits
    merged = model.merge_and_unload()
    assert not tuners(merged)
    assert not any(t.isnan().any() for t in merged.parameters())
    torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-4)
    tersor.quantize_(merged, Int8Dynamic())
    assert relative_error(merged(IDS).logits, float_logits) < 0.09  # quantised twice


def test_unmerging_is_refused_and_stays_refused():
    """peft's own unmerge takes the adapter off its list before it fails; from then on it would count twice."""
    model = adapters_first()
    model.merge_adapter()
    want = model(IDS).logits
    tersor.quantize_(model, Int8Dynamic())
    merged = model(IDS).logits
    assert relative_error(merged, want) < 0.06
    for _ in range(2):
        with pytest.raises(ValueError, match="peft unmerge: the base layer of .* is packed"):
            model.unmerge_adapter()
        with pytest.raises(ValueError, match="peft unmerge"), model.disable_adapter():
            model(IDS)
    assert all(tuner.merged for tuner in tuners(model))
    assert torch.equal(model(IDS).logits, merged)
    tersor.dequantize_(model)
    model.unmerge_adapter()
    assert relative_error(model(IDS).logits, want) < 0.06


def test_unload_drops_the_adapters():
    model = tersor.quantize_(adapters_first(), Int8Dynamic())
    with model.disable_adapter():
        want = model(IDS).logits
    base = model.unload()
    assert not tuners(base)
    assert torch.equal(base(IDS).logits, want)


# ---- quantize_ first, then adapters


def test_wrapping_packed_layers():
    base = tersor.quantize_(llama(), Int8Dynamic())
    want = base(IDS).logits
    model = swap_first()
    assert len(tuners(model)) == 6
    assert all(isinstance(tuner.base_layer, QuantLinear) for tuner in tuners(model))
    assert torch.equal(model(IDS).logits, want)  # B is zero
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 12
    assert all("lora_" in name for name in trainable)
    before = frozen(model)
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(t, before[name]) for name, t in frozen(model).items())


def test_without_the_mapping_peft_says_so():
    with pytest.raises(ValueError, match="Target module QuantLinear.* is not supported"):
        get_peft_model(tersor.quantize_(llama(), Int8Dynamic()), config())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"use_dora": True}, "DoraLinearVariant may read the float weight, which is packed"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' reads the float weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' reads the float weight"),
    ],
    ids=str,
)
def test_what_needs_the_float_weight_is_refused(changes, match):
    """Mapped to lora.Linear, DoRA makes q_proj NaN, and fused attention turns that into finite logits."""
    with pytest.raises(ValueError, match=match):
        swap_first(**changes)


@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal"])
def test_inits_that_do_not_read_the_weight(init):
    model = swap_first(init_lora_weights=init)
    assert not model(IDS).logits.isnan().any()
    assert train(model, steps=2)[-1] > 0


def test_adapters_take_the_compute_dtype():
    model = tersor.quantize_(llama(dtype=torch.bfloat16), Int8Dynamic())
    model = get_peft_model(model, mapped(config()), autocast_adapter_dtype=False)
    assert tuners(model)[0].lora_A["default"].weight.dtype == torch.bfloat16  # peft reads base_layer.weight.dtype
    assert train(model, steps=2)[-1] > 0


@pytest.mark.parametrize("how", MERGES)
def test_merging_in_layers_of_pefts_own_fails_too(how):
    """Mapped to lora.Linear itself, nobody refuses; the NaN weight is no memory to write to."""
    model = swap_first(layer=lora.Linear)
    stir(model)
    want = model(IDS).logits
    with pytest.raises((RuntimeError, ValueError), match="single memory location|NaNs detected"):
        MERGES[how](model)
    assert torch.equal(model(IDS).logits, want)
    merged = tersor.dequantize_(model).merge_and_unload()
    assert relative_error(merged(IDS).logits, want) < 0.06


# ---- files


@pytest.mark.parametrize("make", [adapters_first, swap_first])
def test_adapters_save_and_load(make, tmp_path):
    model = make()
    if make is adapters_first:
        tersor.quantize_(model, Int8Dynamic())
    train(model, steps=2)
    want = model(IDS).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        base = tersor.quantize_(llama(), Int8Dynamic())
    again = PeftModel.from_pretrained(base, tmp_path, config=mapped(LoraConfig.from_pretrained(tmp_path)))
    assert torch.equal(again(IDS).logits, want)
    # The same adapter on a float base, swapped afterwards.
    later = tersor.quantize_(PeftModel.from_pretrained(llama(), tmp_path), Int8Dynamic())
    assert torch.equal(later(IDS).logits, want)


def test_the_whole_model_through_save_and_load(tmp_path):
    model = tersor.quantize_(adapters_first(), Int8Dynamic())
    tersor.save(model, tmp_path / "model.safetensors")
    other = adapters_first(seed=5)
    tersor.load_(other, tmp_path / "model.safetensors")
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="peft merge: the base layer"):
        other.merge_and_unload()


def test_a_second_adapter():
    model = tersor.quantize_(adapters_first(), Int8Dynamic())
    model.add_adapter("other", mapped(config(r=2)))
    model.set_adapter("other")
    with model.disable_adapter():
        want = model(IDS).logits
    assert torch.equal(model(IDS).logits, want)
    losses = train(model, steps=3)
    assert losses[-1] < losses[0]
