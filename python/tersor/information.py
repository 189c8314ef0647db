"""What runs where: `tersor.info()`."""

from __future__ import annotations

from dataclasses import dataclass

from . import native


@dataclass(frozen=True)
class Info:
    """Facts about this installation and machine; str() is for people, the fields are for programs.

    variants  (name, runnable, missing CPU feature) of each compiled instruction set, best first
    kernels   kernel -> instruction set that serves it
    ops       op -> what serves it on a CPU tensor and why
    devices   device type -> what serves the ops there
    """

    version: str
    torch: str
    threads: int
    native: bool
    variants: tuple[tuple[str, bool, str], ...]
    kernels: dict[str, str]
    ops: dict[str, str]
    devices: dict[str, str]

    def __str__(self) -> str:
        lines = [f"tersor {self.version}, torch {self.torch}, {self.threads} threads"]
        if not self.native:
            lines.append("native kernels: none; every op runs as its plain-torch reference")
        for name, runnable, missing in self.variants:
            lines.append(f"  {name:14s} {'runs here' if runnable else f'needs {missing}'}")
        lines.append("devices:")
        lines += [f"  {name:14s} {how}" for name, how in self.devices.items()]
        lines.append("ops on a CPU tensor:")
        lines += [f"  {name:34s} {how}" for name, how in self.ops.items()]
        return "\n".join(lines)


def info() -> Info:
    """The versions, the CPU's instruction sets, and which kernel serves each op. Raises RuntimeError on a wrong TERSOR_ISA."""
    import torch

    from . import __version__, ops

    cpu = native.cpu_info() if ops.NATIVE else None
    kernels = dict(cpu["kernels"]) if cpu else {}
    served = {}
    for name, op in ops.OPS.items():
        if not op.kernels:
            served[name] = "plain torch on every device"
        elif kernels and all(entry in kernels for entry in op.kernels):
            served[name] = ", ".join(f"{entry}: {kernels[entry]}" for entry in op.kernels)
        else:
            absent = ", ".join(entry for entry in op.kernels if entry not in kernels)
            served[name] = f"reference (this build has no kernel: {absent})" if kernels else "reference (no native kernels)"
    return Info(
        version=__version__,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        native=ops.NATIVE,
        variants=tuple(tuple(row) for row in cpu["variants"]) if cpu else (),
        kernels=kernels,
        ops=served,
        devices=_devices(),
    )


# Devices that torch has a dispatch key of their own for, by its name in torch.library.
_DEVICES = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU", "hpu": "HPU", "xla": "XLA", "privateuse": "PrivateUse1"}


def _devices() -> dict[str, str]:
    """Device type -> what the dispatch table has for the ops there."""
    import torch

    from . import ops

    name = ops.linear_dynamic.raw.name()
    found = {}
    for device, key in _DEVICES.items():
        kernels = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
        found[device] = "native kernels" if kernels else "the references, as plain torch"
    if ops.NATIVE_CUDA:
        found["cuda"] = f"native kernels of {', '.join(ops.CUDA_KERNELS)}, and of 2:4 weights; the others as plain torch"
    else:
        found["cuda"] = "the references, as plain torch (this installation has no CUDA kernels: build with TERSOR_CUDA=ON)"
    found["jax"] = "the references, as XLA graphs with s8 x s8 -> s32 dots (tersor.backends.xla)"
    found["meta"] = "shapes only"
    found["others"] = "the references, as plain torch"
    return found
