"""Runs a model on calibration inputs and shows what its layers are given."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("tersor")

Batch = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs of one call


def batches(inputs: Any, argument: str) -> list[Batch]:
    """The calls of the model that `inputs` stands for: a tensor, a tuple of arguments, a dict of keywords (or another mapping, as
    tokenizers give), or an iterable of those.

    argument  what messages call it
    """
    if isinstance(inputs, Tensor | tuple | Mapping):
        inputs = [inputs]
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Iterable):
        raise TypeError(f"{argument} is {type(inputs).__name__}, expected a tensor, a tuple, a dict, or an iterable of those")
    calls: list[Batch] = []
    for item in inputs:
        if isinstance(item, Mapping):
            calls.append(((), dict(item)))
        else:
            calls.append((tuple(item) if isinstance(item, tuple | list) else (item,), {}))
    if not calls:
        raise ValueError(f"{argument} is empty")
    return calls


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval mode; every module gets its own back."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module gets its mode back."""
    with in_mode(model, False), torch.no_grad():
        yield


@contextlib.contextmanager
def watched(layers: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Calls see(layer, x) before each forward of each layer."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(layer, (args[0] if args else kwargs["input"]).detach())

    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class _Seen(Exception):
    """Ends a forward pass once nothing that follows is of interest."""


class Trace:
    """Which layers a pass over the batches calls, and in which order: found once, so that later passes may end early.

    order   layers by their first call; those that follow each other on the very same input form one entry
    finite  whether no input of a layer held NaN or inf
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], inputs: list[Batch]) -> None:
        self.model = model
        self.inputs = inputs
        self.finite = True
        self.order: list[list[nn.Module]] = []
        self._calls: list[list[nn.Module]] = []  # of each batch
        known: set[nn.Module] = set()
        last: Tensor | None = None

        def note(layer: nn.Module, x: Tensor) -> None:
            nonlocal last
            self._calls[-1].append(layer)
            self.finite &= bool(torch.isfinite(x).all())
            if layer not in known:
                known.add(layer)
                same = last is not None and x.data_ptr() == last.data_ptr() and x.shape == last.shape
                self.order[-1].append(layer) if same else self.order.append([layer])
            last = x  # held, so that its memory is not another tensor's at the next call

        with watched(layers, note):
            for args, kwargs in inputs:
                self._calls.append([])
                model(*args, **kwargs)

    def run(self, layers: Sequence[nn.Module], see: Callable[[nn.Module, Tensor], None]) -> None:
        """Shows `layers` all their inputs."""
        left, wanted = 0, set(layers)

        def count(layer: nn.Module, x: Tensor) -> None:
            nonlocal left
            see(layer, x)
            left -= 1
            if left == 0:
                raise _Seen

        with watched(wanted, count):
            for (args, kwargs), calls in zip(self.inputs, self._calls, strict=True):
                left = sum(layer in wanted for layer in calls)
                if left:
                    with contextlib.suppress(_Seen):
                        self.model(*args, **kwargs)

    def rows(self, layer: nn.Module) -> Tensor:
        """float32 [M, K]: everything that `layer` is given, all of it in memory."""
        seen: list[Tensor] = []
        self.run([layer], lambda _, x: seen.append(x.reshape(-1, x.shape[-1]).float()))
        return torch.cat(seen)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, in order: a tensor, or any nesting of mappings, sequences and dataclasses. Other objects (a
    cache of keys and values) are left out."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from tensors_of(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from tensors_of(getattr(output, field.name))


def first_tensor(output: Any) -> Tensor:
    """What a model's output is compared by: the tensor itself, or the first one within it, such as the logits or the last hidden
    state. Raises TypeError where there is none."""
    for tensor in tensors_of(output):
        return tensor
    raise TypeError(f"the model returned {type(output).__name__}, which holds no tensor")


def float_tensors(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
