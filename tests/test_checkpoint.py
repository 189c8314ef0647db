"""save and load_: round trips, ties, what does not fit. A loaded layer's outputs are the saved layer's, bit for bit."""

import json

import pytest
import torch
from cases import FORMATS
from checkpoint_models import (
    H,
    K,
    assert_same_model,
    assert_untouched,
    float_model,
    inputs,
    snapshot,
    swap_tied,
    swapped,
    tied,
)
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model
from torch import nn

import tersor
from tersor.checkpoint import load_, save
from tersor.formats import Tag, encode_tag
from tersor.nn import QuantLinear

# ---- round trips


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("target", ["float", "meta", "swapped", "swapped meta"])
@pytest.mark.parametrize("fmt", FORMATS, ids=repr)
def test_round_trip(tmp_path, fmt, target, mmap):
    model = swapped(fmt)
    path = tmp_path / "m.safetensors"
    save(model, path)
    other = float_model(1, device="meta" if "meta" in target else "cpu", fmt=fmt)
    if "swapped" in target:
        for i in (0, 3):
            other[i] = QuantLinear.from_linear(other[i], fmt)
    ours = model.state_dict()
    # What has another size than the file's, as sparse weights may, cannot stay where it is.
    before = {key: t.data_ptr() for key, t in other.state_dict().items() if key in ours and t.shape == ours[key].shape}
    before = {key: p for key, p in before.items() if not key.endswith("_extra_state")}
    parameters = {name: p for name, p in other.named_parameters() if name in before}
    other_shapes = {key: t.shape for key, t in other.state_dict().items()}
    assert load_(other, str(path), mmap=mmap) is other
    assert_same_model(other, model)
    assert not any(t.is_inference() for t in other.state_dict().values())
    if "meta" in target:
        return
    for name, t in other.state_dict().items():
        if name in before:
            assert t.data_ptr() == before[name], name  # in place: graphs and optimizers hold these
    for name, p in other.named_parameters():
        if name in parameters:
            assert p is parameters[name], name
        else:
            assert target == "float" or p.shape != other_shapes[name]


def test_metadata_and_foreign_readers(tmp_path):
    model, path = swapped(), tmp_path / "m.safetensors"
    save(model, path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "tersor", "layout": "1", "version": tersor.__version__, "aliases": "{}"}
    other = swapped(seed=1)
    other.load_state_dict(load_file(path))
    assert_same_model(other, model)


def test_safetensors_model_functions(tmp_path):
    model, path = swapped(), str(tmp_path / "m.safetensors")
    save_model(model, path)
    other = swapped(seed=1)
    load_model(other, path)
    assert_same_model(other, model)
    assert_same_model(load_(float_model(2), path), model)
    ours = tmp_path / "ours.safetensors"
    save(model, ours)
    other = swapped(seed=3)
    load_model(other, ours)
    assert_same_model(other, model)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mmap", [True, False])
def test_pth(tmp_path, mmap, legacy):
    model, path = swapped(), tmp_path / "m.pth"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    for other in (float_model(1), float_model(1, device="meta"), swapped(seed=1)):
        assert_same_model(load_(other, path, mmap=mmap), model)
    state = torch.load(path, weights_only=True)
    assert_same_model(load_(float_model(1), state), model)


def test_state_dict_is_copied_into_models_with_memory(tmp_path):
    model = swapped()
    for other, mmap, shares in ((float_model(1), True, False), (float_model(1, device="meta"), True, True),
                                (float_model(1, device="meta"), False, False)):  # fmt: skip
        load_(other, model.state_dict(), mmap=mmap)
        assert_same_model(other, model)
        assert (other[0].weight_packed.data_ptr() == model[0].weight_packed.data_ptr()) is shares
        assert (other[0].bias.data_ptr() == model[0].bias.data_ptr()) is shares


def test_dcp(tmp_path):
    import torch.distributed.checkpoint as dcp

    model, other = swapped(), swapped(seed=1)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_same_model(load_(float_model(2), state), model)
    other.load_state_dict(state)
    assert_same_model(other, model)


