"""The `tersor` command."""

from __future__ import annotations

import dataclasses
import json

import click

from . import __version__
from .advice.cli import advise
from .bench.cli import bench
from .reporting.cli import report


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """PyTorch layers that are smaller and really faster on the machine at hand."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, for programs.")
def info(as_json: bool) -> None:
    """Show versions, the instruction sets of this CPU, and which kernel serves each op.

    Set TERSOR_ISA to cap the instruction set, e.g. TERSOR_ISA=avx2.
    """
    from .information import info as collect

    try:
        facts = collect()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    click.echo(json.dumps(dataclasses.asdict(facts), indent=2) if as_json else str(facts))


main.add_command(advise)
main.add_command(bench)
main.add_command(report)


if __name__ == "__main__":
    main()
