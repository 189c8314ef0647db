"""Whole models through torch.compile(backend="tersor"): MiniLM and SmolLM2-135M, as transformers has them.

python bench/fused_models.py [minilm | smollm | memory]

The limit of a language model is the sum of two measurements: the model without its linear layers (the floor, compiled too: the
faster of dynamo's graph and plain eager), and our layers alone, called one after the other as a forward pass calls them.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tersor.bench.timing import Timing, cap_peers, interleaved, machine_name, torch_threads

SHAPES = ((8, 128), (1, 16))
PROMPT, CONTEXT = 128, 512
FP32, INDUCTOR, SWAPPED, FUSED, BY_FORMAT, EXPORTED = "fp32", "fp32 inductor", "swapped", "fused", "fused by format=", "tersor.fuse"


def compiled(model: Any, **options: Any) -> Any:
    import torch

    import tersor.fusion  # noqa: F401  # an installed package is found by its entry point

    return torch.compile(model, backend="tersor", options=options)


def minilm_models() -> dict[str, Any]:
    """fp32, inductor's, swapped, and the two ways through the backend: swapped before, or unmodified with a format as option."""
    import minilm_model
    import torch

    import tersor

    fp32 = minilm_model.load_model()
    swapped = tersor.quantize_(copy.deepcopy(fp32), tersor.Int8Dynamic())
    return {
        FP32: fp32,
        INDUCTOR: torch.compile(copy.deepcopy(fp32)),
        SWAPPED: swapped,
        FUSED: compiled(copy.deepcopy(swapped)),
        BY_FORMAT: compiled(copy.deepcopy(fp32), format="int8-dynamic"),
    }


def minilm_speed(models: dict[str, Any], batch: int, tokens: int, rounds: int = 11) -> dict[str, Timing]:
    """Seconds of one call, sentences to embeddings."""
    import minilm_model
    import torch

    ids = minilm_model.token_rows(batch, tokens)
    mask = torch.ones_like(ids)
    calls = {name: partial(minilm_model.sentence_embedding, model, ids, mask) for name, model in models.items()}
    with torch_threads(1), torch.inference_mode():
        return interleaved(calls, rounds, 0.08)


def minilm_cosine(limit: int | None = None) -> tuple[float, float]:
    """(mean, worst) cosine of the fused model's embeddings of all texts to fp32's. Lengths differ: one dynamic graph."""
    import minilm_model
    import torch

    import tersor

    fp32, texts = minilm_model.load_model(), minilm_model.load_texts(limit)
    fused = torch.compile(tersor.quantize_(copy.deepcopy(fp32), tersor.Int8Dynamic()), backend=tersor.fusion.backend, dynamic=True)
    both = [minilm_model.evaluate(model, texts) for model in (fp32, fused)]
    cosine = torch.cat([(a.double() * b.double()).sum(1) for a, b in zip(*both, strict=True)])
    return cosine.mean().item(), cosine.min().item()


