"""Distillation: a student learns what a teacher answers (Hinton et al., arXiv:1503.02531)."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import batches, evaluating, first_tensor, in_mode
from .checkpoint import write_tensors
from .progress import tracked

WARM_UP, RATE = 50, 1e-3  # of the default optimizer
Loss = Callable[[Tensor, Any], Tensor]


@dataclass
class Step:
    """What a callback is told after each step of the optimizer. step: from 1; loss: of this batch."""

    step: int
    loss: float
    student: nn.Module
    optimizer: torch.optim.Optimizer


def kl(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Divergence of the softened class probabilities over the last dim, mean over the rest, times temperature**2, so that gradients
    keep their size."""
    log_p = nn.functional.log_softmax(output.float() / temperature, -1).flatten(0, -2)
    log_q = nn.functional.log_softmax(target.float() / temperature, -1).flatten(0, -2)
    return temperature**2 * nn.functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def mse(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    return nn.functional.mse_loss(output.float(), target.float())


def cosine(output: Tensor, target: Tensor, temperature: float) -> Tensor:
    return 1 - nn.functional.cosine_similarity(output.float(), target.float(), dim=-1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"kl": kl, "mse": mse, "cosine": cosine}


def distill(
    student: nn.Module,
    teacher: nn.Module | Callable[..., Any],
    data: Iterable[Any],
    *,
    steps: int,
    loss: str | Loss = "kl",
    temperature: float = 2.0,
    target_loss: Loss | None = None,
    target_weight: float = 0.5,
    features: Mapping[str, str] | None = None,
    feature_weight: float = 1.0,
    optimizer: torch.optim.Optimizer | None = None,
    max_norm: float | None = 1.0,
    callbacks: Iterable[Callable[[Step], Any]] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    progress: bool = False,
) -> nn.Module:
    """Trains `student`, in place, on what `teacher` answers to the same inputs, and returns it.

    student, teacher  any modules; of their outputs the first tensor counts (logits, or the last hidden state). QAT layers
                      (train.qat_) and masks of prune_ train as ever. The teacher runs in eval mode without gradients; it may be
                      any callable, one that looks up answers that are known already, say.
    data      an iterable, gone through again and again: of inputs (a tensor, a tuple of arguments, a dict of keywords), or with
              target_loss of pairs (inputs, target)
    steps     batches in all, those before a resumed checkpoint included
    loss      "kl": of class probabilities softened by `temperature`; "mse"; "cosine": 1 - cosine over the last dim; or a function
              loss(student_output, teacher_output)
    target_loss, target_weight
              target_loss(student_output, target), such as nn.functional.cross_entropy: the loss is then target_weight of it and
              1 - target_weight of the teacher's
    features  {fqn of a student's module: fqn of a teacher's}: what they return is to agree too, by the squared error over the
              teacher's mean square, feature_weight times. Where their last dims differ a linear map is learnt between, and dropped.
    optimizer   None: AdamW, learning rate 1e-3, 50 steps of warm-up, linear decay to 0, no weight decay. One of your own is left as
                it is; with features of different widths it does not see the maps, so these want None.
    max_norm  gradients are clipped to it; None: they are not
    callbacks   called with a Step after each step: callbacks=[lambda _: pruner.step()]
    checkpoint  a file (safetensors, its header holds JSON) written every checkpoint_every steps and at the end: student, optimizer,
                step and random state. Where it is there already, training goes on from it, on the batches that follow.

    Raises ValueError or TypeError on arguments that do not fit, and ValueError where the loss is no longer finite.
    """
    kinds = ", ".join(map(repr, LOSSES))
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"distill: loss is {loss!r}, expected one of {kinds}, or a function of (student_output, teacher_output)")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"distill: steps is {steps!r}, expected a positive int")
    if not temperature > 0:
        raise ValueError(f"distill: temperature is {temperature!r}, expected a positive number")
    if not 0 <= target_weight <= 1:
        raise ValueError(f"distill: target_weight is {target_weight!r}, expected a number from 0 to 1")
    soft: Loss = loss if callable(loss) else lambda output, target: LOSSES[loss](output, target, temperature)
    pairs = _FeaturePairs(student, teacher, features or {})
    scheduled = optimizer is None
    with in_mode(student, True), contextlib.ExitStack() as stack:
        if isinstance(teacher, nn.Module):
            stack.enter_context(in_mode(teacher, False))
        stack.enter_context(pairs.watching())
        stream = _Stream(data)
        if pairs.names:  # one batch, so that the maps between them exist before the optimizer
            call, _ = _split(stream.peek(), target_loss is not None)
            with evaluating(student):
                _call(student, call)
                _call(teacher, call)
            pairs.make_maps()
        if optimizer is None:
            trained = [p for p in (*student.parameters(), *pairs.maps.parameters()) if p.requires_grad]
            if not trained:
                raise ValueError("distill: no parameter of the student requires a gradient")
            optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0)
        state = _State(student, pairs.maps, optimizer)
        done = state.load(checkpoint)
        stream.skip(done)
        for step in tracked(range(done + 1, steps + 1), "distilling", progress):
            call, target = _split(stream.next(), target_loss is not None)
            if scheduled:
                for group in optimizer.param_groups:
                    group["lr"] = RATE * min(1.0, step / WARM_UP) * (1 - (step - 1) / steps)
            with torch.no_grad():
                want = first_tensor(_call(teacher, call))
            got = first_tensor(_call(student, call))
            if not callable(loss) and got.shape != want.shape:
                raise ValueError(
                    f"distill: student returns {list(got.shape)}, teacher {list(want.shape)}; loss {loss!r} needs the same"
                )
            total = soft(got, want)
            if target_loss is not None:
                total = target_weight * target_loss(got, target) + (1 - target_weight) * total
            if pairs.names:
                total = total + feature_weight * pairs.loss()
            value = total.item()
            if not math.isfinite(value):
                raise ValueError(f"distill: the loss is {value} at step {step}")
            optimizer.zero_grad()
            total.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
            optimizer.step()
            for callback in callbacks:
                callback(Step(step, value, student, optimizer))
            if checkpoint is not None and (step % checkpoint_every == 0 or step == steps):
                state.save(checkpoint, step)
    return student


