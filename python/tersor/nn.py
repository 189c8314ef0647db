"""QuantLinear: the module that stands where nn.Linear stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import native
from .formats import Format, Int8Dynamic, Tag, TensorSpec, decode_tag, encode_tag
from .plain import from_plain_, is_plain_device, ready, to_device_form_, to_plain_
from .weights import row_blocks

_NO_WEIGHT = (
    "QuantLinear: weight is packed, a float weight cannot be set or tied; call dequantize() first "
    "(transformers: set config.tie_word_embeddings = False where the head is packed)"
)


class QuantLinear(nn.Module):
    """Linear layer with a packed weight: y = x W^T + bias, x [..., in_features] -> [..., out_features] in the dtype of x.

    What is registered is what is stored: the tensors its format lists (integer data as frozen parameters, float32 scales as
    buffers), `bias`, and a small tag of JSON in the state_dict. Casts change bias and the compute dtype, never the scales.

        QuantLinear.from_linear(linear, Int8Dynamic())
    """

    plain = False  # whether the tensors are in the plain form of devices without kernels (plain.py)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: Format | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        fmt = Int8Dynamic() if format is None else format
        if not isinstance(fmt, Format):
            raise TypeError(f"QuantLinear: format is {fmt!r}, expected a format such as tersor.Int8Dynamic()")
        fmt.check_sizes(out_features, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.format = fmt.stored()
        # {M: times the float layer}, where only_if_faster measured it at the swap
        self.speedup: dict[int, float] | None = None
        self._compute_dtype = torch.get_default_dtype() if dtype is None else dtype
        for spec in fmt.tensors(out_features, in_features):
            # Zeros, so that a layer which was never loaded computes its bias rather than noise.
            t = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            if spec.parameter:
                self.register_parameter(spec.name, nn.Parameter(t, requires_grad=False))
            else:
                self.register_buffer(spec.name, t)
        zeros = torch.zeros(out_features, dtype=self._compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: Format | None = None, *, scales: Mapping[str, Tensor] | None = None
    ) -> QuantLinear:
        """A layer with linear's weight quantised, its bias shared, on linear's device. The float weight is read in row blocks.

        scales  of the whole weight, as format.scales() gives them; None: those that it gives

        Raises ValueError where the weight holds NaN or inf, or the format cannot hold its size.
        """
        weight = linear.weight.detach()
        layer = cls(
            linear.in_features, linear.out_features, bias=False, format=format, device=torch.device("meta"), dtype=weight.dtype
        )
        n, k = weight.shape
        device = weight.device
        ready(device)
        stored: dict[str, Tensor] = {}
        constants = format.constants() if format is not None else {}
        # A swap under inference_mode must not leave inference tensors in the model.
        with torch.inference_mode(False), torch.no_grad():
            for spec in layer.specs():
                stored[spec.name] = in_huge_pages(torch.empty(spec.shape, dtype=spec.dtype, device=device))
                if spec.name in constants:
                    stored[spec.name].copy_(constants[spec.name].expand(spec.shape))  # torchax would take the shape too
            if has_values(weight):
                if scales is None and layer.format.scales_need_all_rows:
                    scales = layer.format.scales(weight)
                for begin, end in row_blocks(n, k):
                    rows = weight[begin:end]
                    if not torch.isfinite(rows).all():
                        raise ValueError(f"QuantLinear: weight holds NaN or inf in rows {begin} to {end - 1}")
                    if not layer.format.by_rows:
                        continue
                    known = scales and {s.name: s.part(scales[s.name], begin, end) for s in layer.specs() if s.name in scales}
                    parts = layer.format.quantize(rows, known)
                    for spec in layer.specs():
                        if spec.name in parts:
                            spec.part(stored[spec.name], begin, end).copy_(parts[spec.name])
                if not layer.format.by_rows:
                    stored = {name: in_huge_pages(t) for name, t in layer.format.quantize(weight).items()}
            for name, value in stored.items():
                if name in layer._parameters:
                    layer._parameters[name] = nn.Parameter(value, requires_grad=False)
                else:
                    layer._buffers[name] = value
            if is_plain_device(device) and has_values(weight):
                to_plain_(layer)
        layer.bias = linear.bias
        layer.train(linear.training)
        return layer

    def specs(self) -> tuple[TensorSpec, ...]:
        """The TensorSpec of each stored tensor in the form the layer is in, bias apart."""
        listed = self.format.plain_tensors if self.plain else self.format.tensors
        return listed(self.out_features, self.in_features)

    def dequantize(self) -> nn.Linear:
        """A float nn.Linear with the weight this layer stands for, in the compute dtype, sharing the bias."""
        n, k = self.out_features, self.in_features
        device = next(self.parameters()).device
        linear = nn.Linear(k, n, bias=False, device=torch.device("meta"), dtype=self._compute_dtype)
        with torch.inference_mode(False), torch.no_grad():
            weight = torch.empty((n, k), dtype=self._compute_dtype, device=device)
            if has_values(weight) and not self.format.by_rows:
                weight.copy_(self.format.dequantize({spec.name: getattr(self, spec.name) for spec in self.specs()}, n, k))
            elif has_values(weight):
                for begin, end in row_blocks(n, k):
                    parts = {spec.name: spec.part(getattr(self, spec.name), begin, end) for spec in self.specs()}
                    weight[begin:end] = self.format.dequantize(parts, end - begin, k)
            linear.weight = nn.Parameter(weight)
        linear.bias = self.bias  # type: ignore[assignment]
        linear.train(self.training)
        return linear

    @property
    def weight(self) -> Tensor:
        """NaN expanded to [N, K] in the compute dtype: shape, dtype and device may be read; any use of the values shows."""
        device = next(self.parameters()).device
        return torch.full((), torch.nan, dtype=self._compute_dtype, device=device).expand(self.out_features, self.in_features)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise AttributeError(_NO_WEIGHT)

    def __dir__(self) -> list[str]:
        # torchax.interop.JittableModule takes every tensor that dir() names for state, and would set `weight`.
        return [name for name in super().__dir__() if name != "weight"]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # nn.Module assigns a Parameter this way, past the property: tie_weights() of transformers does
            raise AttributeError(_NO_WEIGHT)
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        x = input  # nn.Linear's name for it: some models call layers with keywords
        if type(x) is not Tensor and isinstance(x, fx.Proxy):
            return self._record(x)
        # The tiles alone cannot tell K from the next multiple of a tile's.
        try:
            shape = x.shape
        except AttributeError:
            raise TypeError(f"QuantLinear: x is {type(x).__name__}, expected a Tensor") from None
        if not shape or shape[-1] != self.in_features:
            check_in_features(x, self.in_features)
        # nn.Module.__getattr__ costs a quarter of a microsecond a tensor: a small layer at M = 1 would feel three of them.
        parameters = self._parameters
        return self.format.linear(x, parameters, self._buffers, parameters["bias"])

    def _record(self, x: fx.Proxy) -> Any:
        """Under torch.fx tracing the layer is one node, as nn.Linear is; by itself a tracer looks inside what is not torch.nn."""
        path = x.tracer.path_of_module(self)  # type: ignore[attr-defined]
        if path:
            return x.tracer.create_proxy("call_module", path, (x,), {})
        # The layer is the root itself, which cannot be a node of its own graph.
        x = x.tracer.create_proxy("call_function", check_in_features, (x, self.in_features), {})
        return self.format.linear(x, self._parameters, self._buffers, self._parameters["bias"])  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> Any:
        # torch.jit.script asks every module for a scriptable form of itself; without this it fails on some line of this class.
        raise TypeError(
            "QuantLinear: torch.jit.script is not supported; use torch.export or torch.compile, or torch.jit.trace under no_grad"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Casts leave float32 scales alone and moves do not. On a device without kernels the layer has its plain form."""
        # A cast leaves a tensor where it is: only one from the layer's own device tells that from a move to the CPU.
        here = next(self.parameters()).device if self.plain else None
        probe = fn(torch.empty(0, dtype=torch.int32, device=here))
        if probe.dtype != torch.int32:
            raise TypeError(
                f"QuantLinear: a cast of every tensor to {probe.dtype} (Module.type) would destroy the packed weight; "
                "use .to(dtype), .half(), .bfloat16() or .float(), which cast the bias and leave packed data alone"
            )
        ready(probe.device)
        plain = is_plain_device(probe.device)
        if plain:
            to_plain_(self)  # where the tiles are: torch there can unpack them
        scales = [spec for spec in self.specs() if spec.dtype.is_floating_point]
        kept: dict[str, Any] = {}
        for spec in scales:
            own = self._parameters if spec.parameter else self._buffers
            kept[spec.name], own[spec.name] = own[spec.name], None
        try:
            super()._apply(fn, recurse)
            for name, value in kept.items():
                moved = fn(value.detach())
                kept[name] = moved if moved.dtype == value.dtype else _through_bits(fn, value.detach(), moved)
        finally:
            for spec in scales:
                value = kept[spec.name]
                if spec.parameter:
                    self._parameters[spec.name] = nn.Parameter(value, requires_grad=False)
                else:
                    self._buffers[spec.name] = value
        if not plain:
            from_plain_(self)
            to_device_form_(self, next(self.parameters()).device)  # a cast leaves it where it is, and the probe on the CPU
        self._compute_dtype = fn(torch.empty(0, dtype=self._compute_dtype)).dtype
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # torch copies any dtype into any other: tiles of another kind, or scales that a whole-model cast has rounded, would load.
        error_msgs = args[-1]
        for spec in self.specs():
            given = state_dict.get(prefix + spec.name)
            if isinstance(given, Tensor) and given.dtype != spec.dtype:
                error_msgs.append(f"{prefix}{spec.name} is {given.dtype}, expected {spec.dtype}; a cast would change the layer")
                return
        if not self._make_room(state_dict, prefix, error_msgs):
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _make_room(self, state_dict: Any, prefix: str, error_msgs: list[str]) -> bool:
        """New empty tensors where the shapes follow from the values of the weight that is to come, once it is known to be sound."""
        given = {spec.name: state_dict.get(prefix + spec.name) for spec in self.specs()}
        if not any(spec.varies for spec in self.specs()) or not all(isinstance(t, Tensor) for t in given.values()):
            return True
        if any(not spec.varies and given[spec.name].shape != spec.shape for spec in self.specs()):
            return True  # torch says which
        if all(has_values(t) for t in given.values()):
            try:
                self.format.check_stored(given, self.out_features, self.in_features)
            except ValueError as error:
                error_msgs.append(f"{prefix or 'QuantLinear'}: {error}")
                return False
        for spec in self.specs():
            own = self._parameters.get(spec.name)
            if spec.varies and own is not None and own.shape != given[spec.name].shape:
                room = torch.empty(given[spec.name].shape, dtype=spec.dtype, device=own.device)
                self._parameters[spec.name] = nn.Parameter(room, requires_grad=False)
        return True

    def get_extra_state(self) -> Tensor:
        return encode_tag(Tag(self.format, self.out_features, self.in_features, self.speedup))

    def set_extra_state(self, state: Any) -> None:
        fmt, n, k, speedup = decode_tag(state, "QuantLinear")
        if (n, k) != (self.out_features, self.in_features):
            raise ValueError(
                f"QuantLinear: the state is of a layer with out_features={n}, in_features={k}, this one has "
                f"out_features={self.out_features}, in_features={self.in_features}"
            )
        if fmt != self.format:
            raise ValueError(f"QuantLinear: the state is in format {fmt!r}, this layer in {self.format!r}")
        self.speedup = speedup

    def extra_repr(self) -> str:
        measured = "" if self.speedup is None else f", speedup={self.speedup}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format!r}{measured}"
        )


