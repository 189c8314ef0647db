"""Models, inputs and comparisons shared by the tests of save and load_."""

import pathlib

import torch
from cases import fitting
from torch import nn

import tersor

DATA = pathlib.Path(__file__).parent / "data"
K, H, N = 20, 33, 17  # no multiples of the tile


def float_model(seed=0, dtype=torch.float32, device="cpu", fmt=None):
    """Sizes K, H, N, or the next that `fmt` can hold."""
    torch.manual_seed(seed)
    k, h = fitting(fmt, K), fitting(fmt, H)
    with torch.device(device):
        model = nn.Sequential(nn.Linear(k, h), nn.LayerNorm(h), nn.BatchNorm1d(h), nn.Linear(h, N, bias=False))
    return model.to(dtype).eval()


def swapped(fmt=None, seed=0):
    model = tersor.quantize_(float_model(seed, fmt=fmt), fmt or tersor.Int8Dynamic())
    model[2].running_mean.fill_(0.25)
    return model


def inputs(k=K):
    return torch.randn(5, k, generator=torch.Generator().manual_seed(7))


def assert_same_model(got, want):
    x = inputs(getattr(next(got.children(), None), "in_features", K))
    torch.testing.assert_close(got(x), want(x), rtol=0, atol=0)
    a, b = got.state_dict(), want.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def snapshot(model):
    """Every module and tensor object of `model`, with the tensor's count of changes in place."""
    modules = list(model.named_modules(remove_duplicate=False))
    tensors = [(name, t) for m in model.modules() for held in (m._parameters, m._buffers) for name, t in held.items()]
    return modules, [(name, t, None if t is None else t._version) for name, t in tensors]


def assert_untouched(model, before):
    for then, now in zip(before, snapshot(model), strict=True):
        assert len(then) == len(now)
        for a, b in zip(then, now, strict=True):
            assert a[0] == b[0]
            assert a[1] is b[1], a[0]
            assert a[2:] == b[2:], a[0]


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
