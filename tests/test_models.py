"""Models of transformers with swapped layers: they generate, train with checkpointing, save and load as before."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tersor
from tersor import Int8Dynamic, Int8WeightOnly, QuantLinear

pytest.importorskip("transformers", reason="transformers is not installed")
from hf_models import IDS, llama, relative_error, t5
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5ForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

HALVES = [torch.bfloat16, torch.float16]
# Per-token, per-channel int8 errs by 0.9 % a layer on Gaussian data; the longest way through these models has 15 layers, and
# independent errors add up to sqrt(15) * 0.9 % = 3.5 %. Softmax and gates amplify some of them: less than twice.
CLOSE = 0.06


def swap(model, config=None):
    return tersor.quantize_(model, config or Int8Dynamic())


def packed(model):
    return [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]


FLOAT_HEAD = {"_default": Int8Dynamic(), "lm_head": None}


# ---- T5


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    t5().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[torch.float32, *HALVES], ids=str)
def t5_pair(request, t5_folder):
    model = T5ForConditionalGeneration.from_pretrained(t5_folder, dtype=request.param).eval()
    return model, swap(copy.deepcopy(model), FLOAT_HEAD), request.param


def test_t5_keeps_its_dtypes(t5_pair):
    model, swapped, dtype = t5_pair
    assert len(packed(swapped)) == 2 * 6 + 2 * 10
    wo = swapped.encoder.block[0].layer[1].DenseReluDense.wo
    # T5 keeps wo in float32 where the rest is float16, and reads wo.weight.dtype to cast what it passes in.
    assert wo.weight.dtype == model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype
    assert wo.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert swapped.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == dtype
    assert swapped.dtype == model.dtype


def test_t5_runs_close_to_float(t5_pair):
    model, swapped, dtype = t5_pair
    labels = IDS.flip(1)
    with torch.inference_mode():
        want, got = model(IDS, labels=labels), swapped(IDS, labels=labels)
        assert got.encoder_last_hidden_state.dtype == want.encoder_last_hidden_state.dtype
        assert relative_error(got.encoder_last_hidden_state, want.encoder_last_hidden_state) < CLOSE
        assert relative_error(got.logits, want.logits) < CLOSE


@pytest.mark.parametrize("beams", [1, 3])
def test_t5_generates(t5_pair, beams):
    model, swapped, _ = t5_pair
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "min_new_tokens": 6}
    with torch.inference_mode():
        tokens = swapped.generate(IDS, **options)
        assert torch.equal(tokens, swapped.generate(IDS, use_cache=False, **options))
        # What it generated, it also ranks best when it sees it whole.
        if beams == 1:
            logits = swapped(IDS, decoder_input_ids=tokens[:, :-1]).logits
            logits[..., swapped.generation_config.eos_token_id] = -torch.inf  # min_new_tokens
            assert torch.equal(logits.argmax(-1), tokens[:, 1:])


def test_t5_tied_head():
    model = t5()
    with pytest.warns(UserWarning, match="lm_head stays float: its weight is tied to .*embed_tokens.weight"):
        tersor.quantize_(model, Int8Dynamic())
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    model.tie_weights()
    assert model.lm_head.weight is model.shared.weight
    embeddings = model.resize_token_embeddings(4100, mean_resizing=False)
    assert model.lm_head.weight is embeddings.weight
    assert model(IDS, labels=IDS).logits.shape[-1] == 4100


def test_packed_head_is_not_tied_again(caplog):
    model = t5()
    with caplog.at_level("WARNING", "tersor"):
        swap(model, {"lm_head": Int8Dynamic()})
    n_bytes = 4096 * 512 + 4096 * 4
    assert f"lm_head is tied to decoder.embed_tokens.weight, which stays float: its packed copy adds {n_bytes} bytes" in caplog.text
    want = model(IDS, labels=IDS).logits
    with pytest.raises(AttributeError, match=r"QuantLinear: weight is packed.*config.tie_word_embeddings = False"):
        model.tie_weights()
    model.config.tie_word_embeddings = False
    model.tie_weights()
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model(IDS, labels=IDS).logits, want)
    assert not want.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_t5_small_in_full(dtype, tmp_path):
    """All 6 layers and 32128 tokens of t5-small, through save and load_."""
    t5(num_layers=6, vocab_size=32128).save_pretrained(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    swapped = swap(copy.deepcopy(model), FLOAT_HEAD)
    assert len(packed(swapped)) == 6 * 6 + 6 * 10
    with torch.inference_mode():
        want, got = model(IDS, labels=IDS), swapped(IDS, labels=IDS)
        # 36 layers of the encoder in a row
        assert relative_error(got.encoder_last_hidden_state, want.encoder_last_hidden_state) < 2 * 0.009 * 36**0.5
        tokens = swapped.generate(IDS, max_new_tokens=6, num_beams=4)
    tersor.save(swapped, tmp_path / "packed.safetensors")
    tersor.load_(model, tmp_path / "packed.safetensors")
    with torch.inference_mode():
        assert torch.equal(model.generate(IDS, max_new_tokens=6, num_beams=4), tokens)


# ---- Llama


@pytest.mark.parametrize("fmt", [Int8Dynamic(), Int8WeightOnly()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_llama_generates_with_a_cache(dtype, fmt):
    model = llama(dtype=dtype)
    swapped = swap(copy.deepcopy(model), fmt)
    assert len(packed(swapped)) == 15
    assert not any(type(m) is nn.Linear for m in swapped.modules())
    with torch.inference_mode():
        assert relative_error(swapped(IDS).logits, model(IDS).logits) < CLOSE
        tokens = swapped.generate(IDS, max_new_tokens=8, do_sample=False)
        assert len(tokens.unique()) > 8  # not one token for ever
        logits = swapped(tokens[:, :-1]).logits[:, IDS.shape[1] - 1 :].float()
    # Cached and whole runs round differently; where two tokens are that close, either is right.
    best, chosen = logits.amax(-1), logits.gather(-1, tokens[:, IDS.shape[1] :, None])[..., 0]
    assert (best - chosen).max() <= (0.02 if dtype == torch.float32 else 0.1) * logits.std()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [llama, t5])
def test_gradient_checkpointing(make, reentrant):
    model = make()
    model.set_attn_implementation("eager")  # float T5 too gets another fused attention, which rounds elsewhere, under checkpointing
    swap(model, FLOAT_HEAD).train()
    calls = []
    layer = model.get_submodule(packed(model)[0])
    layer.register_forward_hook(lambda *args: calls.append(1))

    def gradients():
        calls.clear()
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(calls)

    want, once = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got, twice = gradients()
    assert (once, twice) == (1, 2)  # the layer was really computed anew
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert want.keys() == got.keys() == trainable
    assert not any("weight_packed" in name for name in trainable)
    # Reentrant checkpointing adds up the gradients of the encoder's output, which every decoder layer reads, in another order.
    bound = 1e-5 if make is t5 and reentrant else 0.0
    assert all(torch.equal(got[name], want[name]) or relative_error(got[name], want[name]) < bound for name in want)
    assert sum(g.abs().sum() > 0 for g in want.values()) >= len(want) - 2  # k_proj.bias shifts all scores alike: zero or nearly


def test_what_transformers_asks_of_a_model():
    model = llama()
    float_bytes, count = model.get_memory_footprint(), model.num_parameters()
    bias = model.model.layers[0].self_attn.q_proj.bias
    swap(model)
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    floats = sum(m.out_features * m.in_features for m in linears)
    stored = sum(m.weight_packed.numel() + 4 * m.out_features for m in linears)
    assert model.get_memory_footprint() == float_bytes - 4 * floats + stored
    assert model.num_parameters() == count + sum(m.weight_packed.numel() for m in linears) - floats  # pads of the tiles count
    assert model.num_parameters(only_trainable=True) == count - floats
    assert model.dtype == torch.float32
    assert model.bfloat16().dtype == torch.bfloat16
    assert bias.dtype == torch.bfloat16  # the same object, cast
    assert all(m.weight_scale.dtype == torch.float32 for m in linears)
    assert all(m.weight.dtype == torch.bfloat16 for m in linears)


def test_init_weights_leaves_packed_layers_alone():
    model = swap(llama())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.apply(model._init_weights)
    model.init_weights()
    changed = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert changed == ["model.embed_tokens.weight"]  # it did run


def test_resize_with_an_untied_head():
    model = swap(llama(), FLOAT_HEAD)
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 300
    model = swap(llama())
    with pytest.raises(TypeError, match="QuantLinear"):  # transformers' own words; docs/models.md says what to do
        model.resize_token_embeddings(300, mean_resizing=False)
    model = swap(llama())
    model.lm_head = model.lm_head.dequantize()
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model(IDS).logits.shape[-1] == 300


# ---- saving


@pytest.mark.parametrize("how", ["tersor.save", "save_pretrained"])
def test_t5_round_trip_through_meta(tmp_path, how):
    model = swap(t5(), FLOAT_HEAD)
    if how == "tersor.save":
        model.config.save_pretrained(tmp_path)
        tersor.save(model, tmp_path / "model.safetensors")
    else:
        model.save_pretrained(tmp_path)
    with torch.device("meta"):
        fresh = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    tersor.load_(fresh, tmp_path / "model.safetensors")
    assert packed(fresh) == packed(model)
    assert fresh.lm_head.weight is fresh.shared.weight
    with torch.inference_mode():
        assert torch.equal(fresh(IDS, labels=IDS).logits, model(IDS, labels=IDS).logits)
        assert torch.equal(fresh.generate(IDS, max_new_tokens=4), model.generate(IDS, max_new_tokens=4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_llama_round_trip_through_meta(tmp_path, dtype):
    """Buffers that are not persistent (rotary frequencies) are in no checkpoint: accelerate builds them for real."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = swap(llama(dtype=dtype))
    model.config.save_pretrained(tmp_path)
    tersor.save(model, tmp_path / "model.safetensors")
    config = AutoConfig.from_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        fresh = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert fresh.lm_head.weight.is_meta
    tersor.load_(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    with torch.device("meta"):
        other = AutoModelForCausalLM.from_config(config).eval()
    with pytest.warns(UserWarning, match="still on meta after load_: model.rotary_emb.inv_freq"):
        tersor.load_(other, tmp_path / "model.safetensors")
    other.model.rotary_emb = type(other.model.rotary_emb)(config)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_from_pretrained_does_not_read_packed_layers(tmp_path):
    """transformers reports every packed weight as missing; docs/models.md warns of it."""
    model = swap(llama())
    model.save_pretrained(tmp_path)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.removesuffix(".weight") for name in report["missing_keys"]} == set(packed(model))


