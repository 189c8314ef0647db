"""Rounding that follows from what layers are given: GPTQ for few bits, and biases that make up for what quantisation shifts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Trace, batches, evaluating, watched
from .formats import Binary, Format, Int4, Ternary
from .nn import QuantLinear, has_values
from .progress import tracked
from .pruning_scores import COLUMNS, Hessian, at_least_float32, inverse_factor, replace_columns_
from .selection import Filter, some
from .swap import Config, Place, plan, settle, share_weight, swap_group

# Formats whose codes can be chosen one by one. Int8's follow from the row; BinaryXnor's error is not a matter of the weight alone.
ROUNDED = (Int4, Ternary, Binary)


def gptq_(model: nn.Module, config: Config, inputs: Any, filter_fn: Filter | None = None, *, progress: bool = False) -> nn.Module:
    """quantize_ with GPTQ rounding for Int4, Ternary and Binary layers: each weight is rounded so that those after it make up for
    its error on the inputs which the layer is given (arXiv:2210.17323). In place; returns the model.

    config, filter_fn  as in quantize_; layers in other formats are swapped as quantize_ does, in their turn
    inputs    what the model is called with: a tensor, a tuple of arguments, a dict of keywords, or an iterable of those; ten
              thousand rows for each layer are enough
    progress  a progress bar on stderr

    Layers go in the order in which the model calls them, each on what the packed layers before it pass on, so the model runs once
    for each group of layers with the same input, up to there. What comes on top of the model is the matrix of one layer at a time,
    about 20 K**2 bytes, and its weight in float32. Steps are those of quantize_. Raises ValueError, the model untouched, where
    quantize_ would, where a layer is never called, or one is given NaN or inf.
    """
    places = plan(model, config, filter_fn, "gptq_")
    shared: dict[int, list[Place]] = {}  # the places of one weight, by its id; the layers of the trace keep it alive
    for place in places:
        shared.setdefault(id(place.layer().weight), []).append(place)
    calls = batches(inputs, "gptq_: inputs")
    with evaluating(model):
        trace = Trace(model, list(dict.fromkeys(place.layer() for place in places)), calls)
        called = {layer for group in trace.order for layer in group}
        if missed := [place.fqn for place in places if place.layer() not in called]:
            raise ValueError(f"gptq_: inputs never reach {some(missed)}; leave them out of the config")
        if not trace.finite:
            raise ValueError("gptq_: a layer is given NaN or inf on the inputs; nothing was changed")
        for group in tracked(trace.order, "rounding layers", progress):
            todo = [shared.pop(id(layer.weight)) for layer in group if id(layer.weight) in shared]
            hessian = None
            if any(isinstance(place.format, ROUNDED) for part in todo for place in part):
                hessian = _hessian(trace, group[0])
            for part in todo:
                _swap(part, hessian)
    settle(model)
    return model


def _hessian(trace: Trace, layer: nn.Module) -> Hessian:
    seen = Hessian()
    trace.run([layer], lambda _, x: seen.add(x))
    return seen


def gptq(weight: Tensor, hessian: Tensor, fmt: Format) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight float [N, K] -> (float32 [N, K] on the grid of `fmt`, the scales that make it so, as the format stores them).

    hessian  float32 [K, K], mean of x x^T

    Columns go in the order of their mean square, the largest first, and groups keep the steps that the weight itself asks for, so
    that any order finds them.
    """
    n, k = weight.shape
    scales = fmt.scales(weight)
    steps = fmt.steps(scales, n, k)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    group = order // (k // steps.shape[1])  # of each column
    w = at_least_float32(weight)[:, order].clone()

    def rounded(i: int, _end: int) -> Tensor:
        step = steps[:, group[i]].unsqueeze(1)
        return (fmt.codes(w[:, i : i + 1], step) * step).squeeze(1)

    replace_columns_(w, inverse_factor(hessian[order][:, order]).to(w.dtype), COLUMNS, rounded)
    return w[:, order.argsort()], scales


def _swap(places: list[Place], hessian: Hessian | None) -> None:
    def make(place: Place, shared: QuantLinear | None) -> QuantLinear:
        linear = place.layer()
        if shared is not None:
            return share_weight(shared, linear, place.format)
        if hessian is None or not isinstance(place.format, ROUNDED) or not has_values(linear.weight):
            return QuantLinear.from_linear(linear, place.format)
        weight, scales = gptq(linear.weight.detach(), hessian.value(), place.format)
        on_grid = nn.Linear(linear.in_features, linear.out_features, False, torch.device("meta"), linear.weight.dtype)
        # A value on the grid, even rounded to bfloat16, is nearest to its own code.
        on_grid.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        on_grid.bias = linear.bias
        on_grid.train(linear.training)
        return QuantLinear.from_linear(on_grid, place.format, scales=scales)

    swap_group(places, make)


def correct_bias_(model: nn.Module, reference: nn.Module, inputs: Any) -> nn.Module:
    """Adds to the bias of every QuantLinear of `model` what rounding its weight takes from the mean of its outputs, (W - W_hat)
    E[x]; in place, returns the model. Source: Nagel et al., arXiv:1906.04721, section 4.2, with E[x] measured.

    reference  the float model: an nn.Linear under the name of every QuantLinear
    inputs     what the float model is called with, as in calibrate; it runs once

    A layer without a bias gets one: a new parameter. What saturated activations lose is left alone: few rows lose it, and a bias
    would move all the others. Raises ValueError, the model untouched, where the two models do not fit or a layer is never called.
    """
    layers = {fqn: module for fqn, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("correct_bias_: model holds no QuantLinear")
    others = dict(reference.named_modules())
    for fqn, layer in layers.items():
        other = others.get(fqn)
        if not isinstance(other, nn.Linear) or other.weight.shape != (layer.out_features, layer.in_features):
            found = "nothing" if other is None else str(other)
            raise ValueError(f"correct_bias_: reference has {found} at {fqn}, expected the nn.Linear that it was made from")
    means = {others[fqn]: _Mean() for fqn in layers}
    with evaluating(reference), watched(means, lambda layer, x: means[layer].add(x)):
        for args, kwargs in batches(inputs, "correct_bias_: inputs"):
            reference(*args, **kwargs)
    if missed := [fqn for fqn in layers if not means[others[fqn]].rows]:
        raise ValueError(f"correct_bias_: inputs never reach {some(missed)}")
    with torch.no_grad():
        for fqn, layer in layers.items():
            weight = others[fqn].get_parameter("weight").detach() - layer.dequantize().weight
            by = weight.double() @ means[others[fqn]].value()
            bias = layer._parameters["bias"]
            # A new parameter: the old one may be the float model's own.
            shifted = by if bias is None else bias.detach().double() + by
            dtype = layer.weight.dtype if bias is None else bias.dtype
            layer.bias = nn.Parameter(shifted.to(dtype), requires_grad=bias is not None and bias.requires_grad)
    return model


class _Mean:
    """Mean of rows, float64 [K]."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.rows = 0

    def add(self, x: Tensor) -> None:
        self.total = self.total + x.reshape(-1, x.shape[-1]).sum(0, dtype=torch.float64)
        self.rows += x.numel() // max(1, x.shape[-1])

    def value(self) -> Tensor:
        assert isinstance(self.total, Tensor)
        return self.total / self.rows
