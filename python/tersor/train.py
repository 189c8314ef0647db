"""Training for the formats: quantisation-aware layers that compute what the packed ones will, and turn into them.

    train.qat_(model, tersor.Ternary())     nn.Linear -> QATLinear, in place
    ... train as ever ...
    train.convert_(model)                   QATLinear -> QuantLinear with the same integer part

Straight-through estimators (Bengio et al., arXiv:1308.3432): forward rounds, backward does not. With u = w / s(w) and q = round(u)

    w_hat = s * (clamp(u) + (q - clamp(u)).detach())

so a weight beyond the range of the codes gets no gradient of its own, and the scale s gets one: through the absmax or the mean
of abs(w) that it is, or, for Int4, as a learnt step (LSQ, Esser et al., arXiv:1902.08153).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .calibration import Trace, batches, evaluating
from .formats import Binary, BinaryXnor, Format, Int4, Int8Dynamic, Int8Static, Int8WeightOnly, SparseInt8, Ternary
from .nn import QuantLinear, check_in_features, has_values
from .ops.tiles import CODES
from .selection import Filter
from .swap import Config, Place, disable_fast_paths, is_finite, plan, settle, share_weight, swap_group
from .weights import grouped


def _straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` to the bit, with the gradient of `surrogate`: what is added is exactly 0."""
    return value.detach() + (surrogate - surrogate.detach())


# ---- scales with a gradient: the values come from the format, these say what they depend on ------------------------------------


def _absmax(w: Tensor, fmt: Format) -> Tensor:
    return w.abs().amax(1, keepdim=True) / 127


def _mean_abs(w: Tensor, fmt: Format) -> Tensor:
    whole = isinstance(fmt, Ternary) and fmt.granularity == "tensor"
    return w.abs().mean().expand(w.shape[0], 1) if whole else w.abs().mean(1, keepdim=True)


# ---- activations, float [..., K] -> float32 [..., K] on the grid that the kernel will use --------------------------------------


def _float_input(layer: QATLinear, x: Tensor) -> Tensor:
    return x


def _per_token(layer: QATLinear, x: Tensor) -> Tensor:
    # Nothing lies beyond a range that is the row's own absmax, so the whole row passes its gradient on.
    q, scale, _ = ops.quantize_rows(x.detach())
    return _straight_through(q * scale.unsqueeze(-1), x.float())


def _per_layer(layer: QATLinear, x: Tensor) -> Tensor:
    known = layer.learnt_input_scale()
    q, scale, _ = ops.quantize_static(x.detach(), known.detach())
    inside = (x.float() / known).clamp(-127, 127)
    return _straight_through(scale, known.expand_as(scale)).unsqueeze(-1) * _straight_through(q.float(), inside)


def _signs(layer: QATLinear, x: Tensor) -> Tensor:
    """RSign: gradients of the sign where |x - threshold| <= 1, and of its scale, the mean of |x - threshold|."""
    distance = x.float() - layer.threshold.float()
    sign = torch.where(distance >= 0, 1.0, -1.0)
    scale = distance.abs().mean(-1, keepdim=True)
    return scale * _straight_through(sign, distance.clamp(-1, 1))


Estimators = tuple[Callable[[Tensor, Format], Tensor] | None, Callable[["QATLinear", Tensor], Tensor]]

# format -> (scale of a weight, None: a learnt step; fake quantisation of activations). A test sees that every format is here.
ESTIMATORS: dict[type[Format], Estimators] = {
    Int8Dynamic: (_absmax, _per_token),
    Int8Static: (_absmax, _per_layer),
    Int8WeightOnly: (_absmax, _float_input),
    Int4: (None, _per_token),
    Ternary: (_mean_abs, _per_token),
    Binary: (_mean_abs, _per_token),
    BinaryXnor: (_mean_abs, _signs),
    SparseInt8: (_absmax, _per_token),
}


