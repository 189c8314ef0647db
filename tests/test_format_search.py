"""sensitivity() and search(): damages against arithmetic by hand, mixes against all of them tried."""

from __future__ import annotations

import itertools
import json
import math
import re

import pytest
import torch
from torch import nn

import tersor
from tersor.bench.timing import Timing
from tersor.format_search import mix as mixes
from tersor.format_search.mix import frontier

INT8, TERNARY = tersor.Int8Dynamic(), tersor.Ternary()
X = torch.linspace(-2, 2, 12 * 32).sin().reshape(12, 32)


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.unused = nn.Linear(32, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def formats_of(model: nn.Module) -> list[str]:
    return [repr(layer.format) if isinstance(layer, tersor.QuantLinear) else "float" for layer in model.layers]


# ---- sensitivity ----------------------------------------------------------------------------------------------------------------


def test_damage_at_the_output():
    model = Model(2)
    found = tersor.sensitivity(model, [INT8, TERNARY], [X, X[:2]])
    assert found.measure == "output"
    assert [(row.fqn, row.format) for row in found.rows] == [
        (name, repr(fmt)) for name in ("layers.0", "layers.1", "unused") for fmt in (INT8, TERNARY)
    ]
    xs = torch.cat([X, X[:2]])
    with torch.no_grad():
        whole = model(xs).double()
        first = tersor.QuantLinear.from_linear(model.layers[0], TERNARY)
        error = (model.layers[1](first(xs).tanh()).tanh().double() - whole).square().sum()
    rows = {(row.fqn, row.format): row for row in found.rows}
    assert rows["layers.0", "Ternary()"].damage == pytest.approx((error / whole.square().sum()).item(), rel=1e-5)
    assert rows["unused", "Ternary()"].damage == 0
    assert rows["layers.0", "Ternary()"].damage > 50 * rows["layers.0", "Int8Dynamic()"].damage > 0
    assert rows["layers.0", "Ternary()"].bytes < rows["layers.0", "Int8Dynamic()"].bytes
    assert found.worst()[0].damage == max(row.damage for row in found.rows)
    assert formats_of(model) == ["float", "float"]


def test_damage_by_metric_and_by_loss():
    model = Model(2)

    def metric(m):
        return float(10 - sum(f != "float" for f in formats_of(m)) * 3)

    assert {row.damage for row in tersor.sensitivity(model, INT8, X, metric).rows} == {0.0, 3.0}
    pairs = [(X, X), ((X[:3],), X[:3])]

    def loss(output, target):
        return (output - target).square().mean()

    found = tersor.sensitivity(model, TERNARY, pairs, loss=loss)
    with torch.no_grad():
        changed = tersor.quantize_(Model(2), {"layers.1": TERNARY})
        want = sum(loss(changed(x), x) - loss(model(x), x) for x in (X, X[:3])) / 2
    assert found.measure == "loss"
    assert found.rows[1].damage == pytest.approx(want.item(), rel=1e-4)


def test_formats_that_do_not_fit_are_named():
    found = tersor.sensitivity(Model(1), [INT8, tersor.Int4(64), tersor.Int8Static()], X)
    assert {row.format for row in found.rows} == {"Int8Dynamic()"}
    assert any("group_size 64 must divide" in remark for remark in found.remarks)
    assert any("input_scale is missing" in remark for remark in found.remarks)


def test_a_candidate_may_differ_by_layer():
    config = {"layers.0": tersor.Int8Static(0.01), "layers.1": tersor.Int8Static(0.02)}
    found = tersor.sensitivity(Model(2), [config], X)
    assert [row.fqn for row in found.rows] == ["layers.0", "layers.1"]


def test_sensitivity_goes_on_from_its_file(tmp_path):
    path, calls = tmp_path / "s.json", []

    def metric(m):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tersor.sensitivity(Model(), INT8, X, metric, path=path)
    assert len(json.loads(path.read_text())["data"]["damage"]) == 1
    tersor.sensitivity(Model(), INT8, X, metric, path=path)
    assert len(calls) == 3 + 1 + 3  # the float model again, and what was left of the four layers
    other = Model()
    other.layers[0].weight.data[0, 0] += 1
    for damage in ({"model": other}, {"formats": TERNARY}):
        with pytest.raises(ValueError, match="is of another model, other formats"):
            tersor.sensitivity(**{"model": Model(), "formats": INT8, "inputs": X, "metric": metric, "path": path} | damage)
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no file of an earlier run"):
        tersor.sensitivity(Model(), INT8, X, metric, path=path)


def test_tables_hold_any_name():
    model = nn.Sequential()
    model.add_module("a|<b>[x]", nn.Linear(32, 32))
    found = tersor.sensitivity(model, INT8, X)
    assert r"a\|\<b\>\[x\]" in found.to_markdown()
    from rich.console import Console

    with open("/dev/null", "w") as sink:
        console = Console(width=120, record=True, file=sink)
        console.print(found)
    assert "a|<b>[x]" in console.export_text()


# ---- search ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def known_speed(monkeypatch):
    """Layers and whole models take times that are known: float 10, Int8Dynamic 3, Ternary 1 a layer."""
    seconds = {"float": 10.0, "Int8Dynamic()": 3.0, "Ternary()": 1.0}
    monkeypatch.setattr(mixes, "_seconds", lambda choice, unit, rows: [10.0, *(seconds[repr(f)] for f in unit.formats)])

    def interleaved(contenders, rounds, slice_s, on_round):
        times = {}
        for name in contenders:
            indices = [int(i) for i in re.findall(r"\d+", name)]
            times[name] = Timing(sum((10.0, 3.0, 1.0)[i] for i in indices), 99.0)
        return times

    monkeypatch.setattr(mixes, "interleaved", interleaved)
    return seconds


COST = {"float": 0.0, "Int8Dynamic()": 1.0, "Ternary()": 4.0}


def metric(model) -> float:
    """Falls by what each layer's format costs, the first layer three times that."""
    return 100 - sum(COST[f] * (3 if i == 0 else 1) for i, f in enumerate(formats_of(model)))


@pytest.mark.parametrize("max_drop", [0, 1, 4, 5, 9, 11, 20, 1000])
def test_exact_search_finds_the_fastest_of_all(known_speed, max_drop):
    model = Model(3)
    found = tersor.search(model, [INT8, TERNARY], X, max_drop=max_drop, metric=metric)
    best = min(
        sum(known_speed[f] for f in combination)
        for combination in itertools.product(COST, repeat=3)
        if sum(COST[f] * (3 if i == 0 else 1) for i, f in enumerate(combination)) <= max_drop
    )
    assert found.exact
    assert found.chosen.layers_s == best
    assert found.chosen.drop <= max_drop
    swapped = tersor.quantize_(Model(3), found)
    assert metric(swapped) == found.chosen.metric
    assert sum(known_speed[f] for f in formats_of(swapped)) == best
    assert type(swapped.unused) is nn.Linear  # the inputs do not reach it
    assert formats_of(model) == ["float"] * 3


@pytest.mark.parametrize("max_drop", [0, 3, 12, 1000])
def test_greedy_search_keeps_the_bound_on_a_path(known_speed, max_drop):
    found = tersor.search(Model(8), [INT8, TERNARY], X, max_drop=max_drop, metric=metric)
    assert not found.exact
    assert metric(tersor.quantize_(Model(8), found)) == found.chosen.metric >= 100 - max_drop
    within = [trial for trial in found.trials if trial.drop <= max_drop]
    assert found.chosen.seconds.best == min(trial.seconds.best for trial in within if trial.seconds)
    assert len(found.trials) <= 3 + 6  # float, two formats, and a bisection of at most 17 points
    if max_drop == 0:
        assert set(found.values()) == {None}
    if max_drop == 1000:
        assert {repr(f) for f in found.values()} == {"None", "Ternary()"}


@pytest.mark.parametrize("max_drop", [0, 2, 5, 9, 17, 30])
def test_bisection_finds_the_fastest_point_of_the_path(known_speed, monkeypatch, max_drop):
    paths = []
    monkeypatch.setattr(mixes, "frontier", lambda seconds, damage: paths.append(frontier(seconds, damage)) or paths[-1])
    found = tersor.search(Model(8), [INT8, TERNARY], X, max_drop=max_drop, metric=metric)
    cost = [[0.0, 1.0, 4.0]] * 8
    drops = [sum(cost[i][f] * (3 if i == 0 else 1) for i, f in enumerate(mix)) for mix in paths[0]]
    seconds = [sum((10.0, 3.0, 1.0)[f] for f in mix) for mix in paths[0]]
    uniform = {0.0: 80.0, 10.0: 24.0, 40.0: 8.0}  # drop -> seconds of what is tried beside the path
    want = [s for s, drop in [*zip(seconds, drops, strict=True), *((s, d) for d, s in uniform.items())] if drop <= max_drop]
    assert found.chosen.layers_s == min(want)


def test_a_thorough_search_tries_every_faster_point_of_the_path(known_speed):
    """Six ternary layers hold by luck, where five and seven do not: bisection passes them by."""

    def lucky(model) -> float:
        count = formats_of(model).count("Ternary()")
        return 100.0 if count == 6 else 100.0 - 4 * count

    found = tersor.search(Model(8), TERNARY, X, max_drop=9, metric=lucky)
    assert found.thorough == 1
    assert formats_of(tersor.quantize_(Model(8), found)).count("Ternary()") == 2
    found = tersor.search(Model(8), TERNARY, X, max_drop=9, metric=lucky, thorough=0)
    assert found.thorough == 0
    assert not found.exact
    assert formats_of(tersor.quantize_(Model(8), found)).count("Ternary()") == 6
    # A ternary layer takes 1, a float one 10.
    assert [trial.layers_s for trial in found.trials if trial.layers_s < 8 + 6 * 9] == [8 + 9 * undone for undone in range(6)]
    found = tersor.search(Model(8), TERNARY, X, max_drop=9, metric=lucky, thorough=0.4)
    assert {trial.layers_s for trial in found.trials if trial.layers_s <= 8 / 0.4} == {8, 17}
    assert formats_of(tersor.quantize_(Model(8), found)).count("Ternary()") == 2


def test_damage_may_be_measured_on_other_inputs(known_speed, monkeypatch):
    seen = []
    original = mixes.output_judge
    monkeypatch.setattr(mixes, "output_judge", lambda model, calls: seen.append(calls) or original(model, calls))
    tersor.search(Model(2), INT8, X, max_drop=1, metric=metric)
    tersor.search(Model(2), INT8, X, max_drop=1, metric=metric, damage_inputs=[X[:2], X[:5]])
    assert [[len(args[0]) for args, _ in calls] for calls in seen] == [[12], [2, 5]]


def test_frontier_takes_the_steps_that_undo_most_for_their_time():
    # float, a, b of two layers; by rate: layer 1 b -> a (8 / 1), layer 0 b -> a (3 / 1), layer 1 a -> float (1 / 2), layer 0 (1 / 3)
    seconds = [[5.0, 2.0, 1.0], [4.0, 2.0, 1.0]]
    damage = [[0.0, 1.0, 4.0], [0.0, 1.0, 9.0]]
    assert frontier(seconds, damage) == [(2, 2), (2, 1), (1, 1), (1, 0), (0, 0)]
    # what is faster and does less damage is taken at once; slower formats never
    assert frontier([[5.0, 1.0, 2.0]], [[0.0, 1.0, 3.0]]) == [(1,), (0,)]


def test_search_goes_on_from_its_file(known_speed, tmp_path):
    path, calls = tmp_path / "s.json", []

    def interrupted(model):
        calls.append(formats_of(model))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return metric(model)

    arguments = {"max_drop": 5, "metric": interrupted, "path": path}
    with pytest.raises(KeyboardInterrupt):
        tersor.search(Model(3), [INT8, TERNARY], X, **arguments)
    found = tersor.search(Model(3), [INT8, TERNARY], X, **arguments)
    assert len(calls) == len({*map(tuple, calls)}) + 1  # only what was interrupted is measured again
    count = len(calls)
    assert tersor.search(Model(3), [INT8, TERNARY], X, **arguments) == found
    assert len(calls) == count
    with pytest.raises(ValueError, match="is of another model"):
        tersor.search(Model(3), [INT8, TERNARY], X[:3], **arguments)  # other numbers of rows take other times


@pytest.mark.native
def test_search_with_real_times(tmp_path):
    found = tersor.search(Model(2), [INT8, tersor.Int4(32)], X, max_drop=0.0, metric=lambda m: 1.0, rounds=2, progress=True)
    assert found.exact
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.chosen.seconds is not None
    table = found.to_markdown()
    assert "chosen" in table
    assert table.count("\n") == 2 + len(found.trials)
    assert [trial.name for trial in found.trials if trial.name == "float"] == ["float"]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"max_drop": -1}, ValueError, "search: max_drop is -1, expected 0 or more"),
        ({"max_drop": float("nan")}, ValueError, "search: max_drop is nan"),
        ({"metric": 3}, TypeError, "search: metric is int"),
        ({"metric": lambda m: math.nan}, ValueError, "search: metric(model) is nan for the model as it is, expected a finite"),
        ({"thorough": 2}, ValueError, "search: thorough is 2, expected a number from 0 to 1"),
        ({"formats": []}, ValueError, "search: formats is empty"),
        ({"formats": ["int8"]}, TypeError, "search: config is 'int8'"),
        ({"inputs": []}, ValueError, "search: inputs is empty"),
        ({"filter_fn": lambda m, name: name == "unused"}, ValueError, "search: the inputs reach no layer"),
    ],
)
def test_refusals(change, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        tersor.search(**{"model": Model(1), "formats": INT8, "inputs": X, "max_drop": 1, "metric": metric} | change)


def test_sensitivity_refusals():
    with pytest.raises(ValueError, match="metric and loss exclude each other"):
        tersor.sensitivity(Model(1), INT8, X, metric, loss=metric)
    with pytest.raises(ValueError, match=r"sensitivity: metric\(model\) is inf"):
        tersor.sensitivity(Model(1), INT8, X, lambda m: math.inf)
    with pytest.raises(TypeError, match="iterable of pairs"):
        tersor.sensitivity(Model(1), INT8, X, loss=metric)
