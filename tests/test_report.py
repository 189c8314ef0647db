"""report(): figures against arithmetic by hand, and pages that hold whatever a layer is called."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import tersor
from tersor.calibration import float_tensors
from tersor.cli import main
from tersor.comparison import Distance, exchanged, model_bytes
from tersor.reporting.svg import bar_charts


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 16, bias=False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def make() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def pair() -> tuple[nn.Module, nn.Module]:
    return make(), tersor.quantize_(make(), tersor.Int8Dynamic())


X = torch.linspace(-2, 2, 10 * 32).sin().reshape(10, 32)


def test_figures_of_the_whole_model():
    model, other = pair()
    given = [X, X[:3]]
    report = tersor.report(model, other, given, lambda m: 5.0 if m is model else 3.0, rounds=2)
    with torch.no_grad():
        wanted, gotten = torch.cat([model(x) for x in given]).double(), torch.cat([other(x) for x in given]).double()
    error = (wanted - gotten).square().sum()
    assert report.sqnr_db == pytest.approx(10 * math.log10(wanted.square().sum() / error), rel=1e-6)
    assert report.cosine == pytest.approx(torch.cosine_similarity(wanted, gotten, dim=1).mean().item(), rel=1e-9)
    assert report.metric == (5.0, 3.0)
    assert report.model_bytes[0] == 4 * (32 * 48 + 48 + 48 * 16 + 20)
    assert report.model_bytes[1] < 0.6 * report.model_bytes[0]  # a small layer's tag weighs
    # Alive at once: both results of 10 rows, first(x) and its relu, when the latter has just been made.
    assert report.peak_bytes[0] - report.model_bytes[0] == 2 * 10 * 48 * 4
    assert all(0 < t.best <= t.median for t in report.seconds)
    assert report.ratio == report.seconds[0].best / report.seconds[1].best
    assert report.facts["calls"] == 2


def test_figures_of_the_layers():
    model, other = pair()
    report = tersor.report(model, other, (X,), rounds=1)
    assert report.metric is None
    assert [row.fqn for row in report.layers] == ["first", "second"]
    assert report.uncalled == ("unused",)
    with torch.no_grad():
        hidden = model.first(X)
        own = [(hidden, other.first(X)), (model.second(hidden.relu()), other.second(hidden.relu()))]
        whole = model(X)
        alone = [(whole - model.second(other.first(X).relu())).double(), (whole - other.second(hidden.relu())).double()]
    errors = [e.square().sum().item() for e in alone]
    for row, (want, got), error in zip(report.layers, own, errors, strict=True):
        want, got = want.double(), got.double()
        assert row.sqnr_db == pytest.approx(10 * math.log10(want.square().sum() / (want - got).square().sum()), rel=1e-6)
        assert row.error_share == pytest.approx(error / sum(errors), rel=1e-6)
        assert row.rows == {10: 1}
        assert row.format == "Int8Dynamic()"
        assert 0 < row.before.best <= row.before.median
        assert row.bytes_before == model_bytes(model.get_submodule(row.fqn))
    assert tersor.report(model, other, X, per_layer=False, rounds=1).layers == ()


def test_times_count_every_call_of_a_layer(monkeypatch):
    from tersor.bench.timing import Timing
    from tersor.reporting import measure

    monkeypatch.setattr(measure, "race", lambda layer, other, m: (Timing(float(m), m + 1.0), Timing(m / 2, float(m))))
    model, other = pair()
    row = tersor.report(model, other, [X, X, X[:4]], rounds=1).layers[0]
    assert row.rows == {10: 2, 4: 1}
    assert row.before == Timing(24.0, 27.0)
    assert row.after == Timing(12.0, 24.0)
    assert row.ratio == 2


def test_both_models_are_evaluated():
    model = nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.5)).train()
    assert tersor.report(model, copy.deepcopy(model), X, rounds=1).sqnr_db == math.inf


def test_models_stay_as_they_were():
    model, other = pair()
    model.train()
    other.first.eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    tersor.report(model, other, X, rounds=1)
    assert model.training
    assert not other.first.training
    assert other.training
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in state.items())
    assert type(model.first) is nn.Linear
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks


def test_equal_models_are_exact():
    model = make()
    report = tersor.report(model, copy.deepcopy(model), X, rounds=1)
    assert (report.sqnr_db, report.layers) == (math.inf, ())
    assert report.cosine == pytest.approx(1, abs=1e-12)
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["sqnr_db"] is None
    assert "exact" in str(report)


def test_an_exchanged_copy_shares_its_tensors():
    model, other = pair()
    mixed = exchanged(model, {model.first: other.first})
    assert mixed.first is other.first
    assert mixed.second is not model.second
    assert mixed.second.weight is model.second.weight
    assert type(model.first) is nn.Linear


def test_outputs_of_any_shape():
    class Output(dict):
        pass

    a, b = torch.ones(2), torch.zeros(3)
    assert len(float_tensors(Output(x=a, y=[b, (torch.ones(1, dtype=torch.int64), a)], cache=object(), none=None))) == 3
    found = Distance()
    found.add([torch.tensor([3.0, 4.0]), torch.tensor(1.0)], [torch.tensor([3.0, 0.0]), torch.tensor(1.0)])
    assert (found.signal, found.noise) == (26.0, 16.0)
    assert found.cosine == pytest.approx((0.6 + 1) / 2)
    found = Distance()
    found.add(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert (found.cosine, found.sqnr_db) == (0.5, -math.inf)
    found.add(torch.tensor([1.0]), torch.tensor([math.nan]))
    assert math.isnan(found.sqnr_db)
    with pytest.raises(ValueError, match="do not correspond"):
        found.add(torch.zeros(2), torch.zeros(3))


def test_bytes_of_shared_tensors_count_once():
    layer = nn.Linear(8, 8)
    assert model_bytes(nn.ModuleList([layer, layer])) == 4 * 72
    tied = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    tied[1].weight = tied[0].weight
    assert model_bytes(tied) == 4 * 64


class Page(HTMLParser):
    """Tags, text and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


