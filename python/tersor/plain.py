"""The plain form of a layer: what a device without kernels keeps in place of tiles.

A device that runs the references (XLA through torchax, MPS, XPU, ...) would unpack the tiles in every call. A layer that moves
there has them turned once into what Format.to_plain gives, for tiles int8 values [N, K], and gets them back when it moves away;
files always hold tiles.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.utils._mode_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from .nn import QuantLinear

# Devices whose kernels read tiles, and those on which a layer is only described.
TILE_DEVICES = ("cpu", "cuda", "meta")


def is_plain_device(device: torch.device) -> bool:
    return device.type not in TILE_DEVICES


def ready(device: torch.device) -> None:
    """The ops are to run on `device`: registers what they need there. On "jax" torchax is imported: it makes that device."""
    if device.type == "jax":
        importlib.import_module("tersor.backends.xla").register()


def to_plain_(layer: QuantLinear) -> None:
    """Turns the stored tensors of a layer into their plain form, in place and on their device."""
    if not layer.plain:
        to_device_form_(layer, torch.device("cpu"))
        n, k, stored = layer.out_features, layer.in_features, stored_tensors(layer)
        with _without_modes(stored):
            values = layer.format.to_plain(stored, n, k)
        _exchange(layer, values, True)


def from_plain_(layer: QuantLinear) -> None:
    """The way back."""
    if layer.plain:
        _exchange(layer, tiles_of(layer), False)


def to_device_form_(layer: QuantLinear, device: torch.device) -> None:
    """Turns the stored tensors, in place, into what the kernels of a device with kernels read; they may be on another yet."""
    stored = stored_tensors(layer)
    if device.type == "meta" or _described(stored):
        return
    values = layer.format.on_device(stored, device.type, layer.out_features, layer.in_features)
    if values is not None:
        _exchange(layer, values, False)


def _described(stored: dict[str, Tensor]) -> bool:
    return any(t.is_meta or isinstance(t, FakeTensor) for t in stored.values())


def tiles_of(layer: QuantLinear) -> dict[str, Tensor]:
    """The stored tensors of a layer as files hold them, whatever form the layer is in."""
    return other_than_stored(layer) or stored_tensors(layer)


def other_than_stored(layer: QuantLinear) -> dict[str, Tensor] | None:
    """tiles_of, or None where these are the stored tensors themselves."""
    stored = stored_tensors(layer)
    n, k = layer.out_features, layer.in_features
    if not layer.plain:
        return None if _described(stored) else layer.format.on_device(stored, "cpu", n, k)
    if _described(stored):
        device = next(iter(stored.values())).device
        return {s.name: torch.empty(s.shape, dtype=s.dtype, device=device) for s in layer.format.tensors(n, k)}
    with _without_modes(stored):
        return layer.format.from_plain(stored, n, k)


@contextlib.contextmanager
def _without_modes(stored: dict[str, Tensor]) -> Iterator[None]:
    """Within, torch is itself where all tensors are the CPU's: a backend's mode, such as torchax's environment, may give tensors of
    its own for what is made from them."""
    if all(type(t) is Tensor and t.device.type == "cpu" for t in stored.values()):
        with torch.utils._mode_utils.no_dispatch(), torch._C.DisableTorchFunction():
            yield
    else:
        yield


def stored_tensors(layer: QuantLinear) -> dict[str, Tensor]:
    return {spec.name: getattr(layer, spec.name).detach() for spec in layer.specs()}


def _exchange(layer: QuantLinear, values: dict[str, Tensor], plain: bool) -> None:
    for spec in layer.specs():
        del (layer._parameters if spec.parameter else layer._buffers)[spec.name]
    layer.plain = plain
    for spec in layer.specs():
        if spec.parameter:
            layer._parameters[spec.name] = nn.Parameter(values[spec.name], requires_grad=False)
        else:
            layer._buffers[spec.name] = values[spec.name]
    # The bias stays the last of the parameters, as a new layer has it.
    layer._parameters["bias"] = layer._parameters.pop("bias")
