"""The command line: ``fastunet ...`` and ``python -m fastunet ...``."""

import json
import re
from typing import Any

import click

from . import __version__, bound
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


@main.command()
@click.option("--bound", "as_bound", is_flag=True, help="The least time, by FLOPs and bytes.")
@click.option("--channels", "n_channels", default=3, show_default=True, help="Of the image.")
@click.option("--classes", "n_classes", default=2, show_default=True, help="Of the logits.")
@click.option("--base", "base_channels", default=64, show_default=True, help="First width.")
@click.option("--depth", default=4, show_default=True, help="Number of poolings.")
@click.option("--bilinear/--transposed", default=False, help="Upsampling.  [default: transposed]")
@click.option("--batch", default=1, show_default=True, help="Images per step.")
@click.option("--size", default="512x512", show_default=True, metavar="HxW")
@click.option(
    "--dtype", default="bfloat16", show_default=True, type=click.Choice([*bound.ITEMSIZE])
)
@click.option("--gpu", type=click.Choice([*bound.GPUS], case_sensitive=False),
              help="Its published peaks; float32 is TF32.  [default: H200]")  # fmt: skip
@click.option("--tflops", type=float, help="Measured instead: 10**12 FLOP/s of dense products.")
@click.option("--bandwidth", type=float, help="Measured instead: 10**12 bytes/s of memory.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bench(
    as_bound: bool,
    size: str,
    gpu: str | None,
    tflops: float | None,
    bandwidth: float | None,
    as_json: bool,
    **network: Any,
) -> None:
    """What a U-Net can reach on a GPU: in eager PyTorch, with torch.compile, and fused."""
    if not as_bound:
        raise click.UsageError(
            "measuring is done by `python -m benchmarks.run` in a checkout; "
            "`fastunet bench --bound` counts what is possible."
        )
    shape = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", size)
    if not shape:
        raise click.UsageError(f"size must be HxW, for instance 640x959, got {size!r}.")
    height, width = map(int, shape.groups())
    try:
        net = bound.Network(**network, height=height, width=width)
        found = bound.report(net, bound.Ceilings.of(gpu, net.dtype, tflops, bandwidth))
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    click.echo(json.dumps(found, indent=2) if as_json else bound.render(found))
