"""Masks on weights, held by torch.nn.utils.parametrize: what prune_ puts on a layer and finalize_ takes off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Mask(nn.Module):
    """Parametrisation of a weight: exactly 0 where `mask` is False, the weight elsewhere; gradients likewise.

    mask  bool, the shape of the weight

    Raises ValueError where the mask no longer fits the weight.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.shape != self.mask.shape:
            raise ValueError(
                f"prune_: the mask is {list(self.mask.shape)}, the weight has become {list(weight.shape)}; "
                "call finalize_ before the shape of a layer changes, prune_ after"
            )
        # Not a product: NaN and inf below the mask, and the sign of a negative zero, do not show.
        return torch.where(self.mask, weight, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What `layer.weight = w` stores."""
        return weight

    def extra_repr(self) -> str:
        return f"{list(self.mask.shape)}"


def _list_of(layer: nn.Module) -> Any:
    """The parametrisations of the weight, or None."""
    return layer.parametrizations.weight if parametrize.is_parametrized(layer, "weight") else None  # type: ignore[union-attr]


def mask_of(layer: nn.Module) -> Mask | None:
    """The mask on the layer's weight, if it has one."""
    return next((p for p in _list_of(layer) or () if isinstance(p, Mask)), None)


def latent_weight(layer: nn.Module) -> nn.Parameter:
    """The parameter below the mask, the one that an optimizer holds."""
    return _list_of(layer).original


def attach(layer: nn.Module, mask: Mask) -> None:
    parametrize.register_parametrization(layer, "weight", mask)


def only_mask(layer: nn.Module) -> bool:
    """Whether nothing but the mask computes the weight."""
    return len(_list_of(layer)) == 1


def detach(layer: nn.Module) -> nn.Parameter:
    """Takes the mask off, so that the latent weight is the layer's parameter again, and returns that.

    Not by remove_parametrizations where it can be helped: that deletes the property from the class, which deep copies share.
    """
    weight = latent_weight(layer)
    if list(layer.parametrizations) == ["weight"]:  # type: ignore[arg-type]
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer._parameters = {"weight": weight, **layer._parameters}  # in the order that they had
    else:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    return weight
