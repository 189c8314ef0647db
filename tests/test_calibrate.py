"""calibrate and its observers: the scales of Int8Static, and the warning where one scale cannot do."""

from __future__ import annotations

import logging
from collections import UserDict

import pytest
import torch
from torch import nn

import tersor
from tersor.observers import CODES, OBSERVERS, Magnitudes, MeanSquaredError, MinMax, Percentile


def seen(*parts: torch.Tensor) -> Magnitudes:
    magnitudes = Magnitudes()
    for part in parts:
        magnitudes.add(part)
    return magnitudes


def exact_squared_error(x: torch.Tensor, scale: float) -> float:
    return ((x / scale).round().clamp(-CODES, CODES).mul(scale) - x).double().square().sum().item()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 8)

    def forward(self, *, values: torch.Tensor) -> torch.Tensor:
        return self.linear(values)


@pytest.mark.parametrize("many", [False, True])
def test_what_a_tokenizer_gives_is_keywords(many: bool):
    """transformers' BatchEncoding is a UserDict: a mapping, but no dict."""
    net, given = Named(), UserDict(values=torch.randn(5, 32))
    config = tersor.calibrate(net, tersor.Int8Static(), [given, given] if many else given, observer="minmax")
    assert config == {"linear": tersor.Int8Static(given["values"].abs().max().item() / CODES)}
    assert tersor.quantize_(net, config, only_if_faster=given) is net


def test_minmax_is_the_largest_of_all_batches():
    x = torch.randn(3, 50, 16)
    assert MinMax().scale(seen(*x)) == x.abs().max().item() / CODES


@pytest.mark.parametrize("percent", [50, 99, 99.9, 100])
def test_percentile_lies_within_a_bin_of_the_exact_one(percent):
    torch.manual_seed(1)
    x = torch.randn(2000, 32)
    x[:700] *= 0.01  # a batch unlike the other
    want = x.abs().flatten().double().quantile(percent / 100).item()
    got = Percentile(percent).scale(seen(x[:700], x[700:])) * CODES
    assert want * (1 - 2**-7) <= got <= want * (1 + 2**-6)  # a bin is at most 2**-7 of its value; order statistics add a gap


def test_mse_is_the_least_on_data_with_an_outlier():
    torch.manual_seed(2)
    x = torch.randn(4000, 16)
    x[0, 0] = 60.0
    got = MeanSquaredError().scale(seen(x))
    errors = {ratio: exact_squared_error(x, x.abs().max().item() / CODES * ratio / 64) for ratio in range(1, 65)}
    # Its model of the error is not exact, so the choice may be a neighbour of the best: never worse than both.
    assert exact_squared_error(x, got) <= 1.05 * min(errors.values())
    assert got < x.abs().max().item() / CODES  # 60 is clipped


def test_every_observer_by_name():
    config = {name: tersor.calibrate(model(), tersor.Int8Static(), torch.randn(64, 32), observer=name) for name in OBSERVERS}
    assert {tuple(found) for found in config.values()} == {("0", "2")}
    with pytest.raises(ValueError, match="'minmax', 'percentile', 'mse'"):
        tersor.calibrate(model(), tersor.Int8Static(), torch.randn(4, 32), observer="max")
    with pytest.raises(ValueError, match="percent is 0"):
        Percentile(0)


def test_config_is_ready_for_quantize():
    net, x = model(), torch.randn(256, 32)
    config = tersor.calibrate(net, tersor.Int8Static(), [x[:100], x[100:]], observer="minmax")
    inner = net[1](net[0](x))
    assert [fmt.input_scale for fmt in config.values()] == pytest.approx(
        [x.abs().max().item() / 127, inner.abs().max().item() / 127]
    )
    packed = tersor.quantize_(model(), config)
    assert (packed(x) - net(x)).norm() <= 0.02 * net(x).norm()


def test_other_formats_and_given_scales_stay():
    config = {"0": tersor.Int8Static(0.5), "2": tersor.Int8Dynamic()}
    assert tersor.calibrate(model(), config, torch.randn(4, 32)) == config
    assert tersor.calibrate(model(), config, torch.randn(4, 32))["0"].input_scale == 0.5


def test_modes_and_weights_stay():
    net = model().train()
    net[1].eval()
    before = [p.clone() for p in net.parameters()]
    tersor.calibrate(net, tersor.Int8Static(), torch.randn(4, 32))
    assert net.training and net[0].training and not net[1].training
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_rows_far_larger_than_the_rest_are_warned_of(caplog):
    x = torch.randn(200, 32)
    x[3] *= 1000
    with caplog.at_level(logging.WARNING, "tersor"):
        tersor.calibrate(model(), {"0": tersor.Int8Static()}, x, observer="minmax")
    assert "cannot do for 1 layers, it is so coarse" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tersor"):
        tersor.calibrate(model(), {"0": tersor.Int8Static()}, x, observer=Percentile(99))
    assert "cannot do for 1 layers, it is so fine" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tersor"):
        tersor.calibrate(model(), tersor.Int8Static(), torch.randn(200, 32), observer="minmax")
    assert not caplog.text


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_inputs_that_give_no_scale(value):
    x = torch.randn(8, 32) if value else torch.zeros(8, 32)
    x[1, 1] = value
    with pytest.raises(ValueError, match=r"calibrate: 0: inputs"):
        tersor.calibrate(model(), tersor.Int8Static(), x)


def test_a_layer_that_is_never_called():
    net = model()
    net.unused = nn.Linear(4, 4)
    net.forward = lambda x: net[2](net[1](net[0](x)))
    with pytest.raises(ValueError, match="unused: inputs never reach it"):
        tersor.calibrate(net, tersor.Int8Static(), torch.randn(4, 32))