class LanguageModels:
    """SmolLM2 swapped, fused, and without linear layers; each with a cache of PROMPT tokens of its own."""

    def __init__(self, tokens: int = PROMPT + 1) -> None:
        import smollm_model
        import torch

        import tersor

        self.fp32, tokenizer = smollm_model.load_model()
        self.ids = smollm_model.load_chapter(tokenizer, tokens)
        int8 = tersor.Int8Dynamic()
        self.swapped = tersor.quantize_(copy.deepcopy(self.fp32), {"_default": int8, "lm_head": int8})
        floor = smollm_model.linear_free_(copy.deepcopy(self.fp32))
        self.models = {
            FP32: self.fp32,
            SWAPPED: self.swapped,
            FUSED: compiled(copy.deepcopy(self.swapped)),
            "floor, eager": floor,
            "floor, dynamo": torch.compile(copy.deepcopy(floor), backend="eager"),
        }

    def prefill(self, model: Any) -> Any:
        return model(self.ids[:, :PROMPT], use_cache=True, logits_to_keep=1)

    def decode(self, model: Any, cache: Any) -> None:
        model(self.ids[:, PROMPT : PROMPT + 1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    def layers(self, rows: int) -> Callable[[], None]:
        """All packed layers, each on its input's shape, in the order of the model; the head on one row."""
        import torch

        import tersor

        found = [(name, m) for name, m in self.swapped.named_modules() if isinstance(m, tersor.QuantLinear)]
        inputs = {m.in_features: torch.randn(1, rows, m.in_features) for _, m in found}
        calls = [(m, inputs[m.in_features] if name != "lm_head" else inputs[m.in_features][:, :1]) for name, m in found]

        def run() -> None:
            for layer, x in calls:
                layer(x)

        return run

    def speed(self, decode: bool, rounds: int = 9) -> dict[str, Timing]:
        import torch

        with torch_threads(1), torch.inference_mode():
            if decode:
                caches = {name: self.prefill(model).past_key_values for name, model in self.models.items()}
                calls = {name: partial(self.decode, model, caches[name]) for name, model in self.models.items()}
            else:
                calls = {name: partial(self.prefill, model) for name, model in self.models.items()}
            calls["our layers alone"] = self.layers(1 if decode else PROMPT)
            return interleaved(calls, rounds, 0.08)

    def perplexity_change(self) -> tuple[float, float]:
        """Perplexity of the fused model over the swapped one's, less 1, and its standard error: paired, over windows of CONTEXT
        tokens of the novel. Two int8 models round ties to other sides at every layer and so differ by chance, window by window."""
        from smollm_model import losses, windows

        with torch_threads(1):
            fused, swapped = (losses(self.models[name], windows(self.ids, CONTEXT)) for name in (FUSED, SWAPPED))
        change = fused - swapped
        return change.mean().expm1().item(), change.std().item() / len(change) ** 0.5


def of_limit(seconds: dict[str, Timing]) -> float:
    """Share of the speed that floor and layers allow which the fused model reaches."""
    floor = min(seconds["floor, eager"].best, seconds["floor, dynamo"].best)
    return (floor + seconds["our layers alone"].best) / seconds[FUSED].best


# ---- memory: each in a process of its own

WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
import json, torch
torch.set_num_threads(1)
import fused_models, minilm_model, tersor

def kib(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))

def clear():
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here

ids = minilm_model.token_rows(8, 128)
mask = torch.ones_like(ids)
model = minilm_model.load_model()
for p in model.parameters():
    p.data = p.data.clone()  # out of the mapped file: every byte counts
with torch.inference_mode():
    if sys.argv[1] != "fp32":
        model = tersor.quantize_(model, tersor.Int8Dynamic())
    if sys.argv[1] == "fused":
        model = fused_models.compiled(model)
    if sys.argv[1] == "tersor.fuse":
        model = tersor.fuse(model, {"input_ids": ids, "attention_mask": mask})
    import ctypes, gc
    minilm_model.sentence_embedding(model, ids, mask)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    base = kib("VmRSS")
    clear()
    for _ in range(3):
        minilm_model.sentence_embedding(model, ids, mask)
print(json.dumps({"resident": base / 1024, "peak": kib("VmHWM") / 1024}))
"""


def memory(what: str) -> dict[str, float]:
    """MiB resident before three forward passes of 8 x 128 tokens, and at their peak."""
    command = [sys.executable, "-c", WORKER, what, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- tables


def show_minilm(console: Console) -> None:
    import torch

    models = minilm_models()
    table = Table("", *(f"{b} x {t} tokens, ms" for b, t in SHAPES), title=f"MiniLM, 1 thread, {machine_name()}")
    found = []
    for shape in SHAPES:
        torch._dynamo.reset()
        found.append(minilm_speed(models, *shape))
    for name in models:
        table.add_row(name, *(f"{1e3 * run[name].best:.2f}  {run[FP32].best / run[name].best:.2f}x" for run in found))
    console.print(table)


def show_smollm(console: Console) -> None:
    models = LanguageModels()
    for decode in (False, True):
        seconds = models.speed(decode)
        what = f"decode at {PROMPT}" if decode else f"prefill {PROMPT}"
        table = Table(what, "ms", "x swapped", title=f"SmolLM2-135M, 1 thread; {of_limit(seconds):.0%} of floor + layers")
        for name, time in seconds.items():
            table.add_row(name, f"{1e3 * time.best:.2f}", f"{seconds[SWAPPED].best / time.best:.2f}")
        console.print(table)


def show_memory(console: Console) -> None:
    table = Table("MiniLM, 8 x 128 tokens", "resident, MiB", "peak of the forward pass, MiB")
    for what in (FP32, SWAPPED, FUSED, EXPORTED):
        found = memory(what)
        table.add_row(what, f"{found['resident']:.0f}", f"{found['peak']:.0f}")
    console.print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("what", type=click.Choice(["minilm", "smollm", "memory"]), default="minilm")
def main(what: str) -> None:
    """Time, or weigh, what the graph pass makes of a model."""
    cap_peers()
    {"minilm": show_minilm, "smollm": show_smollm, "memory": show_memory}[what](Console(width=120))


if __name__ == "__main__":
    main()
