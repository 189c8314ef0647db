"""Moves the outliers of activations into the weights, where int8 per channel can hold them (SmoothQuant, arXiv:2211.10438).

For a layer y = x W^T and any s > 0 per input channel, y = (x / s) (W s)^T: the next layers' columns take s, and whatever makes x
takes 1 / s. That is a norm before the layer, the up projection whose product with the gate the down projection reads, or the
value projection of attention before its output projection.

s is rounded to a power of two: then every product and sum of the float model keeps its digits, and so does the whole model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .calibration import Batch, batches, evaluating, first_tensor, logger, watched
from .formats import Format, Int8Dynamic, Int8Static
from .nn import has_values
from .observers import CODES
from .selection import some

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ROWS = 512  # of its inputs that a layer is judged by

# Linear layers known to feed each other channel by channel, by the ends of their names: a product with a gate, attention's weighted
# sum of values, or ReLU in between. Pairs that are named here or found at a norm are tried on the model before they are believed.
LINEAR_PAIRS = (
    ("up_proj", "down_proj"),
    ("w3", "w2"),
    ("v_proj", "o_proj"),
    ("v_proj", "out_proj"),
    ("self.value", "output.dense"),
    ("value", "proj"),
    ("v", "o"),
    ("v", "proj"),
)


@dataclass(frozen=True)
class Pair:
    """source  fqn of a norm or an nn.Linear
    targets  fqns of the nn.Linear layers that read what it makes, all of them"""

    source: str
    targets: tuple[str, ...]


def smooth_(
    model: nn.Module,
    inputs: Any,
    *,
    alpha: float | Sequence[float] | None = None,
    format: Format | None = None,
    pairs: Iterable[Pair] | None = None,
) -> nn.Module:
    """Makes the activations of a float model easier to quantise, in place, and returns it: its outputs stay the same, bit for bit
    where no value leaves the range of its dtype.

    inputs  what the model is called with, as in calibrate
    alpha   s = max|x|^alpha / max|w|^(1 - alpha) per channel: how far the outliers move. Several values, None for ALPHAS: each pair
            takes the one with which its quantised layers come closest to the float ones on the inputs, or is left alone
    format  what the layers are to be quantised to, for that choice: Int8Dynamic() (None) or Int8Static()
    pairs   None: those that find_pairs finds

    Raises ValueError, the model as it was, where a pair that was given does not keep the outputs.
    """
    fmt = Int8Dynamic() if format is None else format
    if not isinstance(fmt, Int8Dynamic | Int8Static):
        raise ValueError(f"smooth_: format is {fmt!r}, expected Int8Dynamic() or Int8Static(), whose activations are int8")
    alphas = ALPHAS if alpha is None else tuple(alpha) if isinstance(alpha, Sequence) else (alpha,)
    if not alphas or not all(0 <= a <= 1 for a in alphas):
        raise ValueError(f"smooth_: alpha is {alpha!r}, expected numbers from 0 to 1")
    calls = batches(inputs, "smooth_: inputs")
    joints = _joints(model, calls, None if pairs is None else list(pairs))
    seen: dict[nn.Module, _Seen] = {joint.targets[0]: _Seen() for joint in joints}
    with evaluating(model), watched(seen, lambda layer, x: seen[layer].add(x)):
        for args, kwargs in calls:
            model(*args, **kwargs)
    with torch.no_grad():
        for joint in joints:
            _smooth(joint, seen.pop(joint.targets[0]), alphas, isinstance(alpha, float | int), fmt)
    return model


def find_pairs(model: nn.Module, inputs: Any) -> list[Pair]:
    """The pairs between which scales can move: each norm and the linear layers that alone read what it makes, and linear layers by
    the names of LINEAR_PAIRS. Every one was tried: scaled by powers of two, the model gives the same on the first of `inputs`."""
    return [joint.pair for joint in _joints(model, batches(inputs, "find_pairs: inputs"), None)]


class _Joint:
    """A pair with its modules. channels: int64 [K], the source's output channel that each input channel of the targets reads."""

    def __init__(self, model: nn.Module, pair: Pair, channels: Tensor) -> None:
        self.pair = pair
        self.source = model.get_submodule(pair.source)
        self.targets = [target for fqn in pair.targets if isinstance(target := model.get_submodule(fqn), nn.Linear)]
        self.channels = channels

    @torch.no_grad()
    def scale(self, s: Tensor) -> None:
        """Divides the source's output channels by s [N] and multiplies the targets' columns by it."""
        for name in ("weight", "bias"):
            value = getattr(self.source, name, None)
            if value is not None:
                s_ = s.to(value.dtype)
                value.div_(s_ if value.dim() == 1 else s_.unsqueeze(1))
        for target in self.targets:
            target.weight.mul_(s[self.channels].to(target.weight.dtype))

    def kind(self) -> tuple[str, ...]:
        """Pairs of the same kind are those that differ in numbers only: block after block."""
        return tuple(re.sub(r"\d+", "*", fqn) for fqn in (self.pair.source, *self.pair.targets))


