"""A smaller student cut out of its teacher: fewer blocks, narrower layers inside them, with the teacher's own weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Batch, Trace, batches, evaluating, first_tensor, logger
from .pruning_scores import DAMPING, Hessian

# Linear layers between which nothing mixes units, by the ends of their names: sources, then the layer that reads them. Neighbours
# in an nn.Sequential are found by themselves, with what stands between. Every cut is tried before it is believed.
CHAINS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
    (("intermediate.dense",), "output.dense"),
    (("linear1",), "linear2"),
    (("lin1",), "lin2"),
    (("fc1",), "fc2"),
)


def shrink(
    model: nn.Module, *, depth: int | float | None = None, width: int | float | None = None, inputs: Any = None
) -> nn.Module:
    """A copy of `model` with fewer blocks, or with fewer units inside them; the model itself stays as it is.

    depth   how many of the blocks stay, or which share of them: of each nn.ModuleList or nn.Sequential of modules of one type
            (encoder layers, say). The first and the last stay, the others evenly spaced; with inputs those stay that change their
            input most (1 - cosine, arXiv:2403.03853).
    width   which share of the units between two linear layers stays, or how many: of an MLP, or the inner layer of a transformer
            block. What blocks hand on to each other keeps its size. Needs inputs: units that contribute most stay, and the layer
            after them is fitted, by least squares, to make up for the others.
    inputs  what the model is called with: a tensor, a tuple of arguments, a dict of keywords, or an iterable of those

    Train the student with distill. Raises ValueError where there are no such blocks or layers, or a cut would change what it should
    not.
    """
    if depth is None and width is None:
        raise ValueError("shrink: give depth (blocks that stay), width (units that stay), or both")
    calls = None if inputs is None else batches(inputs, "shrink: inputs")
    student = copy.deepcopy(model)
    if depth is not None:
        _drop_blocks(student, depth, calls)
    if width is not None:
        if calls is None:
            raise ValueError("shrink: width needs inputs, to see which units matter")
        with evaluating(student):
            _narrow(student, width, calls)
    return student


def _count(wanted: int | float, have: int, name: str) -> int:
    if type(wanted) is int and 1 <= wanted <= have:
        return wanted
    if isinstance(wanted, float) and 0 < wanted <= 1:
        return max(1, round(wanted * have))
    raise ValueError(f"shrink: {name} is {wanted!r}, expected an int from 1 to {have}, or a share above 0.0, at most 1.0")


# ---- depth ---------------------------------------------------------------------------------------------------------------------


def _drop_blocks(model: nn.Module, depth: int | float, calls: list[Batch] | None) -> None:
    stacks = {fqn: m for fqn, m in model.named_modules() if _is_stack(m)}
    # A stack inside a block of another goes with it.
    stacks = {fqn: m for fqn, m in stacks.items() if not any(fqn.startswith(f"{other}.") for other in stacks if other)}
    if not stacks:
        raise ValueError("shrink: the model has no nn.ModuleList or nn.Sequential of blocks of one type; depth cannot apply")
    influence = None if calls is None else _influence(model, [block for m in stacks.values() for block in m.children()], calls)
    for fqn, stack in stacks.items():
        blocks = list(stack.children())
        count = _count(depth, len(blocks), "depth")
        if influence is None:
            kept = sorted({round(i * (len(blocks) - 1) / max(1, count - 1)) for i in range(count)})
        else:
            inner = sorted(range(1, len(blocks) - 1), key=lambda i: -influence[blocks[i]])
            kept = sorted([0, len(blocks) - 1, *inner][:count])
        logger.info("tersor: shrink: %s keeps blocks %s of %d", fqn or "the model", ", ".join(map(str, kept)), len(blocks))
        for name in list(stack._modules):
            del stack._modules[name]
        for i, at in enumerate(kept):
            stack._modules[str(i)] = blocks[at]
            for module in blocks[at].modules():
                if isinstance(getattr(module, "layer_idx", None), int):  # where a layer of transformers keeps its cache
                    module.layer_idx = i
        _tell_config(model, len(blocks), count)


def _is_stack(module: nn.Module) -> bool:
    blocks = list(module.children())
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and len(blocks) > 1
        and len({type(block) for block in blocks}) == 1
        and all(sum(isinstance(m, nn.Linear) for m in block.modules()) > 0 and not isinstance(block, nn.Linear) for block in blocks)
    )


def _tell_config(model: nn.Module, was: int, now: int) -> None:
    """Models of transformers loop over as many blocks as their config says."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if getattr(config, key, None) == was:
                setattr(config, key, now)
        if getattr(module, "num_layers", None) == was:  # nn.TransformerEncoder
            module.num_layers = now  # type: ignore[assignment]


