"""The command line: ``fastunet ...`` and ``python -m fastunet ...``."""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from . import __version__, bound
from . import doctor as diagnosis
from .tiling import TILE
from .training.settings import Settings


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

    if measure and device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--measure on cuda needs a GPU here; without it, all is predicted.")
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
        # First, as it may have taken long, and a file below may not be writable.
        click.echo(json.dumps(report.to_dict(), indent=2) if as_json else report)
        if plan_file is not None:
            if report.plan is None:
                raise ValueError("a plan needs a budget that can be met")
            with writing(plan_file):
                report.plan.save(plan_file)
        if pictures is not None:
            with writing(pictures):
                files = memory.draw(report, pictures)
            for file in files:
                click.echo(file, err=as_json)
    except (ValueError, RuntimeError, OSError) as error:
        raise click.UsageError(f"{str(error).rstrip('.')}.") from None


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise click.ClickException(
            f"{str(path)!r} must be writable, got: {error.strerror or error}."
        ) from None


def of_training(command: Callable) -> Callable:
    """The options of a training run, from its settings."""
    for entry in reversed(fields(Settings)):
        about, default = entry.metadata, entry.default
        flag = f"--{entry.name.replace('_', '-')}"
        kind: Any = str if default is None else type(default)
        if about["choices"]:
            kind = click.Choice(about["choices"])
        elif about["help"].startswith(("Folder", "File")):
            kind = click.Path(path_type=Path)
        elif kind is bool:
            flag, kind = (f"{flag}/--no-{entry.name}" if default else flag), None
        command = click.option(
            flag,
            type=kind,
            is_flag=kind is None,
            default=default,
            show_default=default not in (None, "") and kind is not None,
            help=about["help"],
        )(command)
    return command


def lacking(what: str, extra: str, error: Exception) -> click.ClickException:
    return click.ClickException(
        f"{what} needs more packages, `pip install 'fastunet[{extra}]'` gets them: {error}."
    )


@main.command()
@of_training
def train(**options: Any) -> None:
    """Train a U-Net on images with masks; stop it at any time, and go on with --resume."""
    try:
        settings = Settings(**options)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    try:
        from .training.loop import Interrupted
        from .training.loop import train as run
    except (ImportError, RuntimeError) as error:
        raise lacking("training", "train", error) from None
    try:
        run(settings)
    except ImportError as error:  # what one kind of data alone needs
        raise lacking("training", "train", error) from None
    except Interrupted as stop:
        click.echo(f"{stop}.", err=True)
        raise SystemExit(128 + stop.signal) from None
    except KeyboardInterrupt:
        click.echo("stopped before the first step.", err=True)
        raise SystemExit(130) from None
    except (ValueError, OSError, MemoryError) as error:
        raise click.ClickException(f"{str(error).rstrip('.')}.") from None


@main.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.option("--checkpoint", required=True, type=click.Path(path_type=Path), help="Of a training.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write to.")
@click.option("--tile", default=TILE, show_default=True, help="Side of a tile in pixels.")
@click.option("--overlap", type=int, help="Of two tiles, in pixels.  [default: by the depth]")
@click.option("--batch-size", default=1, show_default=True, help="Tiles at once.")
@click.option("--overlay/--no-overlay", "overlays", default=True, help="Also write overlays.")
@click.option("--overwrite", is_flag=True, help="Replace files that are in --out already.")
@click.option("--device", help="Such as cpu or cuda:1.  [default: a GPU if there is one]")
def predict(images: Path, **options: Any) -> None:
    """Write the mask, and an overlay, of an image or of every image of a folder."""
    try:
        from .prediction import predict_files
    except ImportError as error:
        raise lacking("predicting", "predict", error) from None
    logging.getLogger("tifffile").disabled = True  # what it says of a damaged file, we say too
    try:
        faults = predict_files(images, **options)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # also memory of a device
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise click.ClickException(f"{first.rstrip('.')}.") from None
    for fault in faults:
        click.echo(f"Error: {fault.rstrip('.')}.", err=True)
    if faults:
        raise SystemExit(1)