def test_low_precision(tmp_path):
    path = tmp_path / "m.safetensors"
    model = tersor.quantize_(float_model(dtype=torch.bfloat16), tersor.Int8Dynamic())
    save(model, path)
    other = load_(float_model(1, device="meta"), path)  # assigned: the file's dtype, all over
    x = inputs().bfloat16()
    assert torch.equal(other(x), model(x))
    assert other[0].weight.dtype == torch.bfloat16
    assert other[0].dequantize()(x).dtype == torch.bfloat16
    other = load_(float_model(1), path)  # copied: the model's dtype
    assert other[1].weight.dtype == other[0].bias.dtype == other[0].weight.dtype == torch.float32


def test_under_inference_mode_and_a_default_device(tmp_path):
    model, path = swapped(), tmp_path / "m.safetensors"
    with torch.inference_mode():
        save(model, path)
        state = {key: t.clone() for key, t in model.state_dict().items()}  # inference tensors
        for source in (path, state):
            for mmap in (True, False):
                with torch.inference_mode(False):
                    others = float_model(1), float_model(1, device="meta")
                with torch.device("meta"):
                    for other in others:
                        load_(other, source, mmap=mmap)
                for other in others:
                    held = [*other.parameters(), *other.buffers()]
                    assert not any(t.is_inference() or t.is_meta for t in held)
                    assert_same_model(other, model)
        made_inside = float_model(1)
    with pytest.raises(ValueError, match=r"1\.weight was made under inference_mode"):
        load_(made_inside, path)


def test_compiled_model_keeps_its_graph(tmp_path):
    from torch._dynamo.testing import CompileCounter

    path = tmp_path / "m.safetensors"
    counter = CompileCounter()
    model, compiled = swapped(), torch.compile(swapped(seed=1), backend=counter, fullgraph=True)
    x = inputs()
    compiled(x)
    save(model, path)
    assert load_(compiled, path) is compiled
    assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1
    save(compiled, path, overwrite=True)
    assert_same_model(load_(float_model(2), path), model)


def test_optimizer_survives(tmp_path):
    path = tmp_path / "m.safetensors"
    save(swapped(), path)
    other = float_model(1)
    optimizer = torch.optim.SGD([other[0].bias, other[1].weight], lr=1.0)
    load_(other, path)
    bias = other[0].bias.detach().clone()
    other(inputs()).sum().backward()
    optimizer.step()
    assert not torch.equal(other[0].bias, bias)


def test_encoder_layer_takes_no_float_fast_path(tmp_path):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    fresh = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    tersor.quantize_(model, tersor.Int8Dynamic())
    save(model, tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        y = load_(fresh, tmp_path / "m.safetensors")(x)
        assert torch.equal(y, model(x)) and not y.isnan().any()


# ---- ties


@pytest.mark.parametrize("how", ["save", "save_model", "pth"])
@pytest.mark.parametrize("target", ["float", "meta", "swapped"])
def test_ties_survive(tmp_path, how, target):
    model, path = swap_tied(tied(0)), tmp_path / "m"
    if how == "save":
        save(model, path)
        with safe_open(path, "pt") as file:
            aliases = json.loads(file.metadata()["aliases"])
            assert set(aliases) | set(file.keys()) == set(model.state_dict())
        assert {"b.weight_packed", "b.weight_scale", "again.bias", "head.weight"} <= set(aliases)
    elif how == "save_model":
        save_model(model, str(path))
    else:
        torch.save(model.state_dict(), path)
    other = tied(1, "meta" if target == "meta" else "cpu")
    if target == "swapped":
        swap_tied(other)
    load_(other, path)
    ids = torch.arange(8)
    assert torch.equal(other(ids), model(ids))
    assert other.b.weight_packed is other.a.weight_packed
    assert other.b.weight_scale.data_ptr() == other.a.weight_scale.data_ptr()
    assert other.again is other.a
    assert other.a is not other.b
    assert other.head.weight is other.embed.weight


def test_tied_in_the_file_only(tmp_path):
    path = tmp_path / "m.safetensors"
    save(swap_tied(tied(0)), path)
    for device in ("cpu", "meta"):
        other = tied(1, device)
        other.b = nn.Linear(8, 8, device=device)
        other.head = nn.Linear(8, 8, bias=False, device=device)
        load_(other, path)
        assert torch.equal(other.b.weight_packed, other.a.weight_packed)
        assert other.b.weight_packed.data_ptr() != other.a.weight_packed.data_ptr()  # the model decides what is tied
        assert other.head.weight.data_ptr() != other.embed.weight.data_ptr()


def test_tied_in_the_model_only():
    state = {key: t.clone() for key, t in swap_tied(tied(0)).state_dict().items()}
    load_(tied(1), state)  # equal values: no conflict
    state["b.weight_packed"][0, 0, 0] ^= 1
    state["head.weight"][0, 0] += 1
    other = tied(1)
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"b\.weight_packed differs from a\.weight_packed(?s:.*)head\.weight differs"):
        load_(other, state)
    assert_untouched(other, before)