def _call(model: Callable[..., Any], call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = call
    return model(*args, **kwargs)


def _split(item: Any, with_target: bool) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]:
    """(the call, the target or None) of what data yielded."""
    target = None
    if with_target:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(
                f"distill: data yields {type(item).__name__}, expected pairs (inputs, target), as there is a target_loss"
            )
        item, target = item
    return batches([item], "distill: data")[0], target


class _Stream:
    """Batches of `data` without end."""

    def __init__(self, data: Iterable[Any]) -> None:
        if isinstance(data, Iterator):
            self.data: Iterable[Any] = ()
            self.items = data
        else:
            self.data, self.items = data, iter(data)
        self.ahead: list[Any] = []

    def next(self) -> Any:
        if self.ahead:
            return self.ahead.pop()
        for again in (False, True):
            if again:
                self.items = iter(self.data)
            for item in self.items:
                return item
        raise ValueError("distill: data is empty, or an iterator that has ended; give a list, a DataLoader, or enough batches")

    def peek(self) -> Any:
        item = self.next()
        self.ahead.append(item)
        return item

    def skip(self, count: int) -> None:
        for _ in range(count):
            self.next()


class _FeaturePairs:
    """What modules of the student and the teacher returned last, and the maps between them."""

    def __init__(self, student: nn.Module, teacher: Any, names: Mapping[str, str]) -> None:
        self.names = list(names.items())
        self.maps = nn.ModuleList()
        self.seen: dict[tuple[str, str], Tensor] = {}
        self.modules: list[tuple[nn.Module, tuple[str, str]]] = []
        for own, other in self.names:
            for model, whose, fqn in ((student, "student", own), (teacher, "teacher", other)):
                module = dict(model.named_modules()).get(fqn) if isinstance(model, nn.Module) else None
                if module is None:
                    raise ValueError(f"distill: features name {fqn!r}, which the {whose} does not have")
                self.modules.append((module, (whose, fqn)))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def keep(key: tuple[str, str]) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.seen[key] = first_tensor(output)

            return hook

        hooks = [module.register_forward_hook(keep(key)) for module, key in self.modules]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def make_maps(self) -> None:
        for own, other in self.names:
            a, b = self.seen["student", own], self.seen["teacher", other]
            if a.shape[:-1] != b.shape[:-1]:
                raise ValueError(
                    f"distill: features {own!r} {list(a.shape)} and {other!r} {list(b.shape)} may differ in the last dim only"
                )
            same = a.shape[-1] == b.shape[-1]
            self.maps.append(nn.Identity() if same else nn.Linear(a.shape[-1], b.shape[-1], device=a.device))

    def loss(self) -> Tensor:
        total = torch.zeros(())
        for (own, other), to in zip(self.names, self.maps, strict=True):
            want = self.seen["teacher", other].float()
            error = (to(self.seen["student", own].float()) - want).square().mean()
            total = total.to(error.device) + error / want.square().mean().clamp(min=1e-12)
        return total / len(self.names)


class _State:
    """All that training goes on from, as one safetensors file."""

    def __init__(self, student: nn.Module, maps: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.modules = {"student": student, "maps": maps}
        self.optimizer = optimizer

    def save(self, path: str | os.PathLike[str], step: int) -> None:
        tensors = {"random": torch.get_rng_state()}
        for name, module in self.modules.items():
            tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
        numbers: dict[str, Any] = {}
        state = self.optimizer.state_dict()
        for index, values in state["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    numbers[f"{index}.{key}"] = value
        data = {"step": step, "groups": state["param_groups"], "numbers": numbers}
        # Copies: safetensors refuses tensors that share memory, as tied weights do.
        stored = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        target = os.path.abspath(path)
        write_tensors(stored, {"tersor.distill": json.dumps(data)}, target, os.path.dirname(target), True)

    def load(self, path: str | os.PathLike[str] | None) -> int:
        """The step that the file was written at; 0 where there is none."""
        if path is None or not os.path.exists(path):
            return 0
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "tersor.distill" not in metadata:
            raise ValueError(f"distill: {os.fspath(path)} is not a checkpoint of distill; give a path that is free")
        data = json.loads(metadata["tersor.distill"])
        for name, module in self.modules.items():
            found = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            try:
                module.load_state_dict(found)
            except RuntimeError as error:
                raise ValueError(f"distill: {os.fspath(path)} is of another {name}: {error}") from None
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                index, _, key = rest.partition(".")
                state.setdefault(int(index), {})[key] = value
        for name, value in data["numbers"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": data["groups"]})
        torch.set_rng_state(tensors["random"])
        return int(data["step"])
