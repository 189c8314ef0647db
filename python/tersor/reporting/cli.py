"""`tersor report`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..bench.cli import or_exit, output_file


def of_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The options that name a model and what it is called with."""
    for option in (
        click.option("--threads", type=click.IntRange(1), default=1, show_default=True),
        click.option("--inputs", help="module:factory of the model's inputs: a tensor, a tuple, a dict, or a list of those."),
        click.option("--model", required=True, help="module:factory of the float model, or of a pair (model, inputs)."),
    ):
        command = option(command)
    return command


def model_and_inputs(model: str, inputs: str | None) -> tuple[Any, Any]:
    """What the options name. ClickException where they name no model, or no inputs."""
    from torch import nn

    from ..bench.layers import made_by

    made = or_exit(lambda: made_by(model))
    given = None
    if isinstance(made, tuple) and len(made) == 2:
        made, given = made
    if not isinstance(made, nn.Module):
        raise click.ClickException(f"--model {model!r} made {type(made).__name__}, expected an nn.Module")
    if inputs is not None:
        given = or_exit(lambda: made_by(inputs, "inputs"))
    if given is None:
        raise click.ClickException(
            "no inputs: give --inputs module:factory, or let the factory of --model return the pair (model, inputs)"
        )
    return made, given


@click.command()
@of_a_model
@click.option("--format", "format_name", default="int8-dynamic", show_default=True, help="Format of the other model's layers.")
@click.option("--metric", help="module:function, called with a model, gives a number: higher is better.")
@click.option("--layers/--no-layers", "per_layer", default=True, show_default=True, help="Also compare layer by layer.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Times each model is measured.")
@click.option("--html", "html_path", callback=output_file, metavar="FILE", help="Write one self-contained page.")
@click.option("--markdown", "markdown_path", callback=output_file, metavar="FILE", help="Write Markdown tables.")
@click.option("--json", "json_path", callback=output_file, metavar="FILE", help="Write everything as JSON.")
@click.option("--svg", "svg_path", callback=output_file, metavar="FILE", help="Draw the layers.")
def report(
    model: str,
    inputs: str | None,
    threads: int,
    format_name: str,
    metric: str | None,
    per_layer: bool,
    rounds: int,
    html_path: Path | None,
    markdown_path: Path | None,
    json_path: Path | None,
    svg_path: Path | None,
) -> None:
    """Compare a model with its swapped copy: speed, memory, accuracy, layer by layer.

    \b
    tersor report --model my_package.models:build --inputs my_package.data:batches --html report.html
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, says when it starts and stops
    import copy
    import json

    from rich.console import Console

    from ..bench.layers import attribute
    from ..bench.our_formats import our_formats
    from ..bench.timing import torch_threads
    from ..formats import Int8Static
    from ..static_scales import calibrate
    from ..swap import quantize_
    from .measure import report as compare

    formats = our_formats()
    if format_name not in formats:
        raise click.BadParameter(f"{format_name!r}, expected one of: {', '.join(formats)}", param_hint="--format")
    score = or_exit(lambda: attribute(metric, "metric")) if metric else None
    before, given = model_and_inputs(model, inputs)
    fmt = formats[format_name]
    config = or_exit(lambda: calibrate(before, Int8Static(), given)) if isinstance(fmt, Int8Static) else fmt
    after = or_exit(lambda: quantize_(copy.deepcopy(before), config, progress=True))
    with torch_threads(threads):
        found = or_exit(lambda: compare(before, after, given, score, per_layer=per_layer, rounds=rounds, progress=True))
    Console(width=None if sys.stdout.isatty() else 150).print(found)
    for path, text in (
        (html_path, found.to_html),
        (markdown_path, found.to_markdown),
        (json_path, lambda: json.dumps(found.to_dict(), indent=1) + "\n"),
        (svg_path, found.plot),
    ):
        if path:
            path.write_text(text(), encoding="utf-8")