def test_overlapping_views_are_saved_apart(tmp_path):
    whole = torch.arange(12.0)
    model = nn.Module()
    for name, t in (("front", whole[:8]), ("back", whole[4:]), ("third", whole[::3]), ("one", whole[:1])):
        model.register_buffer(name, t)
    save(model, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    assert {key: t.tolist() for key, t in stored.items()} == {key: t.tolist() for key, t in model.state_dict().items()}


# ---- what does not fit


def fused(**changes):
    """The state_dict of swapped(), with changes; None deletes."""
    state = {key: t.clone() for key, t in swapped().state_dict().items()} | changes
    return {key: t for key, t in state.items() if t is not None}


def raw_tag(**changes):
    tag = json.loads(bytes(encode_tag(Tag(tersor.Int8Dynamic(), H, K)).tolist())) | changes
    return bytes_tensor(json.dumps(tag).encode())


def bytes_tensor(data):
    return torch.tensor(list(data), dtype=torch.uint8)


BAD = {
    "N": ({"0._extra_state": encode_tag(Tag(tersor.Int8Dynamic(), H + 1, K))}, r"0 is .*out_features=34.*out_features=33"),
    "K": ({"0._extra_state": encode_tag(Tag(tersor.Int8Dynamic(), H, K + 1))}, r"0 is .*in_features=21.*in_features=20"),
    "format": ({"0._extra_state": encode_tag(Tag(tersor.Int8WeightOnly(), H, K))}, r"0 is Int8WeightOnly\(\).*Int8Dynamic\(\)"),
    "layout": ({"0._extra_state": raw_tag(layout=2)}, r"0: layout version 2"),
    "unknown format": ({"0._extra_state": raw_tag(format={"name": "int3"})}, r"0: format is 'int3'"),
    "no JSON": ({"0._extra_state": bytes_tensor(b"{")}, r"0: .*not JSON"),
    "deep JSON": ({"0._extra_state": bytes_tensor(b"[" * 4000)}, r"0: "),
    "huge tag": ({"0._extra_state": torch.zeros(1 << 20, dtype=torch.uint8)}, r"0: .*1048576 bytes"),
    "negative N": ({"0._extra_state": raw_tag(out_features=-1)}, r"0: .*out_features=-1"),
    "float tag": ({"0._extra_state": torch.zeros(8)}, r"0: .*uint8"),
    "tag not a tensor": ({"0._extra_state": {"n": 1}}, r"0: .*dict"),
    "no tag": ({"0._extra_state": None}, r"0 is a QuantLinear; .* no 0\._extra_state"),
    "no scale": ({"0.weight_scale": None}, r"0\.weight_scale is missing.*float32 \[33\]"),
    "short tiles": ({"0.weight_packed": torch.zeros(2, 5, 64, dtype=torch.uint8)}, r"uint8 \[2, 5, 64\], expected uint8 \[3, 5, 64\]"),
    "wrong dtype": ({"0.weight_packed": torch.zeros(3, 5, 64, dtype=torch.int8)}, r"int8 \[3, 5, 64\], expected uint8"),
    "half scale": ({"0.weight_scale": torch.zeros(H).half()}, r"0\.weight_scale is float16 \[33\], expected float32"),
    "unknown layer": ({"9._extra_state": encode_tag(Tag(tersor.Int8Dynamic(), 4, 4))}, r"9 is Int8Dynamic.*no module of that name"),
    "not a linear": ({"1._extra_state": encode_tag(Tag(tersor.Int8Dynamic(), H, H))}, r"1 is Int8Dynamic.*LayerNorm in the model"),
    "norm size": ({"1.weight": torch.zeros(H + 1)}, r"1\.weight is float32 \[34\], expected float32 \[33\]"),
    "norm kind": ({"1.weight": torch.zeros(H, dtype=torch.int32)}, r"1\.weight is int32 \[33\], expected float32"),
    "counter kind": ({"2.num_batches_tracked": torch.tensor(0.5)}, r"num_batches_tracked is float32 \[\], expected int64"),
    "meta": ({"1.weight": torch.zeros(H, device="meta")}, r"1\.weight is meta"),
    "sparse": ({"1.weight": torch.zeros(H).to_sparse()}, r"1\.weight is meta, sparse"),
}  # fmt: skip


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit(name, strict):
    changes, match = BAD[name]
    models = [swapped(seed=1)] if name in ("format", "no tag") else [swapped(seed=1), float_model(1), float_model(1, device="meta")]
    for other in models:
        before = snapshot(other)
        with pytest.raises(ValueError, match=match):
            load_(other, fused(**changes), strict=strict)
        assert_untouched(other, before)


def test_every_problem_is_listed():
    changes = {name: value for case in ("N", "norm size") for name, value in BAD[case][0].items()}
    state = fused(**changes, **{"2.running_var": None, "stray": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"nothing was changed:\n(?s:.*)0 is (?s:.*)1\.weight is (?s:.*)missing: 2\.running_var"
    ) as info:
        load_(float_model(1), state)
    assert "unexpected: stray" in str(info.value)
    assert "0.weight_packed" not in str(info.value)  # follows from the wrong N; would hide the reason


def test_a_size_that_lies_needs_no_memory():
    n = k = 2**40 - 1
    other = nn.Sequential(nn.Linear(4, 4))
    other[0].in_features, other[0].out_features = k, n
    with pytest.raises(ValueError, match="above 132104"):
        load_(other, {"0._extra_state": encode_tag(Tag(tersor.Int8Dynamic(), n, k))})
    other[0].in_features = 132104
    with pytest.raises(ValueError, match=r"weight_packed is missing; .* uint8 \[68719476736, 33026, 64\]"):
        load_(other, {"0._extra_state": encode_tag(Tag(tersor.Int8Dynamic(), n, 132104))})


def test_strict_false(caplog):
    state = fused(**{"1.weight": None, "stray": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing: 1\.weight\n  unexpected: stray"):
        load_(float_model(1), state)
    other = float_model(1)
    load_(other, state, strict=False)
    assert "missing in the state_dict: 1.weight" in caplog.text
    assert "unexpected in the state_dict: stray" in caplog.text
    assert torch.equal(other[0].weight_packed, state["0.weight_packed"])
    with pytest.warns(UserWarning, match=r"still on meta after load_: 1\.weight;"):
        load_(float_model(1, device="meta"), state, strict=False)


def test_float_checkpoints():
    assert_same_model(load_(float_model(1), float_model(0).state_dict()), float_model(0))
    with pytest.raises(ValueError, match=r"0 is a QuantLinear; .*float weight: load it before quantize_"):
        load_(swapped(), float_model(0).state_dict())


def test_roots():
    layer = QuantLinear.from_linear(nn.Linear(4, 4))
    other = load_(QuantLinear(4, 4), layer.state_dict())
    assert torch.equal(other.weight_packed, layer.weight_packed)
    with pytest.raises(ValueError, match="the root is Int8Dynamic.*cannot be replaced in place"):
        load_(nn.Linear(4, 4), layer.state_dict())


def test_hooks_are_not_lost():
    other = float_model(1)
    other[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="0 is Int8Dynamic.*hooks"):
        load_(other, fused())


def test_extra_states_of_other_modules():
    class Counter(nn.Module):
        seen = None

        def get_extra_state(self):
            return {"seen": 3}

        def set_extra_state(self, state):
            self.seen = state

    def make():
        return nn.Sequential(nn.Linear(4, 4), Counter())

    model = tersor.quantize_(make(), tersor.Int8Dynamic())
    assert load_(make(), model.state_dict())[1].seen == {"seen": 3}
    with pytest.raises(ValueError, match=r"missing: 1\._extra_state"):
        load_(make(), {key: t for key, t in model.state_dict().items() if not key.startswith("1.")})
