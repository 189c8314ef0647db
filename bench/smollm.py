"""A real language model, SmolLM2-135M: float32, torch's quantize_dynamic, Tersor, and the model without its linear layers.

python bench/smollm.py [--threads 1] [--tokens 2048]
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tersor.bench.timing import cap_peers, interleaved, machine_name, torch_threads

CONTEXT, PROMPT = 512, 128


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--threads", type=click.IntRange(1), default=1)
@click.option("--rounds", type=click.IntRange(3), default=9)
@click.option("--tokens", type=click.IntRange(CONTEXT), default=4 * CONTEXT, help="Tokens of the novel for perplexity.")
def main(threads: int, rounds: int, tokens: int) -> None:
    """Prefill and decode speed, bytes, and perplexity on the first chapters of Pride and Prejudice.

    The lm_head, tied to the embedding, is packed too, as quantize_dynamic does. The weights were 4-bit (Q4_1) before.
    """
    cap = cap_peers()
    import torch
    from minilm_model import MissingData
    from smollm_model import linear_free_, load_chapter, load_model, perplexity, windows
    from torch import nn

    import tersor
    from tersor.bench.peers import quantize_dynamic_engines, torch_quantize_dynamic

    try:
        fp32, tokenizer = load_model()
        ids = load_chapter(tokenizer, tokens)
    except (ImportError, MissingData) as error:
        raise click.ClickException(str(error)) from None

    int8 = tersor.Int8Dynamic()
    models: dict[str, nn.Module] = {"fp32": fp32}
    models |= {f"quantize_dynamic {engine}": torch_quantize_dynamic(fp32, engine) for engine in quantize_dynamic_engines()}
    models["Tersor Int8Dynamic"] = tersor.quantize_(copy.deepcopy(fp32), {"_default": int8, "lm_head": int8})
    models["without linear layers"] = linear_free_(copy.deepcopy(fp32))

    def prefill(model: Any) -> None:
        model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1)

    def decode(model: Any, cache: Any) -> None:
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    with torch_threads(threads), torch.inference_mode(), Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=2 * rounds + len(models))
        step = partial(progress.advance, task)
        prefills = interleaved({name: partial(prefill, model) for name, model in models.items()}, rounds, 0.1, on_round=step)
        caches = {name: model(ids[:, :PROMPT], use_cache=True).past_key_values for name, model in models.items()}
        decodes = interleaved(
            {name: partial(decode, model, caches[name]) for name, model in models.items()}, rounds, 0.1, on_round=step
        )
        scores = {}
        for name, model in models.items():
            scores[name] = None if name == "without linear layers" else perplexity(model, windows(ids, CONTEXT))
            step()

    table = Table(title=f"SmolLM2-135M, {machine_name()}, {threads} thread(s), torch {torch.__version__}; {cap}")
    for column in ("model", f"prefill {PROMPT}, tokens/s", "x fp32", f"decode at {PROMPT}, tokens/s", "x fp32", "perplexity"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in models:
        table.add_row(
            name,
            f"{PROMPT / prefills[name].best:.0f}",
            f"{prefills['fp32'].best / prefills[name].best:.2f}",
            f"{1 / decodes[name].best:.1f}",
            f"{decodes['fp32'].best / decodes[name].best:.2f}",
            "-" if scores[name] is None else f"{scores[name]:.3f} ({scores[name] / scores['fp32'] - 1:+.2%})",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