class _Seen:
    """The absmax of each input feature, and some of the rows."""

    def __init__(self) -> None:
        self.absmax: Tensor | None = None
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if not rows.shape[0]:
            return
        absmax = rows.abs().amax(0)
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        have = sum(map(len, self.rows))
        if have < ROWS:
            self.rows.append(rows[:: max(1, len(rows) // (ROWS // 4))][: ROWS - have].clone())


def _smooth(joint: _Joint, seen: _Seen, alphas: Sequence[float], forced: bool, fmt: Format) -> None:
    assert seen.absmax is not None
    weights = [target.weight.float() for target in joint.targets]
    n = int(joint.channels.max()) + 1
    x_max = torch.zeros(n, device=seen.absmax.device).scatter_reduce_(0, joint.channels, seen.absmax, "amax")
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    w_max = torch.zeros_like(x_max).scatter_reduce_(0, joint.channels, columns, "amax")
    x = torch.cat(seen.rows)
    outputs = [x @ w.T for w in weights]
    best, least = None, torch.inf if forced else _error(x, weights, outputs, seen.absmax, fmt)
    for a in alphas:
        s = _powers_of_two(x_max, w_max, a)
        column = s[joint.channels]
        error = _error(x / column, [w * column for w in weights], outputs, seen.absmax / column, fmt)
        if error < least:
            best, least = s, error
    if best is not None:
        joint.scale(best)


def _powers_of_two(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    usable = (x_max > 0) & (w_max > 0)
    logs = alpha * x_max.double().log2() - (1 - alpha) * w_max.double().log2()
    # About a mean of 1: a common factor changes nothing but the range that the float model has left.
    logs = torch.where(usable, logs, 0.0)
    logs = logs - (logs[usable].mean() if usable.any() else 0.0)
    return torch.where(usable, logs.round().clamp(-14, 14).exp2(), 1.0).float()


def _error(x: Tensor, weights: list[Tensor], outputs: list[Tensor], absmax: Tensor, fmt: Format) -> float:
    """Squared error of the quantised layers over the square of their outputs, summed over the layers."""
    if isinstance(fmt, Int8Static):
        scale = absmax.amax() / CODES
        x_hat = (x / scale).round().clamp(-CODES, CODES) * scale
    else:
        x_hat = _rounded(x)
    return sum(
        (((x_hat @ _rounded(w).T) - y).square().sum() / y.square().sum().clamp(min=1e-30)).item()
        for w, y in zip(weights, outputs, strict=True)
    )


def _rounded(rows: Tensor) -> Tensor:
    q, scale, _ = ops.quantize_rows(rows)
    return q * scale.unsqueeze(1)


# ---- finding pairs -------------------------------------------------------------------------------------------------------------


def _joints(model: nn.Module, calls: list[Batch], given: list[Pair] | None) -> list[_Joint]:
    names = {fqn: module for fqn, module in model.named_modules()}
    if given is not None:
        candidates = [_joint(model, names, pair) for pair in given]
    else:
        candidates = [_Joint(model, pair, channels) for pair, channels in _candidates(model, names, calls[0])]
    with evaluating(model):
        want = _run(model, calls[0])
        groups: dict[tuple[str, ...], list[_Joint]] = {}
        for joint in candidates:
            groups.setdefault(joint.kind(), []).append(joint)
        sound: set[int] = set()
        for group in groups.values():
            # All blocks at once where they agree, which they mostly do; else each by itself.
            if _keeps(model, calls[0], want, group):
                sound |= set(map(id, group))
            elif len(group) > 1:
                sound |= {id(joint) for joint in group if _keeps(model, calls[0], want, [joint])}
    dropped = [f"{joint.pair.source} -> {', '.join(joint.pair.targets)}" for joint in candidates if id(joint) not in sound]
    if dropped and given is not None:
        raise ValueError(f"smooth_: scales cannot move along {some(dropped)}: the outputs of the model would change")
    if dropped:
        logger.info("tersor: smooth_: %d pairs stay, as others read what they share: %s", len(dropped), some(dropped))
    return [joint for joint in candidates if id(joint) in sound]


def _joint(model: nn.Module, names: dict[str, nn.Module], pair: Pair) -> _Joint:
    for fqn in (pair.source, *pair.targets):
        if fqn not in names:
            raise ValueError(f"smooth_: pairs name {fqn!r}, which the model does not have")
    for fqn in pair.targets:
        if type(names[fqn]) is not nn.Linear:
            raise ValueError(f"smooth_: {fqn} is {type(names[fqn]).__name__}, expected nn.Linear")
    channels = _channels(names, pair)
    if not pair.targets or channels is None:
        raise ValueError(f"smooth_: {pair} does not fit: in_features must be the source's channels, or its heads repeated")
    return _Joint(model, pair, channels)


def _channels(names: dict[str, nn.Module], pair: Pair) -> Tensor | None:
    """Which channel of the source each input of the targets reads; None where the sizes do not fit."""
    source, targets = names[pair.source], [names[fqn] for fqn in pair.targets]
    weight = getattr(source, "weight", None)
    if not isinstance(weight, Tensor) or len({target.in_features for target in targets}) != 1:
        return None
    n, k = weight.shape[0], int(targets[0].in_features)  # type: ignore[arg-type]
    if n == k:
        return torch.arange(k, device=weight.device)
    # Grouped-query attention: a head of values serves several heads of queries next to each other.
    head = getattr(names.get(pair.source.rpartition(".")[0]), "head_dim", None)
    if not isinstance(head, int) or n % head or k % n:
        return None
    return torch.arange(n, device=weight.device).view(n // head, 1, head).expand(-1, k // n, -1).reshape(k)


def _candidates(model: nn.Module, names: dict[str, nn.Module], call: Batch) -> list[tuple[Pair, Tensor]]:
    holders = Counter(id(p) for module in names.values() for p in module._parameters.values() if p is not None)
    own = {fqn: module for fqn, module in names.items() if _alone(module, holders)}
    linears: dict[str, nn.Module] = {fqn: module for fqn, module in own.items() if type(module) is nn.Linear}
    norms = {fqn: module for fqn, module in own.items() if module._parameters["weight"].dim() == 1}  # type: ignore[union-attr]
    readers = _readers(model, norms, linears, call)
    found = [Pair(source, tuple(targets)) for source, targets in readers.items()]
    for fqn in linears:
        for source_end, target_end in LINEAR_PAIRS:
            if fqn != source_end and not fqn.endswith("." + source_end):
                continue
            target = fqn[: len(fqn) - len(source_end)] + target_end
            if target in linears:
                found.append(Pair(fqn, (target,)))
                break
    known = [(pair, _channels(names, pair)) for pair in found]
    return [(pair, channels) for pair, channels in known if channels is not None]


def _alone(module: nn.Module, holders: Counter[int]) -> bool:
    """Whether its parameters are values of its own: not tied, not computed by a parametrisation."""
    weight = module._parameters.get("weight")
    own = [p for p in module._parameters.values() if p is not None]
    return weight is not None and has_values(weight) and all(holders[id(p)] == 1 for p in own)


def _readers(model: nn.Module, norms: dict[str, nn.Module], linears: dict[str, nn.Module], call: Batch) -> dict[str, list[str]]:
    """norm -> the linear layers whose input is the very tensor that it returns."""
    makers = {module: fqn for fqn, module in norms.items()}
    targets = {module: fqn for fqn, module in linears.items()}
    made: list[tuple[Tensor, str]] = []  # tensors are held, so that no memory is used twice
    readers: dict[str, list[str]] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            made.append((output, makers[module]))

    def read(layer: nn.Module, x: Tensor) -> None:
        for y, norm in reversed(made):
            if y.data_ptr() == x.data_ptr() and y.shape == x.shape:
                if targets[layer] not in readers.setdefault(norm, []):
                    readers[norm].append(targets[layer])
                return

    hooks = [norm.register_forward_hook(note) for norm in makers]
    try:
        with evaluating(model), watched(targets, read):
            _run(model, call)
    finally:
        for hook in hooks:
            hook.remove()
    return readers


def _run(model: nn.Module, call: Batch) -> Tensor:
    args, kwargs = call
    return first_tensor(model(*args, **kwargs)).clone()


def _keeps(model: nn.Module, call: Batch, want: Tensor, joints: list[_Joint]) -> bool:
    """Whether the outputs stay when the pairs are scaled by powers of two at random, which is then undone without a trace."""
    generator = torch.Generator().manual_seed(0)
    scales = []
    for joint in joints:
        n = int(joint.channels.max()) + 1
        scales.append(torch.randint(-1, 2, (n,), generator=generator).float().exp2().to(joint.channels.device))
    for joint, s in zip(joints, scales, strict=True):
        joint.scale(s)
    try:
        got = _run(model, call)
    finally:
        for joint, s in zip(joints, scales, strict=True):
            joint.scale(1 / s)
    # Equal but for what a kernel does in another order; a pair that does not commute is off by the size of the outputs.
    tolerance = 64 * torch.finfo(want.dtype).eps * want.abs().max() if want.is_floating_point() else 0
    return got.shape == want.shape and bool(((got - want).abs() <= tolerance).all())
