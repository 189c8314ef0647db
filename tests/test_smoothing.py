"""smooth_: the float model stays the same bit for bit, its quantised layers come closer to it."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import tersor
from tersor.smoothing import Pair, find_pairs

DIM, HEADS, KV, HEAD = 32, 4, 2, 8


class Attention(nn.Module):
    """Grouped queries, as in Llama."""

    head_dim = HEAD

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, HEADS * HEAD, bias=False)
        self.k_proj = nn.Linear(DIM, KV * HEAD, bias=False)
        self.v_proj = nn.Linear(DIM, KV * HEAD, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD, DIM, bias=False)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, HEAD).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (z.repeat_interleave(HEADS // KV, 1) for z in (k, v))
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(DIM, 64), nn.Linear(DIM, 64), nn.Linear(64, DIM)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = nn.RMSNorm(DIM), Attention(), nn.LayerNorm(DIM), Mlp()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def model() -> nn.Module:
    """Two blocks whose norms and values have outlier channels."""
    torch.manual_seed(0)
    net = nn.Sequential(Block(), Block()).eval()
    with torch.no_grad():
        for block in net:
            for weight in (block.norm1.weight, block.norm2.weight):
                weight.copy_(torch.where(torch.arange(DIM) % 16 == 3, 40.0, 1.0))
            block.mlp.up_proj.weight[5] *= 30
            block.attention.v_proj.weight[2] *= 30
    return net


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_pairs_that_are_found():
    want = []
    for i in "01":
        want += [
            Pair(f"{i}.norm1", (f"{i}.attention.q_proj", f"{i}.attention.k_proj", f"{i}.attention.v_proj")),
            Pair(f"{i}.norm2", (f"{i}.mlp.gate_proj", f"{i}.mlp.up_proj")),
            Pair(f"{i}.attention.v_proj", (f"{i}.attention.o_proj",)),
            Pair(f"{i}.mlp.up_proj", (f"{i}.mlp.down_proj",)),
        ]
    net = model()
    before = copy.deepcopy(net.state_dict())
    found = find_pairs(net, torch.randn(2, 6, DIM))
    assert set(found) == set(want) and len(found) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize("fmt", [tersor.Int8Dynamic(), tersor.Int8Static()], ids=str)
def test_the_float_model_stays_and_the_quantised_one_gains(fmt):
    net, x = model(), torch.randn(16, 6, DIM)
    want = net(x)
    smooth = tersor.smooth_(copy.deepcopy(net), x, format=fmt)
    assert torch.equal(smooth(x), want)

    def error(m):
        config = tersor.calibrate(m, fmt, x, observer="minmax")
        return relative(tersor.quantize_(copy.deepcopy(m), config)(x), want)

    assert error(smooth) <= 0.6 * error(net)


def test_a_norm_that_others_read_stays():
    """A block with its norm last: the residual reads what the linear layers read."""

    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

        def forward(self, x):
            x = self.norm(x)
            return x + self.down(self.up(x).relu())

    net = PostNorm().eval()
    assert find_pairs(net, torch.randn(4, DIM)) == []
    with pytest.raises(ValueError, match="cannot move along norm -> up"):
        tersor.smooth_(net, torch.randn(4, DIM), pairs=[Pair("norm", ("up",))])


def test_gelu_between_is_refused_relu_is_not():
    def mlp(activation):
        return nn.Sequential(OrderedDict(up_proj=nn.Linear(DIM, 64), act=activation, down_proj=nn.Linear(64, DIM))).eval()

    assert find_pairs(mlp(nn.GELU()), torch.randn(4, DIM)) == []
    assert find_pairs(mlp(nn.ReLU()), torch.randn(4, DIM)) == [Pair("up_proj", ("down_proj",))]


def test_tied_weights_stay():
    net = model()
    net[1].mlp.down_proj.weight = net[0].mlp.down_proj.weight
    assert not any("down_proj" in target for pair in find_pairs(net, torch.randn(2, 6, DIM)) for target in pair.targets)


def test_one_alpha_is_taken_as_it_is():
    net, x = model(), torch.randn(16, 6, DIM)
    moved = tersor.smooth_(copy.deepcopy(net), x, alpha=1.0)
    absmax = moved[0].norm1(x).abs().amax((0, 1))
    assert absmax.max() / absmax.min() < 4.0 + 1e-3  # equal but for the rounding of s to powers of two, half a power on either side


def test_bad_arguments():
    x = torch.randn(2, 6, DIM)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        tersor.smooth_(model(), x, alpha=1.5)
    with pytest.raises(ValueError, match="format is Ternary"):
        tersor.smooth_(model(), x, format=tersor.Ternary())
    with pytest.raises(ValueError, match="pairs name 'nothing'"):
        tersor.smooth_(model(), x, pairs=[Pair("nothing", ("0.mlp.up_proj",))])
    with pytest.raises(ValueError, match="does not fit"):
        tersor.smooth_(model(), x, pairs=[Pair("0.norm1", ("0.mlp.down_proj",))])
