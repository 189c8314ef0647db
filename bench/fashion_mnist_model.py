"""Fashion-MNIST (Xiao et al., arXiv:1708.07747) and the network that bench/fashion_mnist.py trains.

The images come from Debian's dataset-fashion-mnist: `make data` unpacks the package into build/data.
"""

from __future__ import annotations

import gzip
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from minilm_model import MissingData
from torch import Tensor, nn

FOLDERS = (Path(__file__).parents[1] / "build/data/usr/share/datasets/fashion-mnist", Path("/usr/share/datasets/fashion-mnist"))
SIDE, CLASSES, HIDDEN = 28, 10, 1024
MEAN, STD = 0.2860, 0.3530  # of the training pixels / 255
IMAGES, LABELS = 0x803, 0x801  # first four bytes of an idx file: unsigned bytes, 3 dims or 1

# AdamW with linear decay to 0. Weight decay only in float training: QAT learns which way weights round.
BATCH, RATE, WARM_UP, FLOAT_DECAY, CLIP, SMOOTHING = 256, 1e-3, 50, 0.01, 1.0, 0.05


class Split(NamedTuple):
    images: Tensor  # float32 [count, 784], normalised
    labels: Tensor  # int64 [count]


class Data(NamedTuple):
    train: Split
    test: Split


def load_data() -> Data:
    """60000 training and 10000 test images. Raises MissingData where the package is absent or a file is not what it should be."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise MissingData("Fashion-MNIST of Debian's dataset-fashion-mnist is not in build/data; run: make data")
    return Data(_split(folder, "train", 60000), _split(folder, "t10k", 10000))


def _split(folder: Path, name: str, count: int) -> Split:
    pixels = _idx(folder / f"{name}-images-idx3-ubyte.gz", IMAGES, (count, SIDE, SIDE))
    labels = _idx(folder / f"{name}-labels-idx1-ubyte.gz", LABELS, (count,))
    return Split((pixels.reshape(count, -1).float() / 255 - MEAN) / STD, labels.long())


def _idx(path: Path, magic: int, shape: tuple[int, ...]) -> Tensor:
    data = gzip.decompress(path.read_bytes())
    header = b"".join(number.to_bytes(4, "big") for number in (magic, *shape))
    if not data.startswith(header) or len(data) != len(header) + torch.Size(shape).numel():
        raise MissingData(f"{path.name} is not an idx file of {list(shape)} bytes; delete build/data and run: make data")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=len(header)).reshape(shape)


def mlp(hidden: int = HIDDEN) -> nn.Module:
    """784-hidden-hidden-10 with batch norms."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(SIDE * SIDE, hidden),
            norm1=nn.BatchNorm1d(hidden),
            relu1=nn.ReLU(),
            fc2=nn.Linear(hidden, hidden),
            norm2=nn.BatchNorm1d(hidden),
            relu2=nn.ReLU(),
            fc3=nn.Linear(hidden, CLASSES),
        )
    )


class VisionTransformer(nn.Module):
    """transformers' ViT on flat images, f32 [M, 784] -> log-odds, f32 [M, CLASSES]."""

    def __init__(self, blocks: int, width: int, patch: int) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=SIDE,
            patch_size=patch,
            num_channels=1,
            num_labels=CLASSES,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x.view(-1, 1, SIDE, SIDE)).logits


def vit() -> nn.Module:
    """6 blocks of width 192 on 16 patches of 7 x 7: 2.7 M parameters."""
    return VisionTransformer(6, 192, 7)


def train(model: nn.Module, data: Split, steps: int, seed: int, decay: float, on_step: Callable[[], None] | None = None) -> None:
    """`steps` batches of BATCH, half the images mirrored; the same ones for every model with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / WARM_UP) * (1 - i / steps))
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(data.labels), generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        images = data.images[batch]
        mirrored = images.view(-1, SIDE, SIDE).flip(2).reshape(BATCH, -1)
        images = torch.where(torch.rand(BATCH, 1, generator=generator) < 0.5, mirrored, images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), data.labels[batch], label_smoothing=SMOOTHING).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Split) -> float:
    """Percent of the images that get their label."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(data.images.split(1000), data.labels.split(1000), strict=True))
    return 100 * right / len(data.labels)
