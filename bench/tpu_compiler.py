"""What the TPU compiler (libtpu) makes of a model, without a TPU: its optimised HLO, and the cycles it expects.

    TPU_SKIP_MDS_QUERY=1 python bench/tpu_compiler.py

Prints, for an encoder layer of all-MiniLM-L6-v2 and for a large layer, the cycles that the compiler estimates for its own schedule.
They are estimates: nothing ran. Needs the extra tersor[xla] and libtpu.
"""

from __future__ import annotations

import copy
import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # keeps libtpu from asking for a TPU's metadata
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import torch
from jax.experimental import topologies
from torch import nn

import tersor
from tersor.backends import xla

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
FORMATS = [None, tersor.Int8Dynamic(), tersor.Int8WeightOnly(), tersor.Binary(), tersor.BinaryXnor()]


def exported(model: nn.Module, x: torch.Tensor) -> jax.export.Exported:
    return xla.export(model, (x,), platforms=("tpu",), dynamic_batch=False)


def optimised_hlo(program: jax.export.Exported, chip: str) -> str:
    """What the compiler makes of an exported model for one chip, a key of TOPOLOGIES."""
    device = topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    lowered = jax.jit(program.call, in_shardings=place, out_shardings=place).lower(*program.in_avals)
    return lowered.compile().as_text()


def estimated_cycles(hlo: str) -> int:
    """The sum of what the compiler notes beside each instruction of its schedule."""
    return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', hlo))


class EncoderLayer(nn.Module):
    """Layer 0 of the sentence encoder: hidden states [batch, tokens, 384] -> the same."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def encoder_layer() -> EncoderLayer:
    import minilm_model

    return EncoderLayer(minilm_model.load_model().encoder.layer[0])


def swapped(model: nn.Module, fmt: tersor.formats.Format | None) -> nn.Module:
    """A copy, its linear layers in the format."""
    model = copy.deepcopy(model)
    return model if fmt is None else tersor.quantize_(model, fmt)


def main() -> None:
    large = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU())
    rows = [
        ("encoder layer of MiniLM, 8 x 128 tokens", encoder_layer(), torch.randn(8, 128, 384)),
        ("4096 x 4096 with relu, 1024 rows", large, torch.randn(1024, 4096)),
    ]
    for name, model, x in rows:
        print(f"{name}: estimated cycles on " + ", ".join(TOPOLOGIES))
        for fmt in FORMATS:
            print(f"  {'float32' if fmt is None else fmt!r:18}", end="", flush=True)
            program = exported(swapped(model, fmt), x)
            for chip in TOPOLOGIES:
                print(f" {estimated_cycles(optimised_hlo(program, chip)):>9}", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
