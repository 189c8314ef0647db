"""only_if_faster: which layers are measured with which rows, what decides, and where it is recorded. Times are stand-ins here: the
real ones are bench/targets.py's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import tersor
from tersor import choice


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(32, 64)
        self.narrow = nn.Linear(64, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, again: bool = False) -> torch.Tensor:
        y = self.narrow(torch.relu(self.wide(x)))
        return self.narrow(torch.relu(self.wide(x[:1]))) if again else y


@pytest.fixture
def seconds(monkeypatch) -> dict[tuple[int, int], tuple[float, float]]:
    """{(out_features, M): (float, packed)} that the measurement reports; every other case is a tie that float wins."""
    table: dict[tuple[int, int], tuple[float, float]] = {}
    calls: list[tuple[int, int]] = []

    def measure(linear: nn.Linear, packed: tersor.QuantLinear, m: int) -> tuple[float, float]:
        assert isinstance(packed, tersor.QuantLinear)
        calls.append((linear.out_features, m))
        return table.get((linear.out_features, m), (1.0, 1.0))

    monkeypatch.setattr(choice, "_measure", measure)
    table[(0, 0)] = calls  # type: ignore[assignment]
    return table


def swapped(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, tersor.QuantLinear)]


def test_faster_layers_are_swapped_and_remember_it(seconds, tmp_path: Path, caplog):
    seconds[(64, 1)] = (3.0, 1.5)
    seconds[(8, 1)] = (1.0, 1.1)
    net = Net()
    with caplog.at_level(logging.INFO, "tersor"):
        tersor.quantize_(net, tersor.Int8Dynamic(), only_if_faster=1)
    assert swapped(net) == ["wide"]
    assert "2 layers stay float, which is as fast here: narrow, unused" in caplog.text
    assert net.wide.speedup == {1: 2.0}
    assert "speedup={1: 2.0}" in repr(net)
    tersor.save(net, tmp_path / "net.safetensors")
    loaded = tersor.load_(Net(), tmp_path / "net.safetensors")
    assert swapped(loaded) == ["wide"]
    assert loaded.wide.speedup == {1: 2.0}
    again = Net()
    tersor.quantize_(again, {"wide": tersor.Int8Dynamic()})
    again.load_state_dict(net.state_dict())
    assert again.wide.speedup == {1: 2.0}


def test_all_rows_count_together(seconds):
    seconds[(64, 1)] = (1.0, 2.0)  # slower at 1 row, faster at 100: in all 11 against 4
    seconds[(64, 100)] = (10.0, 2.0)
    seconds[(8, 1)] = (2.0, 1.0)  # the reverse: 3 against 11
    seconds[(8, 100)] = (1.0, 10.0)
    net = Net()
    tersor.quantize_(net, tersor.Int8Dynamic(), only_if_faster=(1, 100))
    assert swapped(net) == ["wide"]
    assert net.wide.speedup == {1: 0.5, 100: 5.0}


def test_example_inputs_say_which_rows_and_how_often(seconds):
    seconds[(64, 10)] = (5.0, 1.0)
    seconds[(64, 2)] = (1.0, 4.0)
    seconds[(8, 10)] = (1.0, 3.0)
    seconds[(8, 2)] = (2.0, 1.0)
    net = Net()
    tersor.quantize_(net, tersor.Int8Dynamic(), only_if_faster={"x": torch.randn(5, 2, 32), "again": True})
    assert swapped(net) == ["wide"]
    assert net.wide.speedup == {2: 0.25, 10: 5.0}
    assert sorted(seconds[(0, 0)]) == [(8, 2), (8, 10), (64, 2), (64, 10)]  # never-called layers are not measured
    other = Net()
    tersor.quantize_(other, tersor.Int8Dynamic(), only_if_faster=(torch.randn(10, 32), True))
    assert other.wide.speedup is not None
    one = Net()
    tersor.quantize_(one, tersor.Int8Dynamic(), only_if_faster=torch.randn(10, 32))
    assert one.wide.speedup == {10: 5.0}
    assert not any(module._forward_pre_hooks for module in one.modules())


def test_layers_of_one_shape_are_measured_once(seconds):
    seconds[(64, 4)] = (2.0, 1.0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)), nn.Linear(64, 64, bias=False))
    tersor.quantize_(net, tersor.Int8Dynamic(), only_if_faster=4)
    assert len(swapped(net)) == 6
    assert seconds[(0, 0)] == [(64, 4), (64, 4)]  # with and without bias


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "only_if_faster holds 0, expected numbers of rows, 1 or more"),
        ((4, -1), ValueError, "only_if_faster holds -1"),
        (True, TypeError, "only_if_faster is bool, expected numbers of rows"),
        ((), TypeError, "only_if_faster is tuple, expected numbers of rows"),
        ("fast", TypeError, "only_if_faster is str, expected numbers of rows"),
        (2.5, TypeError, "only_if_faster is float"),
    ],
)
def test_wrong_values_touch_nothing(seconds, value, error, message):
    net = Net()
    with pytest.raises(error, match=message):
        tersor.quantize_(net, tersor.Int8Dynamic(), only_if_faster=value)
    assert swapped(net) == []


def test_model_that_refuses_the_example_is_left_as_it_was(seconds):
    net = Net()
    with pytest.raises(RuntimeError):
        tersor.quantize_(net, tersor.Int8Dynamic(), only_if_faster=torch.randn(3, 31))
    assert swapped(net) == []
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_remarks_that_make_no_sense_are_ignored():
    layer = tersor.QuantLinear.from_linear(nn.Linear(4, 4))
    text = bytes(layer.get_extra_state().tolist()).decode()
    for remark in ('"fast"', '{"x": 1}', '{"1": [2]}', "[1]", "null"):
        forged = text[:-1] + f', "speedup": {remark}}}'
        layer.set_extra_state(torch.tensor(list(forged.encode()), dtype=torch.uint8))
        assert layer.speedup is None


@pytest.mark.native
def test_the_measurement_times_both_layers():
    float_time, packed_time = choice._measure(nn.Linear(64, 64), tersor.QuantLinear.from_linear(nn.Linear(64, 64)), 3)
    assert 0 < float_time < 1
    assert 0 < packed_time < 1


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(input=x)


def test_layers_called_by_keyword(seconds):
    seconds[(16, 3)] = (2.0, 1.0)
    net, x = Keywords(), torch.randn(3, 16)
    tersor.quantize_(net, tersor.Int8Dynamic(), only_if_faster=x)
    assert swapped(net) == ["fc"]
    assert torch.equal(net(x), net.fc(x))  # nn.Linear's argument is called input, and so is ours
