"""Scores that look at inputs: Wanda and SparseGPT, and the calibration behind them."""

from __future__ import annotations

import pytest
import torch
from cases import assert_equal
from torch import Tensor, nn

import tersor
from tersor import NM, Block, CubicSchedule, Unstructured
from tersor.calibration import Trace, batches
from tersor.masks import mask_of
from tersor.pruning_scores import DAMPING, sparsegpt

PATTERNS = [Unstructured(0.5), Block((4, 4), 0.5), Block((16, 1), 0.5), Block((2, 130), 0.5), NM(2, 4)]
SHAPES = [(20, 40), (17, 150), (3, 7), (16, 257)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out, self.drop = nn.Linear(24, 32), nn.Linear(24, 32), nn.Linear(32, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(torch.relu(self.q(x) * self.k(x))))


def correlated(rows: int, k: int) -> Tensor:
    """Features of very different size that depend on each other."""
    return torch.randn(rows, k) @ torch.randn(k, k) * torch.logspace(-1, 1, k)


# ---- Wanda ---------------------------------------------------------------------------------------------------------------------


def test_wanda_compares_within_rows():
    x = correlated(50, 24)
    linear = nn.Linear(24, 9)
    weight = linear.weight.detach().clone()
    tersor.prune_(nn.Sequential(linear), Unstructured(0.5), score="wanda", calibration=[x[:20], x[20:]])
    scores = weight.abs() * x.norm(dim=0)
    kept = mask_of(linear).mask
    for row, left in zip(scores, kept, strict=True):
        assert int(left.sum()) == 12
        assert row[~left].max() < row[left].min()
    assert (kept != (weight.abs() >= weight.abs().median())).any()


def test_wanda_of_all_layers_is_per_row_of_inputs():
    """Norms are means over rows: a layer that is called with more of them does not win."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).sum() + self.b(torch.cat([x] * 50)).sum()

    net = Two()
    net.b.weight.data.copy_(net.a.weight.data)
    pruner = tersor.prune_(net, Unstructured(0.5), score="wanda", scope="global", calibration=torch.randn(30, 16))
    assert abs(pruner.sparsity("a") - pruner.sparsity("b")) < 0.02
    assert pruner.sparsity() == 0.5


def test_wanda_with_a_schedule_looks_again():
    """Masks that come later see the inputs of then."""
    net = nn.Sequential(nn.Linear(8, 8))
    x = torch.ones(4, 8)
    pruner = tersor.prune_(net, Unstructured(0.5), score="wanda", schedule=CubicSchedule(2, every=5), calibration=x)
    net[0].weight = torch.ones(8, 8)
    x[:, :4] = 0.5  # in place: the calibration is held, not copied
    pruner.step()
    pruner.step()
    assert_equal(net[0].weight.detach(), torch.tensor([0.0] * 4 + [1.0] * 4).expand(8, 8).clone())


def test_layers_see_what_the_pruned_ones_before_them_pass_on():
    net = Net()
    x = correlated(40, 24)
    dense_norms = torch.relu(net.q(x) * net.k(x)).norm(dim=0)
    weight = net.out.weight.detach().clone()
    net.train()
    tersor.prune_(net, Unstructured(0.5), score="wanda", calibration=x)
    assert net.training and net.drop.training
    norms = torch.relu(net.q(x) * net.k(x)).norm(dim=0)  # no dropout while calibrating
    for given, expected in ((norms, True), (dense_norms, False)):
        scores = weight.abs() * given
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(16).indices, True)
        assert bool((kept == mask_of(net.out).mask).all()) == expected


def test_unreached_layers_are_named():
    net = Net()
    net.unused = nn.Linear(4, 4)
    for score in ("wanda", "sparsegpt"):
        with pytest.raises(ValueError, match="calibration never reaches unused; give them the pattern None"):
            tersor.prune_(net, NM(2, 4), score=score, calibration=torch.randn(3, 24))
    assert mask_of(net.q) is None
    tersor.prune_(net, {"_default": NM(2, 4), "unused": None}, score="wanda", calibration={"x": torch.randn(3, 24)})


# ---- SparseGPT -----------------------------------------------------------------------------------------------------------------


def by_hand(w: Tensor, h: Tensor, kept: Tensor) -> Tensor:
    """Given what is kept, the column by column solution in float64, by inverting what is left of H at each column."""
    w, h = w.double().clone(), h.double()
    k = w.shape[1]
    h = h + DAMPING * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    for i in range(k):
        inverse = torch.linalg.inv(h[i:, i:])  # columns to the left are fixed
        error = torch.where(kept[:, i], 0.0, w[:, i]) / inverse[0, 0]
        w[:, i:] -= torch.outer(error, inverse[0])
        w[:, i] = torch.where(kept[:, i], w[:, i], 0.0)
    return w


# a block as wide as the weight drops whole rows, for which nothing can make up
CASES = [(p, s) for p in PATTERNS for s in SHAPES if not isinstance(p, Block) or (s[1] > p.shape[1] and s[0] > p.shape[0])]


@pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
def test_sparsegpt_makes_up_for_what_goes(pattern, shape):
    n, k = shape
    w, x = torch.randn(n, k), correlated(300, k)
    h = x.T @ x / len(x)
    kept, got = sparsegpt(w, h, pattern)
    assert (got[~kept] == 0).all()
    assert kept.any() and not kept.all()
    assert torch.allclose(got.double(), by_hand(w, h, kept), rtol=1e-2, atol=1e-2 * float(got.abs().max()))
    if not isinstance(pattern, NM):
        units = -(-n // pattern.shape[0]) * -(-k // pattern.shape[1]) if isinstance(pattern, Block) else n * k
        grid = kept[:: pattern.shape[0], :: pattern.shape[1]] if isinstance(pattern, Block) else kept
        assert int((~grid).sum()) == int(0.5 * units + 0.5)
    else:
        assert all(int(g.sum()) == min(2, len(g)) for row in kept for g in row.split(4))

    def error(weight: Tensor) -> float:
        return float(((weight - w) @ x.T).square().mean())

    assert error(got) < error(w * kept)  # of the same mask, nothing made up for


def test_sparsegpt_in_a_model_beats_wanda_beats_magnitude():
    x = correlated(400, 64)
    errors = {}
    for score in ("magnitude", "wanda", "sparsegpt"):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
        want = net(x).detach()
        pruner = tersor.prune_(
            net, Unstructured(0.5), score=score, calibration=None if score == "magnitude" else [x[:100], x[100:]]
        )
        assert pruner.sparsity() == 0.5
        errors[score] = float((tersor.finalize_(net)(x).detach() - want).square().mean())
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sparsegpt_of_dead_features_and_zero_inputs(dtype):
    for x in (torch.zeros(5, 16), torch.cat([torch.randn(30, 8), torch.zeros(30, 8)], 1)):
        linear = nn.Linear(16, 8).to(dtype)
        linear.weight.data.sign_()
        before = linear.weight.detach().clone()
        tersor.prune_(nn.Sequential(linear), Unstructured(0.5), score="sparsegpt", calibration=x.to(dtype))
        kept = mask_of(linear).mask
        assert linear.weight.dtype == dtype and linear.weight.isfinite().all()
        if x.any():
            assert kept[:, :8].all() and not kept[:, 8:].any()
        else:
            assert_equal(linear.weight.detach(), before * kept)  # nothing to make up for


# ---- calibration ---------------------------------------------------------------------------------------------------------------


def test_trace_groups_layers_of_one_input_and_stops_early():
    net = Net()
    ran = []
    net.out.register_forward_hook(lambda *_: ran.append("out"))
    x = torch.randn(5, 24)
    trace = Trace(net, [net.q, net.k, net.out], batches([x, (x,), {"x": x}], "inputs"))
    assert trace.order == [[net.q, net.k], [net.out]]
    assert ran == ["out"] * 3
    seen = []
    trace.run([net.q, net.k], lambda layer, given: seen.append((layer, given)))
    assert [layer for layer, _ in seen] == [net.q, net.k] * 3
    assert all(given.data_ptr() == x.data_ptr() for _, given in seen)
    assert ran == ["out"] * 3
    assert trace.rows(net.q).shape == (15, 24)
    assert not any(m._forward_pre_hooks for m in net.modules())
