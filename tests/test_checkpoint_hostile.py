"""save and load_ on what nobody should give them: a refused load leaves the model as it was, a refused save leaves the file."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import zipfile

import pytest
import torch
from checkpoint_models import assert_same_model, assert_untouched, float_model, snapshot, swapped
from safetensors.torch import load_file, save_file
from torch import nn

import tersor
from tersor.checkpoint import load_, save
from tersor.formats import Tag, encode_tag
from tersor.nn import QuantLinear


def holding(**buffers):
    model = nn.Module()
    for name, t in buffers.items():
        model.register_buffer(name, t)
    return model


def nested():
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


# ---- save


def test_conjugate_and_negative_views_are_saved_as_their_values(tmp_path):
    z, f = torch.tensor([1 + 2j, 3 + 4j]), torch.tensor([1.0, 2.0])
    alone = torch._neg_view(torch.tensor([5.0]))
    model = holding(z=z, conjugate=z.conj(), f=f, negative=torch._neg_view(f), alone=alone)
    save(model, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    assert stored["conjugate"].tolist() == [1 - 2j, 3 - 4j] and stored["negative"].tolist() == [-1.0, -2.0]
    assert stored["alone"].tolist() == [-5.0]
    for device in ("cpu", "meta"):
        other = holding(**{name: torch.zeros_like(t, device=device) for name, t in model.named_buffers()})
        load_(other, model.state_dict())
        for name, t in model.named_buffers():
            assert torch.equal(getattr(other, name), t), name
            assert not getattr(other, name).is_neg() and not getattr(other, name).is_conj()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_stored_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"precious")
    for model, match in (
        (holding(__metadata__=torch.ones(3)), r"__metadata__ \(the file keeps its metadata under this name; rename the tensor\)"),
        (holding(n=nested()), r"n \(a nested tensor; pad it first\)"),
        (holding(s=torch.eye(3).to_sparse_csr()), r"s \(torch\.sparse_csr; make it dense first\)"),
    ):
        with pytest.raises(ValueError, match=match):
            save(model, path, overwrite=True)
    assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_during_the_writing_is_kept(tmp_path, monkeypatch, links):
    import safetensors.torch

    path, write = tmp_path / "m.safetensors", safetensors.torch.save_file

    def slowly(tensors, part, metadata):
        write(tensors, part, metadata)
        path.write_bytes(b"of another process")

    monkeypatch.setattr("safetensors.torch.save_file", slowly)
    if not links:
        monkeypatch.setattr(os, "link", lambda a, b: (_ for _ in ()).throw(OSError("no links on this file system")))
    with pytest.raises(FileExistsError, match="exists; pass overwrite=True"):
        save(swapped(), path)
    assert path.read_bytes() == b"of another process" and os.listdir(tmp_path) == ["m.safetensors"]
    save(swapped(), path, overwrite=True)
    monkeypatch.setattr("safetensors.torch.save_file", write)
    save(swapped(), tmp_path / "new.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "new.safetensors"]
    assert (tmp_path / "new.safetensors").stat().st_nlink == 1


def test_full_disk(tmp_path):
    path, before = tmp_path / "m.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"precious")
    model = nn.Sequential(nn.Linear(256, 256))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100000, before[1]))
    try:
        with pytest.raises(OSError, match=r"m\.safetensors.*disk may be full"):
            save(model, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"precious" and os.listdir(tmp_path) == ["m.safetensors"]


def test_folder_that_refuses(tmp_path, monkeypatch):
    """As a read-only folder does, also where the tests run as root."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"save: cannot write in .* \(Permission denied\); choose another folder"):
        save(swapped(), tmp_path / "m.safetensors")


def test_streams_are_refused_by_name():
    with pytest.raises(TypeError, match="load_: got BytesIO, expected the path of a file or a state_dict"):
        load_(float_model(), io.BytesIO())
    with pytest.raises(TypeError, match=r"save: path is BytesIO, expected str or os\.PathLike"):
        save(float_model(), io.BytesIO())


# ---- load_


def refused(model, source, match, **options):
    before = snapshot(model)
    with pytest.raises(ValueError, match=match) as info:
        load_(model, source, **options)
    assert "nothing was changed" in str(info.value)
    assert_untouched(model, before)
    return str(info.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["expanded", "sparse", "nested"])
