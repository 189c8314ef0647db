"""Who a layer is compared with: one list of contenders by name, each made from an nn.Linear. bench/peers.py of the repository adds
packages beyond torch."""

from __future__ import annotations

import copy
import importlib.util
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor], object]


class Missing(Exception):
    """This peer cannot take part here; the text says why."""


@dataclass(frozen=True)
class Peer:
    """make(linear, x) -> a function of x of the shape and dtype given, or Missing. `limit`: the arithmetic it computes with."""

    name: str
    make: Callable[[nn.Linear, Tensor], Layer]
    limit: str  # "f32" or "int8": the limit it is measured against
    package: str = ""  # import name of what it needs


PEERS: dict[str, Peer] = {}


def peer(name: str, limit: str, package: str = "") -> Callable[[Callable[[nn.Linear, Tensor], Layer]], Peer]:
    """Decorator that adds a contender to PEERS."""

    def add(make: Callable[[nn.Linear, Tensor], Layer]) -> Peer:
        PEERS[name] = Peer(name, make, limit, package)
        return PEERS[name]

    return add


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
    except Missing:
        raise
    except Exception as error:  # a peer's own failure must not end the bench
        raise Missing(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    finally:
        torch.set_num_threads(threads)
    if used > threads + 0.3:
        raise Missing(f"{name}: runs on {used:.1f} cores, {threads} allowed")
    return layer


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


@peer("fp32", limit="f32")
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


_register_engines()


def expand(names: list[str]) -> list[str]:
    """Names of contenders; "quantize-dynamic" stands for all its engines."""
    found: list[str] = []
    for name in names:
        matches = [name] if name in PEERS else [p for p in PEERS if p.startswith(name + "-")]
        if not matches:
            raise ValueError(f"unknown contender {name!r}, expected one of: quantize-dynamic, {', '.join(PEERS)}")
        found += [m for m in matches if m not in found]
    return found
