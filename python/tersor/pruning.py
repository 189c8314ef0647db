"""Pruning: zeros in the weights of nn.Linear, chosen at once or along a schedule, held by masks while the model trains.

pruner = tersor.prune_(model, tersor.Block((16, 4), 0.8), schedule=tersor.CubicSchedule(end=1000, every=20))
for batch in data:
    ...; optimizer.step(); pruner.step()
tersor.finalize_(model)                     # plain nn.Linear again, the zeros in their weights
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Batch, Trace, batches, evaluating
from .masks import Mask, attach, detach, latent_weight, mask_of, only_mask
from .nn import has_values
from .pruning_patterns import CubicSchedule, Pattern
from .pruning_scores import FeatureNorms, Hessian, keep_highest, magnitude, sparsegpt, wanda
from .selection import Filter, Rules, Task, choose, some
from .swap import is_finite

logger = logging.getLogger("tersor")

PatternConfig = Pattern | Mapping[str, "Pattern | None"]

SCORES = ("magnitude", "wanda", "sparsegpt")
SCOPES = ("layer", "global")

_TASK = Task("prune_", Pattern, "a pattern such as tersor.Unstructured(0.9)", "pruned", "dense", packs=False)


@dataclass(eq=False)
class _Pruned:
    """One weight and the layers that hold it: several where it is tied."""

    fqns: list[str]
    layers: list[nn.Linear]
    pattern: Pattern
    mask: Mask

    @property
    def weight(self) -> nn.Parameter:
        return latent_weight(self.layers[0])


def prune_(
    model: nn.Module,
    pattern: PatternConfig,
    *,
    score: str = "magnitude",
    scope: str = "layer",
    schedule: CubicSchedule | None = None,
    filter_fn: Filter | None = None,
    calibration: Any = None,
) -> Pruner:
    """Puts masks on the weights of the nn.Linear layers of `model`, in place, that hold their zeros while the model trains on.

    pattern      Unstructured(sparsity), Block(shape, sparsity) or NM(n, m), or a dict {fqn | "re:<regex>" (fullmatch) | "_default":
                 pattern or None}; precedence, errors and the layers left alone by default are those of quantize_
    score        "magnitude": abs(w)
                 "wanda": abs(w) * ||x||_2 of its input feature (arXiv:2306.11695)
                 "sparsegpt": weights that stay make up for those that go (arXiv:2301.00774); at once only, and changes weights
    scope        what competes: the weights of a layer (of an output row, for Wanda), or "global", those of all layers with the same
                 pattern. Groups of NM never compete; sparsegpt has only "layer".
    schedule     None: the zeros are there when this returns, before any training; else step() makes them
    filter_fn    as in quantize_
    calibration  what the model is called with to see the inputs of its layers, for Wanda and SparseGPT: a tensor, a tuple of
                 arguments, a dict of keywords, or an iterable of those. With a schedule it is run again whenever masks change;
                 without one each layer sees what the layers pruned before it pass on ("layer" scope).

    Parameters stay the same objects, so optimizers keep working; a mask is a bool buffer of its layer's state_dict. Scores read the
    weights as float32. What a mask has dropped stays dropped. Raises ValueError or TypeError, the model untouched.
    """
    groups, inputs = _plan(model, pattern, score, scope, schedule, filter_fn, calibration)
    trace = _trace(model, groups, inputs) if inputs is not None else None
    for group in groups:
        for layer in group.layers:
            attach(layer, group.mask)
    pruner = Pruner(model, groups, score, scope, schedule, inputs)
    if schedule is None:
        pruner._prune(1.0, trace)
    return pruner


def finalize_(model: nn.Module) -> nn.Module:
    """Takes the masks off and puts the zeros into the weights, in place, and returns the model: plain nn.Linear, same parameters.

    Training on would fill the zeros again. A weight that is tied to a module without a mask becomes a parameter of its own. Raises
    ValueError, the model untouched, where it holds no mask, or one that does not fit its weight or is not alone on it.
    """
    layers = {fqn: module for fqn, module in model.named_modules() if mask_of(module)}
    if not layers:
        raise ValueError("finalize_: model holds no mask of prune_")
    for fqn, layer in layers.items():
        if not only_mask(layer):
            raise ValueError(f"finalize_: {fqn}.weight has other parametrisations beside its mask; remove those first")
        _fitting_mask(layer, fqn, "finalize_")
    holders: dict[int, set[int]] = {}  # id of a parameter -> ids of the modules that hold it
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    for layer in layers.values():
        holders[id(latent_weight(layer))].discard(id(layer.parametrizations.weight))
    own: dict[int, nn.Parameter] = {}
    with torch.inference_mode(False), torch.no_grad():
        for fqn, layer in layers.items():
            mask = mask_of(layer)
            assert mask is not None
            weight = detach(layer)
            if holders[id(weight)]:
                if id(weight) not in own:
                    own[id(weight)] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                    logger.warning("tersor: %s.weight is tied to a module without a mask: it is a parameter of its own now", fqn)
                layer.weight = weight = own[id(weight)]
            weight.masked_fill_(~mask.mask, 0.0)
    return model


class Pruner:
    """What prune_ returns: moves the masks along the schedule. The masks themselves belong to the model and its state_dict."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[_Pruned],
        score: str,
        scope: str,
        schedule: CubicSchedule | None,
        inputs: list[Batch] | None,
    ) -> None:
        self._model = model
        self._groups = groups
        self._score, self._scope = score, scope
        self._inputs = inputs
        self._step = 0
        self.schedule = schedule

    def step(self) -> bool:
        """Counts one step, after that of the optimizer, and prunes further where the schedule says so. Returns whether it did."""
        now = self._step + 1
        due = self.schedule is not None and self.schedule.due(now)
        if self.schedule is not None and due:
            self._prune(self.schedule.progress(now), None)
        self._step = now
        return due

    def sparsity(self, fqn: str | None = None) -> float:
        """Share of zeros in the weights of all pruned layers, or of the one named `fqn`."""
        names = [name for group in self._groups for name in group.fqns]
        if fqn is not None and fqn not in names:
            raise ValueError(f"sparsity: {fqn!r} is not pruned; layers that are: {some(names)}")
        weights = [group.layers[0].weight.detach() for group in self._groups if fqn is None or fqn in group.fqns]
        return sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, and of what. The masks are in the model's state_dict."""
        return {
            "step": self._step,
            "score": self._score,
            "scope": self._scope,
            "schedule": repr(self.schedule),
            "patterns": {fqn: repr(group.pattern) for group in self._groups for fqn in group.fqns},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the pruner that gave `state` stopped; load the model's state_dict, which holds the masks, first.

        Raises ValueError where the state is of other layers, patterns or another schedule, or the masks were not loaded.
        """
        mine = self.state_dict()
        if not isinstance(state, Mapping) or state.keys() != mine.keys() or type(state["step"]) is not int or state["step"] < 0:
            raise ValueError(f"load_state_dict: the state is not one of a Pruner, expected a dict of {', '.join(mine)}")
        for key in mine.keys() - {"step"}:
            if state[key] != mine[key]:
                raise ValueError(f"load_state_dict: {key} is {state[key]!r} in the state, {mine[key]!r} in this pruner")
        progress = 1.0 if self.schedule is None else self.schedule.progress(self._last_change(state["step"]))
        for group in self._groups:
            mask = group.mask.mask
            if mask.all() and not keep_highest([mask.float()], [mask], group.pattern, progress, False)[0].all():
                raise ValueError(f"load_state_dict: the mask of {group.fqns[0]} is empty; load the model's state_dict first")
        self._step = state["step"]

    def _last_change(self, step: int) -> int:
        assert self.schedule is not None
        return next((s for s in range(step, 0, -1) if self.schedule.due(s)), 0)

    def __repr__(self) -> str:
        layers = sum(len(group.fqns) for group in self._groups)
        return (
            f"Pruner({layers} layers, score={self._score!r}, scope={self._scope!r}, schedule={self.schedule!r}, step={self._step})"
        )

    # ---- choosing --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _prune(self, progress: float, trace: Trace | None) -> None:
        """trace: of the calibration, for pruning layer after layer in the order of their calls; None: all at once."""
        for group in self._groups:
            for fqn, layer in zip(group.fqns, group.layers, strict=True):
                if _fitting_mask(layer, fqn, "step") is not group.mask:
                    raise ValueError(f"step: {fqn} carries the mask of another prune_")
            if not is_finite(group.weight.detach()):
                raise ValueError(f"step: {group.fqns[0]}.weight holds NaN or inf")
        if self._inputs is None:
            self._update(self._groups, progress, None)
            return
        with evaluating(self._model):
            if trace is None:
                trace = _trace(self._model, self._groups, self._inputs)
            if self.schedule is None and self._scope == "layer":
                for groups in _in_order(self._groups, trace):
                    self._update(groups, progress, trace)
            else:
                self._update(self._groups, progress, trace)

    def _update(self, groups: list[_Pruned], progress: float, trace: Trace | None) -> None:
        """New masks for these groups, which are calibrated together."""
        if self._score == "sparsegpt":
            assert trace is not None
            for group, hessian in zip(groups, _statistics(trace, groups, Hessian), strict=True):
                mask, weight = sparsegpt(group.weight, hessian, group.pattern)
                group.weight.copy_(weight)
                group.mask.mask.copy_(mask)
            return
        if self._score == "wanda":
            assert trace is not None
            norms = _statistics(trace, groups, FeatureNorms)
            scores = [wanda(group.weight, norm) for group, norm in zip(groups, norms, strict=True)]
        else:
            scores = [magnitude(group.weight) for group in groups]
        competing: dict[Any, list[int]] = {}
        for i, group in enumerate(groups):
            competing.setdefault(group.pattern if self._scope == "global" else i, []).append(i)
        per_row = self._score == "wanda" and self._scope == "layer"
        for indices in competing.values():
            masks = [groups[i].mask.mask for i in indices]
            pattern = groups[indices[0]].pattern
            for mask, new in zip(masks, keep_highest([scores[i] for i in indices], masks, pattern, progress, per_row), strict=True):
                mask.copy_(new)


# ---- planning -------------------------------------------------------------------------------------------------------------------


def _plan(
    model: nn.Module,
    pattern: PatternConfig,
    score: str,
    scope: str,
    schedule: CubicSchedule | None,
    filter_fn: Filter | None,
    calibration: Any,
) -> tuple[list[_Pruned], list[Batch] | None]:
    """What is pruned and on which inputs, everything checked."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"prune_: model is {type(model).__name__}, expected an nn.Module")
    for name, value, known in (("score", score, SCORES), ("scope", scope, SCOPES)):
        if value not in known:
            raise ValueError(f"prune_: {name} is {value!r}, expected one of: {', '.join(known)}")
    if schedule is not None and not isinstance(schedule, CubicSchedule):
        raise TypeError(f"prune_: schedule is {schedule!r}, expected a tersor.CubicSchedule or None")
    if score == "sparsegpt" and (scope == "global" or schedule is not None):
        raise ValueError("prune_: sparsegpt prunes layer by layer and at once: scope must be 'layer', schedule None")
    if (calibration is None) != (score == "magnitude"):
        needs = "reads no inputs: leave calibration out" if score == "magnitude" else "needs calibration: inputs of the model"
        raise ValueError(f"prune_: {score} {needs}")
    inputs = None if calibration is None else batches(calibration, "prune_: calibration")

    chosen = choose(model, Rules(pattern, _TASK), filter_fn)
    if not chosen:
        raise ValueError("prune_: pattern and filter_fn choose no layer of the model")
    groups: dict[int, _Pruned] = {}
    for spot, wanted in chosen:
        layer = spot.layer()
        weight = layer.weight.detach()
        where = spot.fqn or "model"
        if not has_values(weight):
            raise ValueError(f"prune_: {where}.weight is on meta, it has no values to choose from")
        if not is_finite(weight):
            raise ValueError(f"prune_: {where}.weight holds NaN or inf; nothing was changed")
        if (group := groups.get(id(layer.weight))) is None:
            with torch.inference_mode(False):  # or a model pruned under inference_mode could not train
                mask = Mask(torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
            groups[id(layer.weight)] = _Pruned([spot.fqn], [layer], wanted, mask)
            continue
        if group.pattern != wanted:
            raise ValueError(
                f"prune_: {group.fqns[0]} and {spot.fqn} share a weight, but are given {group.pattern!r} and {wanted!r}"
            )
        if layer not in group.layers:
            group.fqns.append(spot.fqn)
            group.layers.append(layer)
    return list(groups.values()), inputs


def _fitting_mask(layer: nn.Module, fqn: str, function: str) -> Mask:
    mask = mask_of(layer)
    if mask is None:
        raise ValueError(f"{function}: {fqn} has no mask any more: finalize_ was called")
    if mask.mask.shape != latent_weight(layer).shape:
        raise ValueError(
            f"{function}: the mask of {fqn} is {list(mask.mask.shape)}, its weight has become {list(latent_weight(layer).shape)}"
        )
    return mask


# ---- calibrating ----------------------------------------------------------------------------------------------------------------


def _trace(model: nn.Module, groups: list[_Pruned], inputs: list[Batch]) -> Trace:
    with evaluating(model):
        trace = Trace(model, [layer for group in groups for layer in group.layers], inputs)
    reached = {layer for layers in trace.order for layer in layers}
    missed = [group.fqns[0] for group in groups if not reached.intersection(group.layers)]
    if missed:
        raise ValueError(f"prune_: calibration never reaches {some(missed)}; give them the pattern None")
    if not trace.finite:
        raise ValueError("prune_: calibration gives a layer NaN or inf")
    return trace


def _in_order(groups: list[_Pruned], trace: Trace) -> list[list[_Pruned]]:
    """The groups by the first call of a layer of theirs, together where they are given the same input."""
    owner = {layer: group for group in groups for layer in group.layers}
    found: list[list[_Pruned]] = []
    seen: set[int] = set()
    for layers in trace.order:
        new = {id(owner[layer]): owner[layer] for layer in layers if id(owner[layer]) not in seen}  # type: ignore[index]
        seen |= new.keys()
        if new:
            found.append(list(new.values()))
    return found


def _statistics(trace: Trace, groups: list[_Pruned], kind: type[FeatureNorms] | type[Hessian]) -> list[Tensor]:
    """Of the inputs of each group."""
    found = [kind() for _ in groups]
    of = {layer: statistic for group, statistic in zip(groups, found, strict=True) for layer in group.layers}
    trace.run(list(of), lambda layer, x: of[layer].add(x))  # type: ignore[index]
    return [statistic.value() for statistic in found]