class QATLinear(nn.Linear):
    """nn.Linear that computes, in float, what a QuantLinear of its `format` will, with gradients for all that is learnt.

    weight      float [N, K], the latent weight: the very parameter of the layer it replaces, so optimizers keep working; so is bias
    log_step    float32 [N, 1] or [N, G], Int4 only: the step is step_init * exp(log_step), so it stays positive, moves by ratios at
                the learning rate of the weights, and weight decay pulls it towards where it began
    log_input   float32 [], Int8Static only: its input_scale is input_init * exp(log_input)
    threshold   float32 [K], BinaryXnor only: where the sign of an input feature changes (RSign of ReActNet, arXiv:2003.03488)

    x float [..., K] -> [..., N]; under autocast the product is in the autocast dtype, rounding to codes is always in float32.
    """

    step_init: Tensor
    input_init: Tensor
    threshold: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: Format | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        fmt = Int8Dynamic() if format is None else format
        _estimators(fmt)
        fmt.check_sizes(out_features, in_features)
        constants = fmt.constants()
        super().__init__(in_features, out_features, bias, device, dtype)
        self.format = fmt.stored()
        if isinstance(fmt, Int4):
            groups = 1 if fmt.group_size is None else in_features // fmt.group_size
            self.register_buffer("step_init", torch.ones(out_features, groups, device=device, dtype=torch.float32))
            self.log_step = nn.Parameter(torch.zeros(out_features, groups, device=device, dtype=torch.float32))
        elif isinstance(fmt, Int8Static):
            self.register_buffer("input_init", constants["input_scale"].to(device or torch.get_default_device()))
            self.log_input = nn.Parameter(torch.zeros((), device=device, dtype=torch.float32))
        elif isinstance(fmt, BinaryXnor):
            self.threshold = nn.Parameter(torch.zeros(in_features, device=device, dtype=torch.float32))
        self.reset_steps()

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: Format | None = None) -> QATLinear:
        """A layer on linear's own weight and bias. Raises ValueError where the format cannot hold its size or be trained."""
        meta = torch.device("meta")
        layer = cls(linear.in_features, linear.out_features, False, format, meta, linear.weight.dtype)
        device = linear.weight.device
        for name, value in list(layer._parameters.items()):
            if name not in ("weight", "bias") and value is not None:  # all of them start at zero
                layer._parameters[name] = nn.Parameter(torch.zeros(value.shape, device=device, dtype=torch.float32))
        if isinstance(format, Int8Static):
            layer.input_init = format.constants()["input_scale"].to(device)
        if "step_init" in layer._buffers:
            layer.step_init = torch.empty(layer.step_init.shape, device=device, dtype=torch.float32)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer.reset_steps()
        return layer

    @torch.no_grad()
    def reset_steps(self) -> None:
        """Learnt steps begin again at what plain conversion of the weight would choose (after loading other weights, say)."""
        if not isinstance(self.format, Int4) or not has_values(self.weight):
            return
        n, k = self.weight.shape
        steps = self.format.steps(self.format.scales(self.weight.detach()), n, k)
        # A channel or group of zeros could not leave step 0; any positive step rounds it to zeros as well.
        usable = steps[steps > 0]
        fallback = usable.amax() if usable.numel() else torch.tensor(1 / (7 * math.sqrt(max(1, k))))
        self.step_init.copy_(torch.where(steps > 0, steps, fallback))
        self.log_step.zero_()

    def forward(self, input: Tensor) -> Tensor:
        x = check_in_features(input, self.in_features)
        x_hat = _estimators(self.format)[1](self, x)
        return nn.functional.linear(x_hat.to(x.dtype), self.quantized_weight().to(self.weight.dtype), self.bias)

    def quantized_weight(self) -> Tensor:
        """float32 [N, K]: what the packed weight will stand for, with gradients for the weight and for learnt steps."""
        n, k = self.weight.shape
        w = self.weight.float()
        steps = self._steps(w)
        *_, lowest, highest = CODES[self.format.bits]
        codes = grouped(self.format.codes(self.weight.detach(), steps.detach()), steps.shape[1])
        steps = steps.unsqueeze(-1)
        # Where the step is 0 the value is 0, but the gradient passes, or a layer that starts at zero could never leave it.
        usable = steps > 0
        steps = torch.where(usable, steps, 1.0)
        inside = (grouped(w, steps.shape[1]) / steps).clamp(lowest, highest)
        return (steps * _straight_through(torch.where(usable, codes, 0.0), inside)).reshape(n, k)

    def _steps(self, w: Tensor) -> Tensor:
        """float32 [N, 1] or [N, G]: the steps as the packed layer will store them, with gradients."""
        with torch.no_grad():
            stored = self.format.steps(self.scales(), *self.weight.shape)
        scale = _estimators(self.format)[0]
        return _straight_through(stored, self._learnt_steps() if scale is None else scale(w, self.format))

    def _learnt_steps(self) -> Tensor:
        return self.step_init.float() * self.log_step.float().exp()

    @torch.no_grad()
    def scales(self) -> dict[str, Tensor]:
        """The scales as the packed layer will store them."""
        if isinstance(self.format, Int4):
            return self.format.scales_of(self._learnt_steps())
        return self.format.scales(self.weight.detach())

    def learnt_input_scale(self) -> Tensor:
        """float32 []: the input_scale of Int8Static."""
        return self.input_init.float() * self.log_input.float().exp()

    @torch.no_grad()
    def convert(self) -> QuantLinear:
        """The packed layer: same codes, scales, thresholds; shares bias. Raises ValueError where the weight holds NaN or inf."""
        fmt = self.format
        if isinstance(fmt, Int8Static):
            fmt = Int8Static(self.learnt_input_scale().item())
        layer = QuantLinear.from_linear(self, fmt, scales=self.scales())
        if isinstance(fmt, BinaryXnor):
            layer.threshold.copy_(self.threshold.float())  # type: ignore[operator]
        return layer

    def own_state(self) -> bool:
        """Whether the packed layer depends on more than weight and bias."""
        return bool(self._parameters.keys() - {"weight", "bias"})

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format!r}"


