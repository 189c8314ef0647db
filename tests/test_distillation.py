"""distill: students come to answer what their teachers do, from a checkpoint too, and to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tersor
from tersor import train
from tersor.distillation import LOSSES


def teacher() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5))


def student(width: int = 32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, width), nn.Dropout(0.1), nn.ReLU(), nn.Linear(width, 5))


def data(count: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(64, 16, generator=generator) for _ in range(count)]


def agreement(a: nn.Module, b: nn.Module) -> float:
    a.eval()
    x = torch.cat(data())
    return (a(x).argmax(1) == b(x).argmax(1)).double().mean().item()


@pytest.mark.parametrize("loss", [*LOSSES, lambda a, b: (a - b).abs().mean()], ids=str)
def test_every_loss_brings_the_student_closer(loss):
    got, want = student(), teacher()
    before = agreement(got, want)
    kept = [p.clone() for p in want.parameters()]
    assert tersor.distill(got, want, data(), steps=400, loss=loss) is got
    assert agreement(got, want) >= 0.75 >= before + 0.4
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(kept, want.parameters(), strict=True))


def test_kl_is_that_of_its_definition():
    a, b = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(6, 3, 5, dtype=torch.float64)
    p, q = (a / 3).softmax(-1), (b / 3).softmax(-1)
    want = 9 * (q * (q / p).log()).sum(-1).mean()
    assert LOSSES["kl"](a, b, 3.0).item() == pytest.approx(want.item(), rel=1e-5)


def nothing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 0 * a.sum()


def test_features_come_to_agree():
    torch.manual_seed(1)
    net, want, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5)), teacher(), torch.cat(data())

    def gap() -> float:
        return ((net[0](x) - want[0](x)).norm() / want[0](x).norm()).item()

    before = gap()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    tersor.distill(net, want, data(), steps=400, loss=nothing, features={"0": "0"}, optimizer=optimizer)
    assert before > 1.0 and gap() <= 0.1
    assert not any(module._forward_hooks for model in (net, want) for module in model.modules())


def test_features_of_another_width_agree_through_a_map():
    losses = []
    features = {"2": "1"}
    net = student()
    tersor.distill(
        net, teacher(), data(), steps=400, loss=nothing, features=features, callbacks=[lambda state: losses.append(state.loss)]
    )
    assert losses[-1] <= 0.3 * losses[0]
    assert list(net.state_dict()) == list(student().state_dict())  # the map is dropped


def test_target_loss_and_weight():
    labels = torch.arange(64) % 5
    pairs = [(x, labels) for x in data(1)]
    alone = tersor.distill(student(), teacher(), pairs, steps=600, target_loss=nn.functional.cross_entropy, target_weight=1.0)
    alone.eval()
    assert (alone(pairs[0][0]).argmax(1) == labels).double().mean() >= 0.8  # labels that have nothing to do with the teacher
    with pytest.raises(TypeError, match="expected pairs"):
        tersor.distill(student(), teacher(), data(), steps=1, target_loss=nn.functional.cross_entropy)


class Stop(Exception):
    pass


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_resumed_training_is_the_same_to_the_bit(tmp_path, own_optimizer):
    def run(net, steps=20, **more):
        torch.manual_seed(3)  # dropout
        features = None if own_optimizer else {"2": "1"}
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9) if own_optimizer else None
        return tersor.distill(net, teacher(), data(), steps=steps, features=features, optimizer=optimizer, **more)

    def stop(state):
        if state.step == 13:
            raise Stop

    whole = run(student())
    path = tmp_path / "state.safetensors"
    with pytest.raises(Stop):
        run(student(), checkpoint=path, checkpoint_every=5, callbacks=[stop])
    seen = []
    resumed = run(student(), checkpoint=path, checkpoint_every=5, callbacks=[lambda state: seen.append(state.step)])
    assert seen == list(range(11, 21))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.safetensors"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    tersor.distill(student(), teacher(), data(), steps=2, checkpoint=path)
    with pytest.raises(ValueError, match="of another student"):
        tersor.distill(student(16), teacher(), data(), steps=4, checkpoint=path)
    tersor.save(tersor.quantize_(student(), tersor.Int8Dynamic()), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of distill"):
        tersor.distill(student(), teacher(), data(), steps=4, checkpoint=tmp_path / "other.safetensors")


def test_a_ternary_student():
    net = train.qat_(student(), tersor.Ternary())
    tersor.distill(net, teacher(), data(), steps=400)
    packed = train.convert_(net)
    assert agreement(packed, teacher()) >= 0.65


def test_a_pruned_student_keeps_its_zeros():
    net = student()
    pruner = tersor.prune_(net, tersor.Unstructured(0.8), schedule=tersor.CubicSchedule(end=60, every=10))
    tersor.distill(net, teacher(), data(), steps=400, callbacks=[lambda _: pruner.step()])
    tersor.finalize_(net)
    assert (net[0].weight == 0).double().mean() >= 0.79
    assert agreement(net, teacher()) >= 0.65


def test_modes_come_back_and_a_teacher_may_be_a_function():
    net, want = student().eval(), teacher()
    want.train()
    tersor.distill(net, lambda x: want(x), data(), steps=2)
    assert not net.training and want.training
    tersor.distill(net, want, iter(data()), steps=7)
    with pytest.raises(ValueError, match="has ended"):
        tersor.distill(net, want, iter(data()), steps=8)


def test_bad_arguments():
    for arguments, message in (
        ({"loss": "ce"}, "loss is 'ce'"),
        ({"temperature": 0}, "temperature is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"target_weight": 2}, "target_weight is 2"),
        ({"features": {"9": "1"}}, "features name '9', which the student"),
    ):
        with pytest.raises(ValueError, match=message):
            tersor.distill(student(), teacher(), data(), **{"steps": 1, **arguments})
    with pytest.raises(ValueError, match="student returns"):
        tersor.distill(student()[:3], teacher(), data(), steps=1)
    with pytest.raises(ValueError, match="loss is nan at step 1"):
        tersor.distill(student(), teacher(), [torch.full((4, 16), torch.nan)], steps=1)
    with pytest.raises(ValueError, match="no parameter"):
        tersor.distill(student().requires_grad_(False), teacher(), data(), steps=1)
