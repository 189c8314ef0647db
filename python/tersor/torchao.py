"""torchao's quantize_ with our layers: a config that torchao hands to this package. Nothing else here imports torchao.

from torchao.quantization import quantize_
from tersor.torchao import TersorConfig

quantize_(model, TersorConfig(tersor.Int4(32)))
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import nn

from .formats import Format, Int8Dynamic
from .masks import mask_of
from .nn import QuantLinear
from .selection import Task, unfit_by_itself
from .swap import quantize_

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise ImportError(
        "tersor.torchao: torchao is missing or too old; pip install torchao (0.18.0 is tested), or call tersor.quantize_, "
        "which needs no torchao"
    ) from error

logger = logging.getLogger("tersor")
_TASK = Task("torchao.quantize_")


@dataclass(frozen=True)
class TersorConfig(AOBaseConfig):
    """A config of torchao.quantization.quantize_, alone or within FqnToConfig, that makes QuantLinear layers.

    format      of the layers, such as tersor.Int4(32)
    submodules  False: torchao's filter_fn chooses nn.Linear layers one by one. A layer with hooks or a parametrised weight stays
                float, with a line of the logger `tersor`; one with a mask of prune_ is a ValueError. What only the whole model
                shows is not seen: tied weights become copies, and the fused eval path of nn.TransformerEncoderLayer goes on
                reading float weights that are gone.
                True: a module that is no nn.Linear is handed to tersor.quantize_ with all that is in it, whose rules then hold.
                `filter_fn=whole_model` hands over the model itself.

    Raises TypeError for what is no format; the swap raises ValueError for any other kind of module, for a weight with NaN or inf,
    and for sizes that the format cannot hold.
    """

    format: Format = Int8Dynamic()  # noqa: RUF009 (frozen)
    submodules: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise TypeError(
                f"TersorConfig: format is {self.format!r}, expected a format such as tersor.Int8Dynamic(); "
                "formats by name are torchao's FqnToConfig, or a dict given to tersor.quantize_"
            )


def whole_model(module: nn.Module, fqn: str) -> bool:
    """A filter_fn for torchao that chooses the model itself: quantize_(model, TersorConfig(fmt, submodules=True), whole_model)."""
    return fqn == ""


@register_quantize_module_handler(TersorConfig)
def _swap(module: nn.Module, config: TersorConfig, *, parameter_name: str | None = None) -> nn.Module:
    """torchao puts what this returns in the place of `module`.

    parameter_name  of the module, where a key of FqnToConfig fits this parameter; it comes once for each that is fitted
    """
    if parameter_name is not None and not (parameter_name == "weight" and isinstance(module, nn.Linear)):
        return module  # a pattern for layers fits their biases, and norms between them, too
    if not isinstance(module, nn.Linear):
        if config.submodules:
            return quantize_(module, config.format)
        raise ValueError(
            f"TersorConfig: torchao was told to convert a {type(module).__name__}, expected nn.Linear; "
            "submodules=True swaps every nn.Linear in it"
        )
    if mask_of(module):
        raise ValueError("TersorConfig: a layer carries a mask of prune_; call tersor.finalize_(model) first")
    reason = unfit_by_itself(module, _TASK)
    if type(module) is not nn.Linear:
        reason = reason or f"is a {type(module).__name__}, whose forward a swap would lose"
    if reason:
        logger.warning("tersor: an nn.Linear of %d to %d stays float: it %s", module.in_features, module.out_features, reason)
        return module
    return QuantLinear.from_linear(module, config.format)