EVIL = "<script>alert(1)</script>|`[x](http://a)\n\"'&]]>"


def evil_report() -> tersor.reporting.Report:
    model, other = (nn.Sequential() for _ in range(2))
    layer = nn.Linear(32, 16)
    model.add_module(EVIL.replace(".", ""), layer)
    other.add_module(EVIL.replace(".", ""), tersor.QuantLinear.from_linear(layer))
    return tersor.report(model, other, X, rounds=1)


def test_html_is_one_page_without_script():
    report = evil_report()
    page = Page(report.to_html())
    assert not {"script", "iframe", "object", "link", "img", "a", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert page.tags.count("svg") == 1
    assert page.tags.count("table") == 2
    assert EVIL in page.text
    assert f"{report.ratio:.2f}x" in page.text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    svg = Page(report.plot())
    assert set(svg.tags) == {"svg", "text", "title", "rect"}


def test_markdown_and_terminal_hold_any_name():
    from rich.console import Console

    report = evil_report()
    lines = report.to_markdown().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 8 + 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[8:]} == {11}
    assert not re.search(r"(?<!\\)<", report.to_markdown())
    console = Console(width=240, record=True, file=Path("/dev/null").open("w"))
    console.print(report)
    assert "`[x](http" in console.export_text()  # markup of the terminal would take [x] for a style


def test_charts_draw_what_is_finite():
    svg = bar_charts(["a", "<i>&", "c"], {"<t>": ([1.0, 2.0, math.inf], "{:.0f}")})
    assert re.findall(r'<rect[^>]* width="([\d.]+)"', svg) == ["100.0", "200.0", "0.0"]
    assert ">inf<" in svg
    assert "<i>" not in svg and "<t>" not in svg
    assert bar_charts([], {"t": ([], "{}")}).count("<rect") == 0
    assert 'width="0.0"' in bar_charts(["a"], {"t": ([-3.0], "{}")})