def test_float_parts_and_packed_parts_meet_in_a_float_model(tmp_path):
    """load_ into the float model that from_pretrained makes: the swap of another process, in place."""
    model = llama()
    model.save_pretrained(tmp_path / "float")
    swap(model)
    tersor.save(model, tmp_path / "packed.safetensors")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    embed = fresh.model.embed_tokens.weight
    tersor.load_(fresh, tmp_path / "packed.safetensors")
    assert fresh.model.embed_tokens.weight is embed
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


# ---- MiniLM, the real one


@pytest.fixture(scope="module")
def minilm():
    module = pytest.importorskip("minilm_model")
    try:
        return module.load_model()
    except module.MissingData as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_minilm_in_any_dtype(minilm, dtype):
    model = copy.deepcopy(minilm).to(dtype)
    before = swap(copy.deepcopy(model))
    after = swap(copy.deepcopy(minilm)).to(dtype)
    mask = (IDS < 24).long()
    with torch.inference_mode():
        want = minilm(IDS, attention_mask=mask).last_hidden_state
        for swapped in (before, after):
            got = swapped(IDS, attention_mask=mask).last_hidden_state
            assert got.dtype == dtype
            assert relative_error(got, want) < 0.14  # cosine 0.99, of single hidden states; test_minilm.py has the embeddings
    scale = next(m.weight_scale for m in after.modules() if isinstance(m, QuantLinear))
    assert scale.dtype == torch.float32


def test_minilm_checkpoints_and_saves(minilm, tmp_path):
    model = swap(copy.deepcopy(minilm)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    grads = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS).last_hidden_state.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    model.eval().save_pretrained(tmp_path)
    fresh = copy.deepcopy(minilm)
    tersor.load_(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(IDS).last_hidden_state, model(IDS).last_hidden_state)