def _influence(model: nn.Module, blocks: list[nn.Module], calls: list[Batch]) -> dict[nn.Module, float]:
    """Mean of 1 - cosine between what a block is given and what it returns."""
    sums = {block: [0.0, 0.0] for block in blocks}

    def note(block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        y = first_tensor(output)
        cosine = nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
        sums[block][0] += (1 - cosine).sum().item()
        sums[block][1] += cosine.numel()

    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        with evaluating(model):
            for args, kwargs in calls:
                model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {block: total / max(1.0, count) for block, (total, count) in sums.items()}


# ---- width ---------------------------------------------------------------------------------------------------------------------


class _Chain:
    """sources -> reader: the reader's input channel i depends on output i of each source alone, through modules that treat every
    channel alike, or have parameters for each (`between`: batch norms)."""

    def __init__(self, fqn: str, sources: list[nn.Linear], between: list[nn.Module], reader: nn.Linear) -> None:
        self.fqn, self.sources, self.between, self.reader = fqn, sources, between, reader

    def cut(self, kept: Tensor) -> None:
        for module in (*self.sources, *self.between):
            tensors: dict[str, Any] = {**module._parameters, **module._buffers}
            for name, value in tensors.items():
                if value is not None and value.dim() > 0:
                    _replace(module, name, value.detach()[kept])
            for size in ("out_features", "num_features"):
                if hasattr(module, size):
                    setattr(module, size, len(kept))

    def narrow_reader(self, weight: Tensor, shift: Tensor) -> None:
        linear = self.reader
        linear.in_features = weight.shape[1]
        _replace(linear, "weight", weight.to(linear.weight.dtype))
        if linear.bias is not None:
            _replace(linear, "bias", (linear.bias.detach() + shift.to(linear.bias.dtype)))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = module._parameters.get(name)
    if old is None:
        module._buffers[name] = value.clone()
    else:
        module._parameters[name] = nn.Parameter(value.clone(), old.requires_grad)


def _narrow(model: nn.Module, width: int | float, calls: list[Batch]) -> None:
    chains = _chains(model)
    if not chains:
        raise ValueError("shrink: found no linear layers that feed each other unit by unit; width cannot apply")
    trace = Trace(model, [chain.reader for chain in chains], calls)
    by_reader = {chain.reader: chain for chain in chains}
    order = [by_reader[layer] for group in trace.order for layer in group]  # type: ignore[index]
    if not order:
        raise ValueError("shrink: inputs reach none of the layers that width could narrow")
    if not trace.finite:
        raise ValueError("shrink: a layer is given NaN or inf on the inputs")
    for chain in order:
        second = _second_moments(trace, chain.reader)
        reader = chain.reader.weight.detach().double()
        k = reader.shape[1]
        count = _count(width, k, "width")
        if count == k:
            continue
        worth = second.diagonal()[:k] * reader.square().sum(0)
        kept = worth.argsort(descending=True)[:count].sort().values
        weight, shift = _fit(reader, second, kept, chain.reader.bias is not None)
        before = _masked(model, chain, kept, calls[0])
        plain = reader[:, kept].to(chain.reader.weight.dtype)
        chain.cut(kept)
        chain.narrow_reader(plain, torch.zeros(len(reader), device=reader.device))
        args, kwargs = calls[0]
        try:
            after = first_tensor(model(*args, **kwargs))
        except RuntimeError as error:
            raise ValueError(f"shrink: {chain.fqn} cannot be narrowed: the model needs its size ({error})") from None
        bound = 1e-3 * before.abs().max()  # other sums in another order; units that are not independent show by far more
        if not bool(((after - before).abs() <= bound).all()):
            raise ValueError(
                f"shrink: the units that {chain.fqn} reads depend on each other or are read elsewhere; width cannot apply"
            )
        chain.narrow_reader(weight, shift)


def _second_moments(trace: Trace, reader: nn.Module) -> Tensor:
    """Mean of x x^T, float64 [K + 1, K + 1], with a constant 1 beside the features, so that the fit moves the bias too."""
    seen = Hessian()
    trace.run([reader], lambda _, x: seen.add(torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)))
    return seen.value().double()