def test_targets_that_torch_cannot_write_are_found_before_anything_changes(kind, caplog):
    target = {"expanded": lambda: torch.zeros(1).expand(3), "sparse": lambda: torch.zeros(3).to_sparse(), "nested": nested}[kind]()
    model = holding(first=torch.zeros(3), odd=target, last=torch.zeros(3))
    state = {name: torch.ones(3) for name in ("first", "odd", "last")}
    for strict in (True, False):
        refused(model, state, f"odd is .*{kind}.* in the model and cannot be written in place", strict=strict)
    assert not model.first.any() and not model.last.any()
    del state["odd"]
    refused(model, state, "missing: odd")
    load_(model, state, strict=False)
    assert model.first.all() and model.last.all() and model.odd is target
    assert "missing in the state_dict: odd" in caplog.text


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_values_that_are_no_plain_tensors():
    state = swapped().state_dict()
    for odd in (nested(), torch.zeros(33).to_sparse()):
        refused(float_model(1), state | {"1.weight": odd}, r"1\.weight is meta, sparse, nested, sharded")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tags_of_every_odd_kind():
    tag = encode_tag(Tag(tersor.Int8Dynamic(), 33, 20))

    def edited(old, new):
        return torch.tensor(list(bytes(tag.tolist()).replace(old, new)), dtype=torch.uint8)

    state = swapped().state_dict()
    for odd, match in (
        (tag.to_sparse(), r"0: the layer's tag must be a 1-d uint8 tensor of JSON, got torch\.sparse_coo torch\.uint8"),
        (nested(), r"0: .* got a nested tensor"),
        (tag.to("meta"), r"0: .* got torch\.uint8 \[\d+\] on meta"),
        (tag[None], r"0: .* got torch\.uint8 \[1, \d+\]"),
        (edited(b'"int8-dynamic"', b"[1]"), r"0: format is \[1\], expected one of: int8-dynamic"),
        (edited(b'"int8-dynamic"', b"null"), r"0: format is None, expected one of"),
        (edited(b'"name"', b'"self": 1, "name"'), r"0: format 'int8-dynamic' has unknown fields: self"),
        (edited(b"33", b"33.0"), r"0: the layer's tag says out_features=33\.0"),
        (edited(b"33", b"true"), r"0: the layer's tag says out_features=True"),
        (edited(b"33", b"9" * 1000), r"0: the layer's tag says out_features=999"),
        (edited(b"33", b"9" * 3500 + b"e9"), r"0: the layer's tag "),
        (edited(b"{", b"\xff{"), r"0: the layer's tag is not JSON"),
        (edited(b'"layout": 1', b'"layout": true'), r"0: the layer's tag has no layout version"),
        (edited(b'"layout": 1', b'"layout": 0'), r"0: layout version 0, this package reads 1 to 1"),
    ):
        refused(float_model(1), state | {"0._extra_state": odd}, match)


def test_an_extra_state_that_its_module_refuses_changes_nothing():
    class Picky(nn.Module):
        def __init__(self, seen):
            super().__init__()
            self.seen = seen

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            seen = state.pop("seen")  # a second call with the same object would fail
            if seen > 5:
                raise KeyError("seen is above 5")
            self.seen = seen

    def make(*seen):
        return nn.Sequential(nn.Linear(4, 4), *(Picky(n) for n in seen), nn.LayerNorm(4))

    source = tersor.quantize_(make(1, 9), tersor.Int8Dynamic())
    model = make(3, 4)
    refused(model, source.state_dict(), r"2 \(Picky\) refused 2\._extra_state from the state_dict; .*KeyError.*above 5")
    assert [model[1].seen, model[2].seen] == [3, 4] and type(model[0]) is nn.Linear
    source[2].seen = 5
    load_(model, source.state_dict())
    assert [model[1].seen, model[2].seen] == [1, 5]


def test_a_hook_that_fails_is_a_value_error_that_says_so():
    def hook(module, incompatible):
        raise KeyError("not mine")

    model = float_model(1)
    model[1].register_load_state_dict_post_hook(hook)
    with pytest.raises(ValueError, match=r"a module refused its state from the state_dict, part of it is loaded: 'not mine'"):
        load_(model, swapped().state_dict())


