"""Models, inputs and comparisons shared by the tests of save and load_."""

import pathlib

import torch
from torch import nn

import tersor
from tersor.formats import FORMATS

DATA = pathlib.Path(__file__).parent / "data"
FORMAT_CLASSES = list(FORMATS.values())
K, H, N = 20, 33, 17  # no multiples of the tile


def float_model(seed=0, dtype=torch.float32, device="cpu"):
    torch.manual_seed(seed)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(K, H), nn.LayerNorm(H), nn.BatchNorm1d(H), nn.Linear(H, N, bias=False))
    return model.to(dtype).eval()


def swapped(fmt=None, seed=0):
    model = tersor.quantize_(float_model(seed), fmt or tersor.Int8Dynamic())
    model[2].running_mean.fill_(0.25)
    return model


def inputs():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(7))


def assert_same_model(got, want):
    x = inputs()
    torch.testing.assert_close(got(x), want(x), rtol=0, atol=0)
    a, b = got.state_dict(), want.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def snapshot(model):
    return [(name, id(m)) for name, m in model.named_modules()], {
        key: (t.data_ptr(), t._version, t.clone()) for key, t in model.state_dict().items()
    }


def assert_untouched(model, before):
    modules, tensors = before
    assert [(name, id(m)) for name, m in model.named_modules()] == modules
    for key, t in model.state_dict().items():
        assert torch.equal(t, tensors[key][2]) or t.is_meta, key


class Tied(nn.Module):
    """Two layers with one weight, one layer in two places, and a tie among float modules."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.again = self.a
        self.embed, self.norm = nn.Embedding(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(self.again(self.b(self.a(self.embed(ids))))))


def tied(seed, device="cpu"):
    torch.manual_seed(seed)
    with torch.device(device):
        return Tied()


def swap_tied(model):
    return tersor.quantize_(model, {"a": tersor.Int8Dynamic(), "b": tersor.Int8Dynamic(), "again": tersor.Int8Dynamic()})