def _fit(reader: Tensor, second: Tensor, kept: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    """(weight [N, kept], what is added to the bias [N]): closest to the whole layer's outputs, in the mean of squares."""
    k = reader.shape[1]
    columns = torch.cat([kept, torch.tensor([k], device=kept.device)]) if biased else kept
    gram = second[columns][:, columns]
    gram.diagonal().add_(DAMPING * 0.01 * gram.diagonal().mean())
    # reader - what its kept columns do already, so that damping pulls towards the teacher's own weights.
    left = reader.clone()
    left[:, kept] = 0.0
    change = torch.linalg.solve(gram, second[columns][:, :k] @ left.T).T
    weight = reader[:, kept] + change[:, : len(kept)]
    return weight, change[:, -1] if biased else reader.new_zeros(len(reader))


def _masked(model: nn.Module, chain: _Chain, kept: Tensor, call: Batch) -> Tensor:
    """The model's output with the reader's other columns at zero: what a cut must give."""
    whole = chain.reader.weight
    mask = torch.zeros(whole.shape[1], device=whole.device, dtype=whole.dtype)
    mask[kept] = 1
    chain.reader.weight = nn.Parameter(whole.detach() * mask, requires_grad=False)
    try:
        args, kwargs = call
        return first_tensor(model(*args, **kwargs)).clone()
    finally:
        chain.reader.weight = whole


def _chains(model: nn.Module) -> list[_Chain]:
    found: dict[nn.Linear, _Chain] = {}
    names = dict(model.named_modules())
    for fqn, module in names.items():
        if isinstance(module, nn.Sequential):
            _in_sequence(fqn, module, found)
    for fqn, module in names.items():
        if type(module) is not nn.Linear:
            continue
        for sources, reader in CHAINS:
            if not (fqn == sources[0] or fqn.endswith(f".{sources[0]}")):
                continue
            prefix = fqn[: len(fqn) - len(sources[0])]
            linears = [names.get(prefix + name) for name in (*sources, reader)]
            if all(type(m) is nn.Linear for m in linears):
                *first, last = [m for m in linears if isinstance(m, nn.Linear)]
                if last not in found and all(m.out_features == last.in_features for m in first):
                    found[last] = _Chain(prefix + reader, first, [], last)
                break
    return list(found.values())


def _in_sequence(fqn: str, sequence: nn.Sequential, found: dict[nn.Linear, _Chain]) -> None:
    source: nn.Linear | None = None
    between: list[nn.Module] = []
    for name, module in sequence.named_children():
        if type(module) is nn.Linear:
            if source is not None and source.out_features == module.in_features:
                found[module] = _Chain(f"{fqn}.{name}" if fqn else name, [source], between, module)
            source, between = module, []
        elif isinstance(module, nn.BatchNorm1d):
            between = [*between, module]
        elif any(True for _ in module.parameters()):
            source = None
