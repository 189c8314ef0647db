"""The small model of the pruning tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from tersor import NM, Block, Unstructured
from tersor.masks import mask_of

K = 64
PATTERNS = [Unstructured(0.75), Block((16, 4), 0.75), Block((16, 1), 0.75), Block((1, 4), 0.75), Block((3, 5), 0.75), NM(1, 4)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(K, 48), nn.Linear(48, 40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(gelu(self.fc2(gelu(self.fc1(x)))))


def mask(layer: nn.Module) -> Tensor:
    found = mask_of(layer)
    assert found is not None
    return found.mask


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, after=lambda: None, steps: int = 5) -> None:
    x, y = torch.randn(32, K), torch.randn(32, 10)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        after()
