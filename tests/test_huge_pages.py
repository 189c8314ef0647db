"""Large weights lie in huge pages where the system has them; nothing else about them changes."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from cases import assert_equal
from torch import nn

import tersor
from tersor.nn import in_huge_pages

pytestmark = pytest.mark.native


def huge_bytes(t: torch.Tensor) -> int:
    """Bytes in huge pages of the mapping that holds the middle of t."""
    middle = t.data_ptr() + t.numel() // 2
    lines = Path("/proc/self/smaps").read_text().splitlines()
    inside = False
    for line in lines:
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


def available() -> bool:
    """Whether the system gives huge pages to who asks, found out without our own code."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            return False
        region.write(bytes(32 << 20))
        whole = torch.frombuffer(region, dtype=torch.uint8)
        found = huge_bytes(whole) > 0
        del whole
        return found


@pytest.mark.skipif(not available(), reason="this system gives no huge pages")
def test_large_weights_lie_in_huge_pages(tmp_path: Path):
    model = nn.Sequential(nn.Linear(2048, 6144, bias=False))
    tersor.quantize_(model, tersor.Int8Dynamic())
    packed = model[0].weight_packed
    assert huge_bytes(packed) >= packed.numel() // 2
    # a float model takes its layers from a file as copies
    tersor.save(model, tmp_path / "m.safetensors")
    loaded = tersor.load_(nn.Sequential(nn.Linear(2048, 6144, bias=False)), tmp_path / "m.safetensors", mmap=False)
    assert_equal(loaded[0].weight_packed.detach(), packed.detach())


@pytest.mark.skipif(not available(), reason="this system gives no huge pages")
def test_large_outputs_are_first_touched_in_huge_pages():
    layer = tersor.QuantLinear.from_linear(nn.Linear(16, 4096, bias=False), tersor.Int8Dynamic())
    y = layer(torch.ones(4096, 16))
    assert huge_bytes(y) >= y.numel() * 4 // 2


@pytest.mark.parametrize("offset", [0, 1, 4095])
@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1, (9 << 20) - 1])
def test_contents_stay(size: int, offset: int):
    whole = torch.randint(0, 256, (size + offset + 64,), dtype=torch.uint8)
    want = whole.clone()
    part = whole[offset : offset + size]
    assert in_huge_pages(part) is part
    assert_equal(whole, want)
    part.fill_(7)  # still ours to write
    assert int(part.sum()) == 7 * size


def test_other_devices_and_fake_tensors_are_left_alone():
    meta = torch.empty(16 << 20, dtype=torch.uint8, device="meta")
    assert in_huge_pages(meta) is meta
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(16 << 20, dtype=torch.uint8)
        assert in_huge_pages(fake) is fake
