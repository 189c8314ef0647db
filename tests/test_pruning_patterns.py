"""Patterns and the schedule: which weights go, and when."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import assert_equal
from pruning_common import PATTERNS, K, Net, fit, mask
from torch import Tensor, nn

import tersor
from tersor import NM, Block, CubicSchedule, Unstructured
from tersor.masks import latent_weight
from tersor.pruning_scores import keep_highest

# ---- which weights go ----------------------------------------------------------------------------------------------------------


def units_of(pattern, kept: Tensor) -> Tensor:
    """bool [units]: what is left of each unit, None of them mixed; straight from the definition, element by element."""
    n, k = kept.shape
    rows, columns = pattern.shape
    blocks = [kept[i : i + rows, j : j + columns] for i in range(0, n, rows) for j in range(0, k, columns)]
    assert all(block.all() or not block.any() for block in blocks)
    return torch.tensor([bool(block.any()) for block in blocks])


@pytest.mark.parametrize("shape", [(48, 64), (37, 67), (1, 64), (64, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_unstructured_drops_the_smallest(shape, sparsity):
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    weight = model[0].weight.detach().clone()
    pruner = tersor.prune_(model, Unstructured(sparsity))
    kept = mask(model[0])
    count = int(sparsity * weight.numel() + 0.5)
    assert int((~kept).sum()) == count
    assert pruner.sparsity() == count / weight.numel()
    if 0 < count < weight.numel():
        assert weight[~kept].abs().max() <= weight[kept].abs().min()
    assert_equal(model[0].weight.detach(), weight * kept)


@pytest.mark.parametrize("shape", [(48, 64), (37, 67), (1, 64), (64, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("block", [(16, 4), (16, 1), (1, 4), (3, 5), (100, 100)], ids=str)
def test_blocks_go_whole_by_their_mean_square(shape, block):
    pattern = Block(block, 0.5)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    weight = model[0].weight.detach().clone()
    tersor.prune_(model, pattern)
    kept = units_of(pattern, mask(model[0]))
    assert int((~kept).sum()) == int(0.5 * kept.numel() + 0.5)
    rows, columns = block
    squares = torch.tensor(
        [
            weight[i : i + rows, j : j + columns].double().square().mean()
            for i in range(0, shape[0], rows)
            for j in range(0, shape[1], columns)
        ]
    )
    if kept.any() and not kept.all():
        assert squares[~kept].max() <= squares[kept].min() * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(48, 64), (37, 67), (3, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(0, 4), NM(4, 4)], ids=repr)
def test_n_of_m_in_every_group(shape, pattern):
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    weight = model[0].weight.detach().clone()
    tersor.prune_(model, pattern)
    for row, kept in zip(weight.abs(), mask(model[0]), strict=True):
        for values, left in zip(row.split(pattern.m), kept.split(pattern.m), strict=True):
            assert int(left.sum()) == min(pattern.n, len(values))
            if left.any() and not left.all():
                assert values[~left].max() <= values[left].min()


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_counts_are_exact_where_all_weights_are_equal(pattern):
    """Ties are common: zeros, and weights in bfloat16."""
    counts = []
    for weight in (torch.ones(48, 40), torch.zeros(48, 40), torch.arange(48.0 * 40).reshape(48, 40)):
        model = nn.Sequential(nn.Linear(40, 48))
        model[0].weight.data.copy_(weight)
        tersor.prune_(model, pattern)
        counts.append(int((~mask(model[0])).sum()))
    assert counts == [counts[0]] * 3


def test_tiny_and_huge_weights_rank():
    for scale in (1e-30, 1e30):
        model = nn.Sequential(nn.Linear(8, 16))
        model[0].weight.data.copy_(torch.randn(16, 8) * scale)
        model[0].weight.data[:, :4] *= 3  # not those that ties would leave
        tersor.prune_(model, Block((16, 4), 0.5))
        assert mask(model[0])[0].tolist() == [True] * 4 + [False] * 4


def test_a_mask_never_grows_back():
    """Even where fewer are asked for than are gone."""
    old = torch.rand(8, 16) < 0.25
    for pattern in (Unstructured(0.5), NM(2, 4)):
        assert_equal(keep_highest([torch.rand(8, 16)], [old], pattern, 0.5, False)[0] & ~old, torch.zeros_like(old))


def test_global_scope_compares_layers():
    net = Net()
    net.fc1.weight.data *= 10
    flat = torch.cat([net.fc1.weight.detach().flatten(), net.fc2.weight.detach().flatten()]).abs()
    other = copy.deepcopy(net)
    pruner = tersor.prune_(net, {"_default": Unstructured(0.4), "fc3": NM(2, 4)}, scope="global")
    kept = torch.cat([mask(net.fc1).flatten(), mask(net.fc2).flatten()])
    assert int((~kept).sum()) == int(0.4 * flat.numel() + 0.5)
    assert flat[~kept].max() <= flat[kept].min()
    assert pruner.sparsity("fc1") < 0.2 < 0.6 < pruner.sparsity("fc2")
    assert pruner.sparsity("fc3") == 0.5
    layerwise = tersor.prune_(other, Unstructured(0.4))
    for fqn in ("fc1", "fc2", "fc3"):
        assert layerwise.sparsity(fqn) == pytest.approx(0.4, abs=1e-3)


# ---- the schedule --------------------------------------------------------------------------------------------------------------


def test_cubic_schedule_is_that_of_the_paper():
    schedule = CubicSchedule(end=100, begin=20, every=8)
    net = Net()
    pruner = tersor.prune_(net, Unstructured(0.9), schedule=schedule)
    assert pruner.sparsity() == 0
    last = 0.0
    for t in range(1, 121):
        changed = pruner.step()
        assert changed == (t in {28, 36, 44, 52, 60, 68, 76, 84, 92, 100})
        if changed:
            last = 0.9 + (0 - 0.9) * (1 - (t - 20) / 80) ** 3
        assert pruner.sparsity("fc1") == pytest.approx(last, abs=1e-3)
    assert last == 0.9
    assert pruner.state_dict()["step"] == 120


def test_the_last_step_is_exact_whatever_every():
    pruner = tersor.prune_(Net(), NM(1, 4), schedule=CubicSchedule(10, every=7))
    changes = [pruner.step() for _ in range(12)]
    assert [i + 1 for i, changed in enumerate(changes) if changed] == [7, 10]
    assert pruner.sparsity() == 0.75


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_is_dropped_stays_dropped(pattern, scope):
    net = Net()
    pruner = tersor.prune_(net, pattern, scope=scope, schedule=CubicSchedule(10))
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    seen = [torch.ones(48, K, dtype=torch.bool)]

    def after() -> None:
        pruner.step()
        latent_weight(net.fc1).data[~mask(net.fc1)] = 100.0  # would win every comparison
        assert not (mask(net.fc1) & ~seen[-1]).any()
        seen.append(mask(net.fc1).clone())

    fit(net, optimizer, after, 10)
    counts = [int(m.sum()) for m in seen]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 3
    assert pruner.sparsity() == pytest.approx(0.75, abs=0.05)  # blocks over the edge are smaller


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Unstructured(90), "Unstructured: sparsity is 90"),
        (lambda: Unstructured(True), "Unstructured: sparsity is True"),
        (lambda: Block((16,), 0.5), r"Block: shape is \(16,\)"),
        (lambda: Block((16, 0), 0.5), r"Block: shape is \(16, 0\)"),
        (lambda: Block((16, 4), -0.1), "Block: sparsity is -0.1"),
        (lambda: NM(5, 4), "NM: n, m are 5, 4"),
        (lambda: NM(0, 0), "NM: n, m are 0, 0"),
        (lambda: CubicSchedule(0), "CubicSchedule: begin=0, end=0"),
        (lambda: CubicSchedule(5, every=0), "every=0"),
        (lambda: CubicSchedule(0.5), "CubicSchedule: end is 0.5"),
    ],
)
def test_wrong_patterns_and_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patterns_print_as_the_code_that_makes_them():
    for pattern in [*PATTERNS, NM(2, 4), CubicSchedule(10, 2, 3)]:
        assert eval(repr(pattern), vars(tersor) | {"NM": NM, "Block": Block}) == pattern
    assert Block([16, 4], 0.5) == Block((16, 4), 0.5)
    with pytest.raises(AttributeError):
        NM(2, 4).n = 3