def test_plot_writes_what_it_returns(tmp_path):
    model, other = pair()
    report = tersor.report(model, other, X, rounds=1)
    assert report.plot(tmp_path / "a.svg") == (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": 3}, TypeError, "report: model is int, expected an nn.Module"),
        ({"other": None}, TypeError, "report: other is NoneType"),
        ({"inputs": []}, ValueError, "report: inputs is empty"),
        ({"inputs": 3}, TypeError, "report: inputs is int"),
        ({"inputs": "abc"}, TypeError, "report: inputs is str"),  # not three calls with a letter each
        ({"metric": 3}, TypeError, "report: metric is int"),
        ({"metric": lambda m: "good"}, TypeError, "report: metric(model) gave str, expected a number"),
        ({"rounds": 0}, ValueError, "report: rounds is 0"),
        ({"other": nn.Linear(32, 3)}, ValueError, "the outputs do not correspond"),
    ],
)
def test_refusals(change, kind, message):
    model, other = pair()
    with pytest.raises(kind, match=re.escape(message)):
        tersor.report(**{"model": model, "other": other, "inputs": X, **change})


def test_progress_bar(capsys):
    model, other = pair()
    tersor.report(model, other, X, rounds=1, progress=True)
    assert capsys.readouterr().out == ""


# ---- the command ----------------------------------------------------------------------------------------------------------------


def with_inputs():
    return make(), X


def inputs():
    return [X]


def metric(model):
    return float(next(model.parameters()).numel())


def command(*args: str) -> str:
    result = CliRunner().invoke(main, ["report", *args])
    assert result.exit_code == 0, result.output
    return result.output


def test_command_writes_all_forms(tmp_path):
    files = {kind: str(tmp_path / f"r.{kind}") for kind in ("html", "md", "json", "svg")}
    text = command(
        *("--model", "test_report:make", "--inputs", "test_report:inputs", "--metric", "test_report:metric", "--rounds", "1"),
        *("--format", "int4", "--html", files["html"], "--markdown", files["md"], "--json", files["json"], "--svg", files["svg"]),
    )
    assert "SQNR" in text
    data = json.loads(Path(files["json"]).read_text())
    assert [row["format"] for row in data["layers"]] == ["Int4()", "Int4()"]
    assert data["metric"] == {"model": 1536.0, "other": metric(tersor.quantize_(make(), tersor.Int4()))}
    assert Path(files["html"]).read_text().startswith("<!doctype html>")
    assert "| first |" in Path(files["md"]).read_text()
    assert Path(files["svg"]).read_text().startswith("<svg")


def all_called():
    return nn.Sequential(nn.Linear(32, 16)), X


def test_command_calibrates_static_scales():
    text = command("--model", "test_report:all_called", "--rounds", "1", "--format", "int8-static")
    assert float(re.search(r"mean cosine.*?([01]\.\d+)", text).group(1)) > 0.999


def test_command_takes_model_and_inputs_from_one_factory():
    assert "SQNR" in command("--model", "test_report:with_inputs", "--rounds", "1", "--no-layers")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "test_report:make"), "no inputs: give --inputs module:factory, or let the factory of --model return"),
        (("--model", "test_report:inputs"), "made list, expected an nn.Module"),
        (("--model", "test_report:with_inputs", "--format", "int7"), "'int7', expected one of: int8-dynamic"),
        (("--model", "test_report:absent"), "model 'test_report:absent'"),
        (("--model", "test_report:with_inputs", "--html", "/no/such/folder/a.html"), "cannot be written"),
        (("--model", "test_report:X"), "is Tensor, expected a function"),
    ],
)
def test_command_refusals(args, message):
    result = CliRunner().invoke(main, ["report", *args])
    assert result.exit_code != 0
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