def _through_bits(fn: Callable[[Tensor], Tensor], scale: Tensor, moved: Tensor) -> Tensor:
    """A float32 scale where fn puts it, in its own dtype: fn casts floats, so it gets the bits as integers."""
    if is_plain_device(moved.device):
        return scale.to(moved.device)  # not every such device can view a tensor as another dtype
    return fn(scale.view(torch.int32)).view(scale.dtype)


HUGE_BYTES = 4 << 20  # smaller tensors fit what a TLB maps


def in_huge_pages(t: Tensor) -> Tensor:
    """t, its memory moved to huge pages where it is large, on the CPU, and the system has them: for 4096 x 4096 about 1.15 times
    the speed at M = 1, 1.03 times at M = 256 (bench/huge_pages.py)."""
    module = native.numpy_module()
    if module is not None and t.device.type == "cpu" and t.numel() * t.element_size() >= HUGE_BYTES and has_values(t):
        module.use_huge_pages(t.detach().numpy())
    return t


def has_values(t: Tensor) -> bool:
    """False for meta tensors and those of a FakeTensorMode: nothing can be read from them, only shapes follow."""
    return t.device.type != "meta" and not isinstance(t, FakeTensor)  # torchax's tensors say is_meta


def check_in_features(x: Tensor, in_features: int) -> Tensor:
    """x, or ValueError where its last dim is another."""
    if x.shape[-1:] != (in_features,):
        raise ValueError(f"QuantLinear: x is {list(x.shape)}, expected [..., {in_features}] (in_features)")
    return x
