"""Who a layer is compared with: one list of contenders by name, each made from an nn.Linear. bench/peers.py of the repository adds
packages beyond torch."""

from __future__ import annotations

import copy
import functools
import importlib.util
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format
from ..nn import QuantLinear
from .our_formats import arithmetic, our_formats

Layer = Callable[[Tensor], object]


class Missing(Exception):
    """This peer cannot take part here; the text says why."""


# Relative error (Frobenius) against the float layer up to which a contender of so many bits a weight counts as right: on normal x
# and uniform weights it is about 0.01, 0.07, 0.5 and 0.73 (signs x signs). Without half of its outputs it is 0.71 and more.
_MAX_ERROR = {32: 0.05, 16: 0.05, 8: 0.1, 4: 0.3, 2: 0.65, 1: 0.8}
_FEW_OUTPUTS = 256  # on fewer, errors of few bits scatter too much to tell


@dataclass(frozen=True)
class Peer:
    """make(linear, x) -> a function of x of the shape and dtype given, or Missing."""

    name: str
    make: Callable[[nn.Linear, Tensor], Layer]
    limit: str  # "f32", "int8" or "popcount": the arithmetic it is measured against
    package: str = ""  # import name of what it needs
    bits: int = 8  # of a stored weight; 32: in the dtype of x
    group: int = 0  # weights along K that share a scale; 0: all of a channel
    ours: bool = False

    def weight_bytes(self, n: int, k: int, item: int) -> int:
        """Bytes of its weights, a float32 scale for each group included; `item`: bytes of an element of x."""
        if self.bits == 32:
            return n * k * item
        return n * k * self.bits // 8 + 4 * n * (k // self.group if self.group else 1)


PEERS: dict[str, Peer] = {}


def peer(
    name: str, limit: str, package: str = "", bits: int = 8, group: int = 0
) -> Callable[[Callable[[nn.Linear, Tensor], Layer]], Peer]:
    """Decorator that adds a contender to PEERS."""

    def add(make: Callable[[nn.Linear, Tensor], Layer]) -> Peer:
        PEERS[name] = Peer(name, make, limit, package, bits, group)
        return PEERS[name]

    return add


def rivals(bits: int, group: int | None = None) -> tuple[str, ...]:
    """Names of the contenders that are not ours, of that width; group: only those of that group size."""
    return tuple(p.name for p in PEERS.values() if not p.ours and p.bits == bits and group in (None, p.group))


def make_peer(name: str, linear: nn.Linear, x: Tensor) -> Layer:
    """The contender `name` for this layer, tried once on x. Raises Missing with the reason where it cannot run here."""
    if name not in PEERS:
        raise ValueError(f"unknown contender {name!r}, expected one of: {', '.join(PEERS)}")
    p = PEERS[name]
    if p.package and importlib.util.find_spec(p.package.partition(".")[0]) is None:
        raise Missing(f"{name}: the package {p.package} is not installed")
    threads = torch.get_num_threads()
    try:
        layer = p.make(linear, x)
        layer(x)
        torch.set_num_threads(threads)  # some packages change it for everybody
        used = cores_used(lambda: layer(x))
        off = relative_error(layer(x), linear, x)
    except Missing:
        raise
    except Exception as error:  # a peer's own failure must not end the bench
        raise Missing(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    finally:
        torch.set_num_threads(threads)
    if used > threads + 0.3:
        raise Missing(f"{name}: runs on {used:.1f} cores, {threads} allowed")
    if not off <= _MAX_ERROR[p.bits]:  # NaN included
        raise Missing(f"{name}: its result is off by {off:.2f} of the float layer's, expected up to {_MAX_ERROR[p.bits]}")
    return layer


@torch.no_grad()
def relative_error(output: Any, linear: nn.Linear, x: Tensor) -> float:
    """Of a contender's output against the float layer; 0 where there are too few outputs to tell."""
    want = linear(x.to(linear.weight.dtype))
    if want.numel() < _FEW_OUTPUTS:
        return 0.0
    got = as_tensor(output).to(want.dtype)
    if got.shape != want.shape:
        raise ValueError(f"its result is {list(got.shape)}, expected {list(want.shape)}")
    return float((got - want).norm() / want.norm())


def as_tensor(output: Any) -> Tensor:
    """What a contender returns as a Tensor: one already, a binding of onnxruntime, or what has its numpy array as .data."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "copy_outputs_to_cpu"):
        return torch.from_numpy(output.copy_outputs_to_cpu()[0])
    return torch.from_numpy(output.data)


def cores_used(f: Callable[[], object], seconds: float = 0.02) -> float:
    """CPU time of the process over wall time while f runs again and again."""
    f()
    wall, cpu = time.perf_counter(), time.process_time()
    while True:
        f()
        elapsed = time.perf_counter() - wall
        if elapsed > seconds:
            return (time.process_time() - cpu) / elapsed


def quantize_dynamic_engines() -> list[str]:
    """torch's engines for quantize_dynamic worth a try: all it supports, but not qnnpack on x86: made for Arm, slower than fp32."""
    left_out = {"none", "qnnpack"} if platform.machine() in ("x86_64", "AMD64") else {"none"}
    return [engine for engine in torch.backends.quantized.supported_engines if engine not in left_out]


def torch_quantize_dynamic(model: nn.Module, engine: str, per_channel: bool = False) -> nn.Module:
    """torch.ao's quantize_dynamic of a copy of `model` with that engine's packed weights; it is deprecated."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
            except ImportError:
                raise Missing("torch.ao.quantization.quantize_dynamic is gone from this torch") from None
            spec = {nn.Linear: per_channel_dynamic_qconfig} if per_channel else {nn.Linear}
            return quantize_dynamic(copy.deepcopy(model), spec, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before


@peer("fp32", limit="f32", bits=32)
def fp32(linear: nn.Linear, x: Tensor) -> Layer:
    """nn.Linear itself, in the dtype of x."""
    return copy.deepcopy(linear).to(x.dtype)


def _register_engines() -> None:
    for engine in quantize_dynamic_engines():

        def make(linear: nn.Linear, x: Tensor, engine: str = engine) -> Layer:
            if x.dtype != torch.float32:
                raise Missing(f"quantize-dynamic-{engine}: takes float32 only, not {x.dtype}")
            return torch_quantize_dynamic(nn.Sequential(linear), engine)

        peer(f"quantize-dynamic-{engine}", limit="int8")(make)


def _make_ours(linear: nn.Linear, x: Tensor, fmt: Format) -> Layer:
    return QuantLinear.from_linear(linear, fmt)


def _register_ours() -> None:
    """Each format of ours under tersor-<name>, to compare formats with each other."""
    for name, fmt in our_formats().items():
        make = functools.partial(_make_ours, fmt=fmt)
        PEERS[f"tersor-{name}"] = Peer(f"tersor-{name}", make, arithmetic(fmt), bits=fmt.bits, ours=True)


_register_engines()
_register_ours()


def expand(names: list[str]) -> list[str]:
    """Names of contenders; "quantize-dynamic" stands for all its engines."""
    found: list[str] = []
    for name in names:
        matches = [name] if name in PEERS else [p for p in PEERS if p.startswith(name + "-")]
        if not matches:
            raise ValueError(f"unknown contender {name!r}, expected one of: quantize-dynamic, {', '.join(PEERS)}")
        found += [m for m in matches if m not in found]
    return found
