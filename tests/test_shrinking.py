"""shrink: what stays are the teacher's own weights, and what goes is what matters least."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tersor


def mlp() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5)).eval()
    net[1].running_mean.normal_(std=0.1)  # no unit of its own is silent
    return net


class Block(nn.Module):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.norm, self.gate_proj, self.up_proj, self.down_proj = (
            nn.LayerNorm(16),
            *(nn.Linear(16, 32) for _ in "ab"),
            nn.Linear(32, 16),
        )
        self.gain = gain

    def forward(self, x):
        h = self.norm(x)
        return x + self.gain * self.down_proj(nn.functional.silu(self.gate_proj(h)) * self.up_proj(h))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(gain) for gain in (1.0, 0.01, 2.0, 0.02, 1.0))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_units_without_effect_go_first():
    net, x = mlp(), torch.randn(300, 16)
    with torch.no_grad():
        net[3].weight[:, ::2] = 0  # half of fc1's units are read by nobody
        net[5].weight[:, ::2] = 0
    student = tersor.shrink(net, width=0.5, inputs=x)
    assert [tuple(student[i].weight.shape) for i in (0, 1, 3, 5)] == [(32, 16), (32,), (24, 32), (5, 24)]
    assert (student[0].out_features, student[3].in_features, student[1].num_features) == (32, 32, 32)
    assert torch.equal(student[0].weight, net[0].weight[1::2])
    assert relative(student(x), net(x)) <= 1e-5


def test_the_layer_after_makes_up_for_what_went():
    net, x = mlp(), torch.randn(500, 16)
    test = torch.randn(500, 16)
    student = tersor.shrink(net, width=24, inputs=x)
    plain = copy.deepcopy(net)  # the same cut without the fit: the least worthy units at zero
    with torch.no_grad():
        for i, reader in ((2, 3), (4, 5)):
            h = plain[: i + 1](x)
            worth = h.square().mean(0) * plain[reader].weight.square().sum(0)
            plain[reader].weight[:, worth.argsort(descending=True)[24:]] = 0
    assert relative(student(test), net(test)) <= 0.7 * relative(plain(test), net(test))


def test_whole_width_is_the_model_itself():
    net, x = mlp(), torch.randn(30, 16)
    assert torch.equal(tersor.shrink(net, width=1.0, inputs=x)(x), net(x))


def test_gated_units_are_cut_together():
    net, x = Model().eval(), torch.randn(200, 16)
    student = tersor.shrink(net, width=0.5, inputs=x)
    layer = student.layers[0]
    assert layer.gate_proj.weight.shape == layer.up_proj.weight.shape == (16, 16) and layer.down_proj.weight.shape == (16, 16)
    assert relative(student(x), net(x)) <= 0.35
    assert net.layers[0].down_proj.in_features == 32  # the teacher is as it was


def test_blocks_that_change_least_go_first():
    net, x = Model().eval(), torch.randn(200, 16)
    student = tersor.shrink(net, depth=3, inputs=x)
    assert [layer.gain for layer in student.layers] == [1.0, 2.0, 1.0]
    assert relative(student(x), net(x)) <= 0.05
    assert [layer.gain for layer in tersor.shrink(net, depth=0.6).layers] == [1.0, 2.0, 1.0]  # evenly spaced
    assert [layer.gain for layer in tersor.shrink(net, depth=2).layers] == [1.0, 1.0]
    assert next(iter(student.state_dict())).startswith("layers.0.") and len(net.layers) == 5


def test_transformer_encoders_know_their_depth():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 4, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    student = tersor.shrink(encoder, depth=2, width=0.5, inputs=x)
    assert student.num_layers == 2 and student.layers[1].linear1.out_features == 16
    assert student(x).shape == x.shape


def test_units_that_mix_are_refused():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.fc2(self.fc1(x).softmax(-1))

    with pytest.raises(ValueError, match="depend on each other"):
        tersor.shrink(Mixed().eval(), width=0.5, inputs=torch.randn(40, 16))


def test_bad_arguments():
    x = torch.randn(8, 16)
    for arguments, message in (
        ({}, "give depth"),
        ({"width": 0.5}, "width needs inputs"),
        ({"width": 0, "inputs": x}, "width is 0"),
        ({"width": 65, "inputs": x}, "an int from 1 to"),
        ({"depth": 2}, "no nn.ModuleList"),
    ):
        with pytest.raises(ValueError, match=message):
            tersor.shrink(mlp(), **arguments)
    with pytest.raises(ValueError, match=r"depth is 6, expected an int from 1 to 5"):
        tersor.shrink(Model(), depth=6)
    with pytest.raises(ValueError, match="found no linear layers"):
        tersor.shrink(nn.Sequential(nn.Linear(16, 4)), width=0.5, inputs=x)