def test_swapped_and_renamed_tensors(tmp_path):
    """Tensors of a file under each other's names: the sizes find it, whatever the header says."""
    path, state = tmp_path / "m.safetensors", dict(swapped().state_dict())
    for a, b, match in (
        ("0.weight_packed", "3.weight_packed", r"0\.weight_packed is uint8 \[2, 9, 64\], expected uint8 \[3, 5, 64\]"),
        ("0._extra_state", "3._extra_state", r"0 is Int8Dynamic\(\) with out_features=17, .* out_features=33"),
        ("0.weight_scale", "0.weight_packed", r"0\.weight_packed is float32 \[33\]"),
        ("0._extra_state", "0.weight_scale", r"0: the layer's tag must be a 1-d uint8"),
    ):
        save_file(state | {a: state[b], b: state[a].clone()}, path)
        refused(float_model(1), path, match)


def test_names_that_are_metadata_elsewhere(tmp_path):
    save_file({"pt": torch.ones(3)}, tmp_path / "m.safetensors", {"format": "pt"})  # as everybody writes it: no alias
    other = load_(holding(pt=torch.zeros(3)), tmp_path / "m.safetensors")
    assert other.pt.all()


def test_pth_whose_tensors_claim_more_than_is_stored(tmp_path):
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save({"0.weight": torch.zeros(4, 4), "0.bias": torch.ones(4)}, good)
    with zipfile.ZipFile(good) as read, zipfile.ZipFile(bad, "w") as write:
        for item in read.infolist():
            data = read.read(item)
            if item.filename.endswith("data.pkl"):
                sizes = b"K\x04K\x04\x86"
                assert sizes in data
                data = data.replace(sizes, b"K\x04K\x7f\x86").replace(b"K\x04K\x01\x86", b"K\x7fK\x01\x86")
            write.writestr(item.filename, data)
    for mmap in (True, False):
        model = nn.Sequential(nn.Linear(4, 127, bias=True))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"bad\.pth is not a \.pth file that torch\.load\(weights_only=True\) can read"):
            load_(model, bad, mmap=mmap)
        assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("mmap", [True, False])
def test_writing_to_a_loaded_tensor_never_reaches_the_file(tmp_path, kind, mmap):
    path, model = tmp_path / f"m.{kind}", swapped()
    save(model, path) if kind == "safetensors" else torch.save(model.state_dict(), path)
    before = path.read_bytes()
    for make in (float_model, lambda: float_model(device="meta")):
        loaded = load_(make(), path, mmap=mmap)
        with torch.no_grad():
            for t in loaded.state_dict().values():
                t.fill_(1)
        assert path.read_bytes() == before
        assert_same_model(load_(float_model(3), path), model)  # nor another model's mapping


# ---- memory


MEMORY = """
import sys, torch, tersor
from torch import nn
K, N, LAYERS = 4096, 3072, 4          # 48 MiB a float layer: malloc gives such blocks back at once
path, device = sys.argv[1:]
torch.set_num_threads(1)

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def reset():
    open("/proc/self/clear_refs", "w").write("5")

with torch.device(device):
    model = nn.Sequential(*(nn.Linear(K, N) for _ in range(LAYERS)))
small = nn.Sequential(tersor.nn.QuantLinear(4, 4))
tersor.save(small, path + ".small")     # what is imported once is not counted
tersor.load_(small, path + ".small")
reset()
start = kib("VmRSS")
tersor.load_(model, path, mmap=False)
print((kib("VmHWM") - start) // 1024)
reset()
start = kib("VmRSS")
tersor.save(model, path + ".again")
print((kib("VmHWM") - start) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="asks Linux for the peak")
@pytest.mark.parametrize(("device", "load_mib"), [("cpu", 24), ("meta", 108)])
def test_peak_memory(tmp_path, device, load_mib):
    """A layer at a time: loading into a float model needs one packed layer (12 MiB) beside it, not four. save copies nothing.

    What Linux reports as resident counts the pages of the mapped file that were read (48 MiB at most), which it can drop.
    """
    model = nn.Sequential(*(QuantLinear(4096, 3072) for _ in range(4)))
    save(model, tmp_path / "m.safetensors")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m.safetensors"), device]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) <= load_mib, f"load_ took {out[0]} MiB"
    assert int(out[1]) <= 24, f"save took {out[1]} MiB"
