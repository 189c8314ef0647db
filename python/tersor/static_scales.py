"""Calibration of Int8Static: one scale for the activations of each layer, found on real inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from .calibration import batches, evaluating, logger, watched
from .formats import Format, Int8Static
from .observers import Magnitudes, Observer, as_observer
from .selection import Filter, Rules, Task, choose, some
from .swap import Config

# A typical row should reach this code at least: below it half a step, the largest rounding error, is above 1/32 of its absmax. By
# "minmax" 8 of SmolLM2's 210 layers lie below, the lowest at 0.1, and 2 of MiniLM's 37, at 14 and 15.
_FEW_CODES = 16
# Of the sum of x**2 that a scale may lose. Rounding alone loses 0.01 % (a normal row of absmax 4 sigma: (4 / 127)**2 / 12), the
# median layer of both models 0.2 %. By "percentile" 6 layers of SmolLM2 lose more than this, one of them all, and 4 of MiniLM up to
# 17 %, which it can bear (docs/accuracy.md).
_LOST = 0.05


def calibrate(
    model: nn.Module,
    config: Config,
    inputs: Any,
    filter_fn: Filter | None = None,
    *,
    observer: str | Observer = "percentile",
) -> dict[str, Format]:
    """The config for quantize_ in which every Int8Static layer has its input_scale; the model is not changed.

        config = tersor.calibrate(model, tersor.Int8Static(), batches)
        tersor.quantize_(model, config)

    config     as in quantize_: {"_default": Int8Static(), "re:.*down_proj": Int8Dynamic()} keeps some layers dynamic. Scales that
               are given already stay.
    inputs     what the model is called with: a tensor, a tuple of arguments, a dict of keywords, or an iterable of those
    filter_fn  as in quantize_
    observer   "minmax", "percentile" (99.99) or "mse", or one of tersor.observers

    Returns {fqn: format} of all layers that config and filter_fn choose. Layers to which one scale does harm, because few rows are
    far larger than the rest, are named in a warning: smooth_ them first, or leave them Int8Dynamic. The model runs in eval mode,
    once, and gets its modes back. Raises ValueError where a layer is never called, or is given only zeros, or NaN or inf.
    """
    chosen = {spot.fqn: (spot.layer(), fmt) for spot, fmt in choose(model, Rules(config, Task("calibrate")), filter_fn)}
    kind = as_observer(observer, "calibrate")
    unknown = [layer for layer, fmt in chosen.values() if isinstance(fmt, Int8Static) and fmt.input_scale is None]
    seen: dict[nn.Module, Magnitudes] = {layer: Magnitudes() for layer in unknown}
    if seen:
        with evaluating(model), watched(seen, lambda layer, x: seen[layer].add(x)):
            for args, kwargs in batches(inputs, "calibrate: inputs"):
                model(*args, **kwargs)
    found: dict[str, Format] = {}
    coarse: list[str] = []
    clipped: list[str] = []
    for fqn, (layer, fmt) in chosen.items():
        found[fqn] = fmt
        if not isinstance(fmt, Int8Static) or fmt.input_scale is not None:
            continue
        magnitudes = seen[layer]
        if not 0 < magnitudes.largest < math.inf:
            what = "never reach it" if not magnitudes.counts.any() else f"are at most {magnitudes.largest} there"
            raise ValueError(f"calibrate: {fqn}: inputs {what}, so there is no scale; give Int8Static(input_scale) or leave it out")
        found[fqn] = dataclasses.replace(fmt, input_scale=kind.scale(magnitudes))
        if magnitudes.typical_row() < _FEW_CODES * found[fqn].input_scale:  # type: ignore[attr-defined]
            coarse.append(fqn)
        elif magnitudes.relative_error(found[fqn].input_scale) > _LOST:  # type: ignore[attr-defined]
            clipped.append(fqn)
    for names, what in (
        (coarse, f"so coarse that a typical row reaches less than {_FEW_CODES} of 127 codes"),
        (clipped, f"so fine that more than {_LOST:.0%} of what is squared and summed is lost where large values saturate"),
    ):
        if names:
            logger.warning(
                "tersor: calibrate: one scale cannot do for %d layers, it is %s; use Int8Dynamic there, or smooth_ first: %s",
                len(names),
                what,
                some(names),
            )
    return found
