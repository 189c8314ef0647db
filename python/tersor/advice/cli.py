"""`tersor advise`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..bench.cli import measured_machine, or_exit, output_file
from ..reporting.cli import model_and_inputs, of_a_model


@click.command()
@of_a_model
@click.option("--metric", help="module:function, called with a model, gives a number: higher is better. With --max-drop.")
@click.option("--latency", type=click.FloatRange(0, min_open=True), help="Milliseconds that a pass over the inputs may take.")
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="Megabytes that the model may take.")
@click.option("--max-drop", type=click.FloatRange(0), help="How far the metric may fall; without one: 1 - cosine of the outputs.")
@click.option("--json", "json_path", callback=output_file, metavar="FILE", help="Write everything as JSON.")
@click.option("--markdown", "markdown_path", callback=output_file, metavar="FILE", help="Write it as Markdown.")
def advise(
    model: str,
    inputs: str | None,
    threads: int,
    metric: str | None,
    latency: float | None,
    memory: float | None,
    max_drop: float | None,
    json_path: Path | None,
    markdown_path: Path | None,
) -> None:
    """Say which format suits a model here, and what limits it on other hardware.

    \b
    tersor advise --model my_package.models:build --inputs my_package.data:batches --latency 20

    The first time, this machine's limits are measured in a few seconds.
    """
    import json

    from rich.console import Console

    from ..bench.layers import attribute
    from ..bench.timing import torch_threads
    from .recommend import advise as find

    score = or_exit(lambda: attribute(metric, "metric")) if metric else None
    made, given = model_and_inputs(model, inputs)
    machine = measured_machine(False)
    with torch_threads(threads):
        advice = or_exit(
            lambda: find(
                made,
                given,
                latency=latency and latency / 1e3,
                memory=memory and memory * 1e6,
                max_drop=max_drop,
                metric=score,
                machine=machine,
                progress=True,
            )
        )
    Console(width=None if sys.stdout.isatty() else 150).print(advice)
    if json_path:
        json_path.write_text(json.dumps(advice.to_dict(), indent=1) + "\n", encoding="utf-8")
    if markdown_path:
        markdown_path.write_text(str(advice), encoding="utf-8")
