"""The TPU compiler (libtpu) without a TPU: what it makes of a layer, read from its optimised HLO."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import nn

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax", reason="JAX is not installed: make test-full has a part xla that installs it")
pytest.importorskip("torchax", reason="torchax is not installed: make test-full has a part xla that installs it")
pytest.importorskip("libtpu", reason="libtpu is not installed: make test-full has a part xla that installs it")

import tersor  # noqa: E402
from tersor.backends import xla  # noqa: E402

M, K, N = 128, 384, 1536  # rows, and a feed-forward layer of MiniLM
TOPOLOGIES = ["v5e:2x2", "v6e:2x2"]
FORMATS = [tersor.Int8Dynamic(), tersor.Binary(), tersor.BinaryXnor()]


def compiled(model: nn.Module, x: torch.Tensor, topology: str) -> str:
    """The optimised HLO of the exported model for one chip of `topology`."""
    from jax.experimental import topologies

    chip = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(chip)
    exported = xla.export(model, (x,), dynamic_batch=False)
    lowered = jax.jit(exported.call, in_shardings=place, out_shardings=place).lower(*exported.in_avals)
    return lowered.compile().as_text()


def computations(hlo: str) -> dict[str, str]:
    """name -> text of each computation of an HLO module."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.DOTALL | re.MULTILINE)
    return dict(found)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_one_s8_convolution_with_the_epilogue_in_its_fusion(fmt, topology: str):
    model = nn.Sequential(tersor.QuantLinear.from_linear(nn.Linear(K, N), fmt), nn.ReLU())
    hlo = compiled(model, torch.randn(M, K), topology)
    parts = computations(hlo)
    products = {name: text for name, text in parts.items() if re.search(r"= s32\[[\d,]*\]\S* convolution\(", text)}
    assert len(products) == 1, "one integer product"
    assert not re.search(r"= (f32|bf16)\[[\d,]*\]\S* (convolution|dot)\(", hlo), "and no float one"
    ((name, text),) = products.items()
    assert re.search(rf"fusion\([^\n]*kind=kOutput, calls=%?{re.escape(name)}\b", hlo), (
        "the product is the root of an output fusion"
    )
    # scale of the row, scale of the channel, bias, relu: in the same fusion
    assert len(re.findall(r" multiply\(", text)) >= 2
    assert " add(" in text
    assert " maximum(" in text
    operands = re.search(r" convolution\(%([\w.\-]+), %([\w.\-]+)\)", text)
    assert operands is not None
    for operand in operands.groups():
        assert re.search(rf"%{re.escape(operand)} = s8\[", text), f"{operand} is not s8"
    # The weight is read as it is stored: nothing of its size is copied, transposed or converted outside the fusion. (Within, the
    # compiler names the change of tiling on the way to the matrix unit a copy.)
    inside = {name}
    while more := {called for i in inside for called in re.findall(r"calls=%?([\w.\-]+)", parts[i])} - inside:
        inside |= more
    for other, body in parts.items():
        if other in inside:
            continue
        for line in body.splitlines():
            shape = re.match(r"\s*(?:ROOT )?%[\w.\-]+ = \w+\[([\d,]+)\]\S* (copy|transpose|convert)\(", line)
            if shape:
                elements = 1
                for size in shape[1].split(","):
                    elements *= int(size)
                assert elements < N * K, line
