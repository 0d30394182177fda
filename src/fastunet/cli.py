"""The command line: ``fastunet ...`` and ``python -m fastunet ...``."""

import json
import re
from collections.abc import Callable
from pathlib import Path
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


def of_network(command: Callable) -> Callable:
    """The options that name a network and its batch."""
    for option in reversed(
        (
            click.option(
                "--channels", "n_channels", default=3, show_default=True, help="Of the image."
            ),
            click.option(
                "--classes", "n_classes", default=2, show_default=True, help="Of the logits."
            ),
            click.option(
                "--base", "base_channels", default=64, show_default=True, help="First width."
            ),
            click.option("--depth", default=4, show_default=True, help="Number of poolings."),
            click.option(
                "--bilinear/--transposed", default=False, help="Upsampling.  [default: transposed]"
            ),
            click.option("--batch", default=1, show_default=True, help="Images per step."),
            click.option(
                "--size", default="512x512", show_default=True, metavar="HxW", callback=as_size
            ),
            click.option(
                "--dtype",
                default="bfloat16",
                show_default=True,
                type=click.Choice([*bound.ITEMSIZE]),
            ),
        )
    ):
        command = option(command)
    return command


def as_size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", value)
    if not found:
        raise click.UsageError(f"size must be HxW, for instance 640x959, got {value!r}.")
    return int(found[1]), int(found[2])


@main.command()
@click.option("--bound", "as_bound", is_flag=True, help="The least time, by FLOPs and bytes.")
@of_network
@click.option("--gpu", type=click.Choice([*bound.GPUS], case_sensitive=False),
              help="Its published peaks; float32 is TF32.  [default: H200]")  # fmt: skip
@click.option("--tflops", type=float, help="Measured instead: 10**12 FLOP/s of dense products.")
@click.option("--bandwidth", type=float, help="Measured instead: 10**12 bytes/s of memory.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def bench(
    as_bound: bool,
    size: tuple[int, int],
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
    height, width = size
    try:
        net = bound.Network(**network, height=height, width=width)
        found = bound.report(net, bound.Ceilings.of(gpu, net.dtype, tflops, bandwidth))
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    click.echo(json.dumps(found, indent=2) if as_json else bound.render(found))


STATES = {"sgd": 0, "momentum": 1, "rmsprop": 1, "adam": 2}  # tensors per parameter


@main.command()
@of_network
@click.option("--budget", help="For parameters and all that a step holds, such as 6GiB.")
@click.option("--optimizer", default="sgd", show_default=True, type=click.Choice([*STATES]))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="There or not.  [default: cpu]")
@click.option("--find-batch", is_flag=True, help="The largest batch that fits the budget.")
@click.option("--find-size", is_flag=True, help="The largest square image that fits the budget.")
@click.option("--measure", is_flag=True, help="Also run every step, and count its allocations.")
@click.option(
    "--pictures", type=click.Path(file_okay=False, path_type=Path), help="Folder for plots."
)
@click.option("--snapshot", type=click.Path(dir_okay=False), help="For PyTorch's viewer; CUDA.")
@click.option(
    "--plan", "plan_file", type=click.Path(dir_okay=False), help="Write the plan as JSON."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def profile(
    size: tuple[int, int],
    batch: int,
    dtype: str,
    budget: str | None,
    optimizer: str,
    device: str | None,
    find_batch: bool,
    find_size: bool,
    measure: bool,
    pictures: Path | None,
    snapshot: str | None,
    plan_file: str | None,
    as_json: bool,
    **network: Any,
) -> None:
    """Where a training step's memory goes: eager PyTorch, and FastUNet under every policy."""
    import torch

    from . import FastUNet, memory

    try:
        with torch.device(device or "cpu" if measure else "meta"):
            model = FastUNet(**network)
        report = memory.profile(
            model,
            (batch, network["n_channels"], *size),
            dtype=getattr(torch, dtype),
            optimizer_states=STATES[optimizer],
            budget=budget,
            device=device or "cpu",
            find_batch=find_batch,
            find_size=find_size,
            measure=measure,
            snapshot=snapshot,
        )
        if plan_file is not None:
            if report.plan is None:
                raise ValueError("a plan needs a budget that can be met")
            report.plan.save(plan_file)
        files = memory.draw(report, pictures) if pictures is not None else []
    except (ValueError, RuntimeError) as error:
        raise click.UsageError(f"{str(error).rstrip('.')}.") from None
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)
    for file in files:
        click.echo(file, err=as_json)
