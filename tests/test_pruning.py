"""Masks of prune_: zeros that stay, resuming, configs, ties, copies, files, compile, AMP."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from cases import assert_equal
from pruning_common import PATTERNS, K, Net, fit, mask
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.utils import parametrize, prune

import tersor
from tersor import NM, CubicSchedule, Int8Dynamic, QuantLinear, Unstructured, train
from tersor.masks import Mask, latent_weight, mask_of

# ---- the zeros hold ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_training_does_not_revive_zeros(pattern, optimizer):
    net = Net()
    parameters = list(net.parameters())
    make = {"adamw": lambda p: torch.optim.AdamW(p, 0.1), "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)}[optimizer]
    made = make(net.parameters())
    fit(net, made)  # momentum of weights that will go
    tersor.prune_(net, pattern)
    assert {id(p) for p in net.parameters()} == {id(p) for p in parameters}
    kept = {name: mask(layer).clone() for name, layer in net.named_children()}
    before = {name: layer.weight.detach().clone() for name, layer in net.named_children()}
    fit(net, made)
    for name, layer in net.named_children():
        assert (layer.weight[~kept[name]] == 0).all()
        assert (layer.weight != before[name])[kept[name]].any()
        assert (latent_weight(layer).grad[~kept[name]] == 0).all()
        assert (latent_weight(layer).grad[kept[name]] != 0).any()
    # momentum did move what lies below the masks
    assert (latent_weight(net.fc1)[~kept["fc1"]] != 0).any()
    x = torch.randn(3, K)
    want = net(x).detach()
    assert tersor.finalize_(net) is net
    assert_equal(net(x).detach(), want)
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    for name, layer in net.named_children():
        assert type(layer) is nn.Linear
        assert (layer.weight[~kept[name]] == 0).all()
        assert not layer.weight[~kept[name]].signbit().any()


def test_nothing_below_a_mask_shows():
    model = nn.Sequential(nn.Linear(8, 4))
    tersor.prune_(model, Unstructured(0.5))
    kept = mask(model[0])
    latent_weight(model[0]).data[~kept] = math.nan
    assert model[0].weight.isfinite().all()
    model(torch.randn(3, 8)).sum().backward()
    assert latent_weight(model[0]).grad.isfinite().all()
    tersor.finalize_(model)
    assert (model[0].weight[~kept] == 0).all()


def test_assignment_goes_below_the_mask():
    model = nn.Sequential(nn.Linear(8, 4))
    tersor.prune_(model, Unstructured(0.5))
    new = torch.randn(4, 8)
    model[0].weight = new
    assert_equal(model[0].weight.detach(), new * mask(model[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    net = Net().to(dtype)
    pruner = tersor.prune_(net, Unstructured(0.75))
    assert net.fc1.weight.dtype == dtype
    assert pruner.sparsity("fc1") == 0.75
    x = torch.randn(4, K, dtype=dtype)
    net(x).float().sum().backward()
    assert latent_weight(net.fc1).grad.dtype == dtype
    net.float()
    assert mask(net.fc1).dtype == torch.bool
    assert pruner.sparsity("fc1") == 0.75


def test_autocast():
    net = Net()
    tersor.prune_(net, Unstructured(0.75))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(4, K))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    grad = latent_weight(net.fc1).grad
    assert grad.dtype == torch.float32
    assert (grad[~mask(net.fc1)] == 0).all() and (grad != 0).any()


def test_compile_sees_new_masks():
    torch._dynamo.reset()
    net = Net()
    pruner = tersor.prune_(net, Unstructured(0.9), schedule=CubicSchedule(4))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K)
    seen = []
    for _ in range(4):
        pruner.step()
        got = compiled(x)
        assert torch.allclose(got, net(x), atol=1e-6)
        seen.append(got.detach())
    assert not torch.allclose(seen[0], seen[-1])
    compiled(x).sum().backward()
    assert (latent_weight(net.fc1).grad[~mask(net.fc1)] == 0).all()


def test_pruned_under_inference_mode_it_still_trains():
    net = Net()
    with torch.inference_mode():
        tersor.prune_(net, NM(2, 4), score="wanda", calibration=torch.randn(9, K))
    fit(net, torch.optim.SGD(net.parameters(), 0.1))
    with torch.inference_mode():
        tersor.finalize_(net)
    fit(net, torch.optim.SGD(net.parameters(), 0.1))
    tied = Tied()
    tersor.prune_(tied, {"head": NM(2, 4)})
    with torch.inference_mode():
        tersor.finalize_(tied)  # makes a parameter
    tied(torch.tensor([1, 2])).sum().backward()


# ---- copies and files ----------------------------------------------------------------------------------------------------------


def test_a_copy_is_finalized_and_the_model_trains_on():
    """Deep copies of a parametrised layer share its class."""
    net = Net()
    tersor.prune_(net, Unstructured(0.5))
    x = torch.randn(3, K)
    want = net(x).detach()
    snapshot = tersor.finalize_(copy.deepcopy(net))
    assert_equal(snapshot(x).detach(), want)
    assert_equal(net(x).detach(), want)
    fit(net, torch.optim.SGD(net.parameters(), 0.1))
    assert_equal(snapshot(x).detach(), want)
    assert (net.fc1.weight == 0).sum() == net.fc1.weight.numel() // 2


def test_resuming_is_going_on():
    pattern, schedule = {"_default": Unstructured(0.9), "fc3": NM(2, 4)}, CubicSchedule(20, every=3)

    def start(net: Net) -> tuple[tersor.Pruner, torch.optim.Optimizer]:
        return tersor.prune_(net, pattern, schedule=schedule), torch.optim.AdamW(net.parameters(), 0.01)

    net = Net()
    pruner, optimizer = start(net)
    fit(net, optimizer, pruner.step, 10)
    file = io.BytesIO()
    torch.save([net.state_dict(), pruner.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = Net()
    pruner2, optimizer2 = start(resumed)
    with pytest.raises(ValueError, match="the mask of fc1 is empty; load the model's state_dict first"):
        pruner2.load_state_dict(states[1])
    resumed.load_state_dict(states[0])
    pruner2.load_state_dict(states[1])
    optimizer2.load_state_dict(states[2])
    for n, p, o in ((net, pruner, optimizer), (resumed, pruner2, optimizer2)):
        torch.manual_seed(1)
        fit(n, o, p.step, 15)
    for name, value in net.state_dict().items():
        assert_equal(resumed.state_dict()[name], value)
    assert pruner2.state_dict() == pruner.state_dict()
    assert pruner.sparsity("fc1") == pytest.approx(0.9, abs=1e-3)


def test_a_state_of_other_pruning_is_an_error():
    pruner = tersor.prune_(Net(), Unstructured(0.5), schedule=CubicSchedule(10))
    state = pruner.state_dict()
    for other, schedule in (
        (Unstructured(0.6), CubicSchedule(10)),
        (Unstructured(0.5), CubicSchedule(11)),
        (Unstructured(0.5), None),
    ):
        with pytest.raises(ValueError, match="load_state_dict: (patterns is|schedule is)"):
            tersor.prune_(Net(), other, schedule=schedule).load_state_dict(state)
    for wrong in ({}, None, {**state, "step": "3"}, {**state, "step": -1}):
        with pytest.raises(ValueError, match="load_state_dict: the state is not one of a Pruner"):
            pruner.load_state_dict(wrong)


def test_a_mask_that_does_not_fit_is_an_error():
    net = Net()
    pruner = tersor.prune_(net, Unstructured(0.5), schedule=CubicSchedule(2))
    small = Net()
    small.fc1 = nn.Linear(K, 32)
    tersor.prune_(small, {"fc1": Unstructured(0.5)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        net.load_state_dict(small.state_dict(), strict=False)
    for shape in ((48, 1), (1, 64), (32, 64)):
        mask_of(net.fc1).mask = torch.ones(shape, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"the mask is \[.*\], the weight has become \[48, 64\]"):
            net(torch.randn(2, K))
        with pytest.raises(ValueError, match="finalize_: the mask of fc1 is"):
            tersor.finalize_(net)
        with pytest.raises(ValueError, match="step: the mask of fc1 is"):
            pruner.step()
        assert mask_of(net.fc2) is not None


# ---- which layers --------------------------------------------------------------------------------------------------------------


def test_config_by_layer():
    net = Net()
    pruner = tersor.prune_(net, {"re:fc[12]": Unstructured(0.5), "fc2": NM(1, 4), "_default": None})
    assert (pruner.sparsity("fc1"), pruner.sparsity("fc2")) == (0.5, 0.75)
    assert mask_of(net.fc3) is None and type(net.fc3) is nn.Linear
    with pytest.raises(ValueError, match="'fc3' is not pruned; layers that are: fc1, fc2"):
        pruner.sparsity("fc3")
    assert repr(pruner) == "Pruner(2 layers, score='magnitude', scope='layer', schedule=None, step=0)"


def test_a_linear_by_itself_and_a_filter():
    layer = nn.Linear(8, 8)
    assert tersor.prune_(layer, Unstructured(0.5)).sparsity("") == 0.5
    assert type(tersor.finalize_(layer)) is nn.Linear
    net = Net()
    tersor.prune_(net, Unstructured(0.5), filter_fn=lambda module, fqn: fqn == "fc2")
    assert [mask_of(m) is not None for m in net.children()] == [False, True, False]


@pytest.mark.parametrize(
    ("pattern", "kwargs", "message"),
    [
        ({"nonsense": NM(2, 4)}, {}, "prune_: config keys match no nn.Linear: 'nonsense'"),
        ({"fc1": Int8Dynamic()}, {}, r"prune_: config\['fc1'\] is Int8Dynamic\(\), expected a pattern such as"),
        (0.5, {}, "prune_: config is 0.5, expected a pattern"),
        (NM(2, 4), {"score": "taylor"}, "score is 'taylor', expected one of: magnitude, wanda, sparsegpt"),
        (NM(2, 4), {"scope": "row"}, "scope is 'row', expected one of: layer, global"),
        (NM(2, 4), {"schedule": 100}, "schedule is 100, expected a tersor.CubicSchedule"),
        (NM(2, 4), {"score": "wanda"}, "wanda needs calibration"),
        (NM(2, 4), {"calibration": torch.zeros(1, K)}, "magnitude reads no inputs"),
        (NM(2, 4), {"score": "wanda", "calibration": []}, "prune_: calibration is empty"),
        (NM(2, 4), {"score": "wanda", "calibration": 3}, "prune_: calibration is int"),
        (NM(2, 4), {"score": "wanda", "calibration": torch.full((1, K), math.nan)}, "calibration gives a layer NaN or inf"),
        (NM(2, 4), {"score": "sparsegpt", "scope": "global", "calibration": torch.zeros(1, K)}, "sparsegpt prunes layer by layer"),
        (NM(2, 4), {"filter_fn": lambda m, f: False}, "choose no layer"),
    ],
)
def test_errors_leave_the_model_alone(pattern, kwargs, message):
    net = Net()
    with pytest.raises((ValueError, TypeError), match=message):
        tersor.prune_(net, pattern, **kwargs)
    assert all(type(m) is nn.Linear for m in net.children())
    with pytest.raises(ValueError, match="finalize_: model holds no mask"):
        tersor.finalize_(net)


def test_weights_that_cannot_be_ranked():
    net = Net()
    net.fc2.weight.data[3, 4] = math.inf
    with pytest.raises(ValueError, match=r"prune_: fc2.weight holds NaN or inf; nothing was changed"):
        tersor.prune_(net, NM(2, 4))
    assert type(net.fc1) is nn.Linear
    with pytest.raises(ValueError, match="fc1.weight is on meta"):
        tersor.prune_(Net().to("meta"), NM(2, 4))
    net = Net()
    pruner = tersor.prune_(net, NM(2, 4), schedule=CubicSchedule(1))
    latent_weight(net.fc2).data[3, 4] = math.nan
    with pytest.raises(ValueError, match=r"step: fc2.weight holds NaN or inf"):
        pruner.step()


def test_masks_and_what_else_changes_layers(caplog):
    net = Net()
    pruner = tersor.prune_(net, {"fc1": NM(2, 4), "_default": None}, schedule=CubicSchedule(1))
    for change in (
        lambda: tersor.quantize_(net, Int8Dynamic()),
        lambda: tersor.quantize_(net, {"fc1": Int8Dynamic()}),
        lambda: train.qat_(net, Int8Dynamic()),
        lambda: tersor.prune_(net, NM(2, 4)),
    ):
        with pytest.raises(ValueError, match=r"fc1 carries a mask of prune_; call tersor.finalize_\(model\) first"):
            change()
        assert [type(m) is nn.Linear for m in net.children()] == [False, True, True]
    tersor.quantize_(net, {"_default": Int8Dynamic(), "fc1": None})  # as asked: it stays as it is
    assert mask_of(net.fc1) is not None and type(net.fc2) is QuantLinear
    pruner.step()
    kept = mask(net.fc1).clone()
    tersor.finalize_(net)
    with pytest.raises(ValueError, match="step: fc1 has no mask any more: finalize_ was called"):
        tersor.Pruner.step(_rewound(pruner))
    assert pruner.sparsity() == 0.5
    tersor.quantize_(net, Int8Dynamic())
    assert (net.fc1.dequantize().weight[~kept] == 0).all()

    other = Net()
    parametrize.register_parametrization(other.fc1, "weight", nn.Identity())
    prune.l1_unstructured(other.fc2, "weight", 0.5)
    tersor.prune_(other, NM(2, 4))
    assert "fc1 stays dense: it is parametrised" in caplog.text and "fc2 stays dense: it has no plain weight" in caplog.text
    with pytest.raises(ValueError, match="prune_: fc2 has no plain weight"):
        tersor.prune_(other, {"fc2": NM(2, 4)})
    parametrize.register_parametrization(other.fc3, "weight", nn.Identity())
    with pytest.raises(ValueError, match="fc3.weight has other parametrisations beside its mask"):
        tersor.finalize_(other)


def _rewound(pruner: tersor.Pruner) -> tersor.Pruner:
    pruner._step = 0
    return pruner


def test_pruning_again_keeps_the_old_zeros():
    net = Net()
    tersor.prune_(net, Unstructured(0.5))
    first = mask(net.fc1).clone()
    tersor.finalize_(net)
    tersor.prune_(net, Unstructured(0.75))
    assert not (mask(net.fc1) & ~first).any()


def test_other_parametrisations_of_the_layer_stay():
    net = Net()
    parametrize.register_parametrization(net.fc1, "bias", nn.Identity())
    tersor.prune_(net, {"_default": NM(2, 4)}, filter_fn=None)
    assert mask_of(net.fc1) is None  # its class hides it
    net = Net()
    tersor.prune_(net, NM(2, 4))
    parametrize.register_parametrization(net.fc1, "bias", nn.Identity())
    tersor.finalize_(net)
    assert parametrize.is_parametrized(net.fc1, "bias") and (net.fc1.weight == 0).sum() == net.fc1.weight.numel() / 2


# ---- ties ----------------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """a and b share a weight; head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.b.weight = self.a.weight
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.b(gelu(self.a(self.emb(ids)))))


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_tied_layers_share_their_mask(score):
    net = Tied()
    calibration = None if score == "magnitude" else torch.randint(0, 20, (4, 7))
    pruner = tersor.prune_(net, {"_default": NM(2, 4), "head": None}, score=score, calibration=calibration)
    assert mask_of(net.a) is mask_of(net.b) and latent_weight(net.a) is latent_weight(net.b)
    assert pruner.sparsity("a") == pruner.sparsity("b") == pruner.sparsity() == 0.5
    copied = copy.deepcopy(net)
    assert mask_of(copied.a) is mask_of(copied.b)
    tersor.finalize_(net)
    assert net.a.weight is net.b.weight
    assert (net.a.weight == 0).sum() == 128
    with pytest.raises(ValueError, match=r"a and b share a weight, but are given NM\(2, 4\) and NM\(1, 4\)"):
        tersor.prune_(net, {"a": NM(2, 4), "b": NM(1, 4)})


def test_a_weight_tied_to_what_stays_dense():
    net = Tied()
    with pytest.warns(UserWarning, match="head stays dense: its weight is tied to emb.weight, which is not pruned"):
        tersor.prune_(net, NM(2, 4))
    assert mask_of(net.head) is None
    net = Tied()
    tersor.prune_(net, {"head": NM(2, 4)})
    dense = net.emb.weight.detach().clone()
    tersor.finalize_(net)
    assert net.head.weight is not net.emb.weight
    assert_equal(net.emb.weight.detach(), dense)
    assert (net.head.weight == 0).sum() == 160


def test_transformer_fast_path_reads_the_masked_weight():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    tersor.prune_(layer, {"linear1": Unstructured(0.9), "linear2": Unstructured(0.9)})
    assert isinstance(mask_of(layer.linear1), Mask)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fast = layer(x)
    layer.linear1.weight.requires_grad_()
    slow = tersor.finalize_(layer)(x)  # gradients are needed: the slow path
    assert torch.allclose(fast, slow, atol=1e-5)
