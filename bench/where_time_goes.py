"""Which ops a swapped model spends its time in: torch.profiler's own CPU time, one thread, as shares.

python bench/where_time_goes.py [minilm | smollm-prefill | smollm-decode]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import tersor

PROMPT, ROWS = 128, 12


def minilm() -> Callable[[], object]:
    from minilm_model import load_model, sentence_embedding, token_rows

    ids = token_rows(8, PROMPT)
    return partial(sentence_embedding, tersor.quantize_(load_model(), tersor.Int8Dynamic()), ids, torch.ones_like(ids))


def smollm(decode: bool) -> Callable[[], object]:
    from smollm_model import load_chapter, load_model

    model: Any
    model, tokenizer = load_model()
    int8 = tersor.Int8Dynamic()
    tersor.quantize_(model, {"_default": int8, "lm_head": int8})
    ids = load_chapter(tokenizer, PROMPT + 1)
    if not decode:
        return partial(model, ids[:, :PROMPT], use_cache=True, logits_to_keep=1)
    cache = model(ids[:, :PROMPT], use_cache=True).past_key_values

    def step() -> None:
        model(ids[:, PROMPT:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


WORK: dict[str, Callable[[], Callable[[], object]]] = {
    "minilm": minilm,
    "smollm-prefill": partial(smollm, False),
    "smollm-decode": partial(smollm, True),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("what", type=click.Choice(list(WORK)), default="minilm")
def main(what: str) -> None:
    """Shares of the CPU time of the largest ops, beside the number of calls in one forward pass."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        run = WORK[what]()
        run()
        run()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(5):
                run()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    table = Table("op", "share", "calls", title=what)
    for event in events[:ROWS]:
        table.add_row(event.key, f"{event.self_cpu_time_total / total:.1%}", str(event.count // 5))
    table.add_row(f"{len(events) - ROWS} others", f"{sum(e.self_cpu_time_total for e in events[ROWS:]) / total:.1%}", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