def _estimators(fmt: Format) -> Estimators:
    try:
        return ESTIMATORS[type(fmt)]
    except KeyError:
        names = ", ".join(cls.__name__ for cls in ESTIMATORS)
        raise ValueError(f"qat_: there is no training for {fmt!r}; formats that have one: {names}") from None


def qat_(model: nn.Module, config: Config, filter_fn: Filter | None = None) -> nn.Module:
    """Replaces the nn.Linear layers of `model` by QATLinear, in place, and returns it: quantisation-aware training of any format.

    config, filter_fn  as in quantize_, which would swap the same layers: first and last layers stay int8 by
                       {"_default": Ternary(), "fc1": Int8Dynamic(), "head": Int8Dynamic()}

    Weights and biases stay the same parameters under the same names; Int4, Int8Static and BinaryXnor add one each (see QATLinear),
    so make the optimizer, and wrap with DDP, afterwards. Raises ValueError, the model untouched, where quantize_ would.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("qat_: model is an nn.Linear itself, which cannot be replaced in place; use train.QATLinear.from_linear")
    places = plan(model, config, filter_fn, "qat_")
    for place in places:
        _estimators(place.format)
    groups: dict[int, list[Place]] = {}
    for place in places:
        groups.setdefault(id(place.layer().weight), []).append(place)
    for group in groups.values():
        swap_group(group, lambda place, _: QATLinear.from_linear(place.layer(), place.format))
    disable_fast_paths(model, QATLinear)
    return model


def convert_(model: nn.Module) -> nn.Module:
    """Replaces every QATLinear of `model` by the QuantLinear it stands for, in place, and returns it.

    Codes and scales are those of the last forward pass, bit for bit. Raises ValueError, the model untouched, where it holds no
    QATLinear or a weight that is not finite.
    """
    if isinstance(model, QATLinear):
        raise ValueError("convert_: model is a QATLinear itself, which cannot be replaced in place; use model.convert()")
    groups: dict[int, list[Place]] = {}
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            if isinstance(child, QATLinear):
                fqn = f"{prefix}.{name}" if prefix else name
                groups.setdefault(id(child.weight), []).append(Place(fqn, parent, name, child.format))
                for key, value in child.named_parameters():
                    if not is_finite(value.detach()):
                        raise ValueError(f"convert_: {fqn}.{key} holds NaN or inf; nothing was changed")
    if not groups:
        raise ValueError("convert_: model holds no QATLinear; call train.qat_(model, config) before training")

    def make(place: Place, shared: QuantLinear | None) -> QuantLinear:
        layer = place.layer()
        assert isinstance(layer, QATLinear)
        return layer.convert() if shared is None or layer.own_state() else share_weight(shared, layer, place.format)

    for group in groups.values():
        swap_group(group, make)
    settle(model)
    return model


def calibrate_(model: nn.Module, inputs: Any) -> nn.Module:
    """Sets the thresholds of all BinaryXnor layers of `model`, QATLinear or QuantLinear, to the median of each input feature.

    inputs  what model is called with: a tensor, a tuple of arguments, a dict of keyword arguments, or an iterable of those

    Layer by layer in the order of their calls, because the median of one depends on the thresholds before it; all rows that a layer
    sees are held in memory. The model runs in eval mode and gets its modes back. Raises ValueError where there is no such layer, or
    one is never called.
    """
    layers = {fqn: m for fqn, m in model.named_modules() if isinstance(m, QATLinear | QuantLinear) and _is_xnor(m)}
    if not layers:
        raise ValueError("calibrate_: model holds no BinaryXnor layer")
    calls = batches(inputs, "calibrate_: inputs")
    with evaluating(model):
        trace = Trace(model, list(layers.values()), calls)
        order = [layer for group in trace.order for layer in group]
        if missed := [fqn for fqn, layer in layers.items() if layer not in order]:
            raise ValueError(f"calibrate_: inputs never reach {', '.join(missed)}")
        for layer in order:
            layer.threshold.copy_(trace.rows(layer).median(0).values)  # type: ignore[operator]
    return model


def _is_xnor(layer: QATLinear | QuantLinear) -> bool:
    return isinstance(layer.format, BinaryXnor)
