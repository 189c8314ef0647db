"""The table of docs/formats.md: what each format stores, and how far a layer of normal weights lies from the float one.

python bench/format_errors.py
"""

from __future__ import annotations

import torch
from torch import nn

import tersor

N = K = 1024
ROWS = 256
FORMATS = (
    tersor.Int8Dynamic(),
    tersor.Int8WeightOnly(),
    tersor.Int4(32),
    tersor.Int4(64),
    tersor.Int4(128),
    tersor.Int4(),
    tersor.Ternary(),
    tersor.Binary(),
    tersor.BinaryXnor(),
)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False)
    linear.weight.normal_()
    x = torch.randn(ROWS, K)
    want = linear(x)
    print("| format | bits a weight, scales included | weight error | error of y |")
    print("|---|---|---|---|")
    for fmt in FORMATS:
        layer = tersor.QuantLinear.from_linear(linear, fmt)
        stored = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))
        weight = layer.dequantize().weight
        print(
            f"| `{fmt!r}` | {8 * stored / (N * K):.2f} | {relative(weight, linear.weight):.4f} | {relative(layer(x), want):.4f} |"
        )


if __name__ == "__main__":
    main()
