"""A vision transformer for Fashion-MNIST: 6 blocks of width 192 on 16 patches of 7 x 7 pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fashion_mnist_model import CLASSES, SIDE, Split
from torch import Tensor, nn

PATCH, WIDTH, BLOCKS, HEADS, INNER = 7, 192, 6, 6, 384
BATCH, RATE, WARM_UP, DECAY, SMOOTHING = 128, 1e-3, 200, 0.05, 0.05


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, WIDTH))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """f32 [M, 784] -> logits f32 [M, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        side = SIDE // PATCH
        patches = images.view(-1, side, PATCH, side, PATCH).transpose(2, 3).reshape(len(images), side * side, PATCH * PATCH)
        x = self.patches(patches) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def batches(data: Split, steps: int, seed: int, batch: int = BATCH) -> list[tuple[Tensor, Tensor]] | object:
    """`steps` pairs (images, labels), half the images mirrored; gone through again they are the same."""

    class Batches:
        def __iter__(self):  # type: ignore[no-untyped-def]
            generator = torch.Generator().manual_seed(seed)
            order = torch.empty(0, dtype=torch.int64)
            for _ in range(steps):
                if len(order) < batch:
                    order = torch.randperm(len(data.labels), generator=generator)
                rows, order = order[:batch], order[batch:]
                images = data.images[rows]
                mirrored = images.view(-1, SIDE, SIDE).flip(2).reshape(len(rows), -1)
                yield torch.where(torch.rand(len(rows), 1, generator=generator) < 0.5, mirrored, images), data.labels[rows]

    return Batches()


def train(
    model: nn.Module, data: Split, steps: int, seed: int, decay: float = DECAY, on_step: Callable[[int], None] | None = None
) -> None:
    """AdamW with warm-up and linear decay to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=decay)
    warm = min(WARM_UP, steps // 4 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / warm) * (1 - i / steps))
    model.train()
    for i, (images, labels) in enumerate(batches(data, steps, seed)):  # type: ignore[arg-type]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels, label_smoothing=SMOOTHING).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(i + 1)
    model.eval()
