"""The command line: ``fastunet ...`` and ``python -m fastunet ...``."""

import json

import click

from . import __version__
from . import doctor as diagnosis


@click.group()
@click.version_option(__version__)
def main() -> None:
    """FastUNet: the fastest and leanest way to train and run a U-Net in PyTorch."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> None:
    """Say what is available here, and which backend serves which operator."""
    found = diagnosis.report()
    click.echo(json.dumps(found, indent=2) if as_json else diagnosis.render(found))
