"""``python -m benchmarks.memory``: peak memory against time: eager PyTorch, every policy, and plans
for budgets between them; a JSON file, and pictures of it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from fastunet import FastUNet
from fastunet.cli import as_size
from fastunet.memory import draw, format_size, plan, profile
from fastunet.memory.report import CHECKPOINT, EAGER, POLICIES, measured_peak, plain_copy
from fastunet.reference import UNet

from . import results
from .timing import COVERAGE, interleave, summary

MIB = 2**20


def step_of(
    model: UNet, x: torch.Tensor, gradient: torch.Tensor
) -> Callable[[], list[torch.Tensor]]:
    """A step as the prediction counts it: from a gradient of the logits."""
    parameters = list(model.parameters())

    def step() -> list[torch.Tensor]:
        for p in parameters:
            p.grad = None
        model(x).backward(gradient)
        return [p.grad for p in parameters if p.grad is not None]

    return step


def contenders(model: FastUNet, shape: tuple[int, ...], plans: int) -> dict[str, UNet]:
    """By name; the plain network in channels_last, its faster memory format on CPUs."""

    def with_policy(network: UNet, policy: Any) -> UNet:
        network = copy.deepcopy(network)
        network.use_checkpointing(policy)
        return network

    plain = plain_copy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = {EAGER: plain, CHECKPOINT: with_policy(plain, "full")}
    found |= {policy: with_policy(model, policy) for policy in POLICIES}
    peaks = [peak for peak, _ in profile(model, shape).choices]
    for i in range(1, plans + 1):
        budget = peaks[0] - (peaks[0] - peaks[-1]) * i // plans
        found[f"plan for {format_size(budget)}"] = with_policy(model, plan(model, shape, budget))
    return found


def measure(model: FastUNet, shape: tuple[int, ...], plans: int, rounds: int) -> dict[str, Any]:
    """The gate first: every policy's and plan's gradients are those of ``none``, bit for bit."""
    n, _, *image = shape
    x, gradient = torch.randn(shape), torch.randn(n, model.n_classes, *image)
    models = contenders(model, shape, plans)
    works = {}
    for name, network in models.items():
        last = x.to(memory_format=torch.channels_last)
        works[name] = step_of(network, x if isinstance(network, FastUNet) else last, gradient)
    want = works["none"]()
    for name, network in models.items():
        if isinstance(network, FastUNet) and not all(map(torch.equal, works[name](), want)):
            raise click.ClickException(f"the gradients of {name!r} are not those of 'none'")
    del want
    times = summary(interleave(works, rounds, 0.05, "cpu"), (EAGER,))
    found = {}
    for name, network in tqdm(models.items(), unit="peak", disable=None):
        policy = network.checkpointing
        peak = measured_peak(network, shape, None, 0, network.memory_plan or policy, None)  # type: ignore[attr-defined]
        found[name] = {**times[name], "peak_bytes": peak}
        if isinstance(network, FastUNet) and network.memory_plan is not None:
            found[name]["predicted_bytes"] = network.memory_plan.peak
            found[name]["recomputed"] = sorted(network.memory_plan.recomputed)
    return found


def table(run: dict[str, Any]) -> str:
    eager = run["contenders"][EAGER]
    rows = []
    for name, c in run["contenders"].items():
        low, high = c["ratio_interval"]
        rows.append(
            [
                name,
                format_size(c["peak_bytes"]),
                f"{c['peak_bytes'] / eager['peak_bytes']:.2f}",
                f"{1e3 * c['median']:.0f}",
                f"{c['ratio']:.2f}",
                f"{low:.2f} - {high:.2f}",
            ]
        )
    headers = ["", "peak", "of eager", "ms", "of eager", f"{COVERAGE:.0%}"]
    return tabulate(rows, headers, disable_numparse=True)


def plot(path: Path) -> list[Path]:
    """Memory against time, from a result file, into docs/images."""
    run = json.loads(path.read_text())
    found = run["contenders"]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    plans = [c for name, c in found.items() if name == "none" or name.startswith("plan")]
    axes.plot(
        [c["median"] for c in plans],
        [c["peak_bytes"] / MIB for c in plans],
        "o-",
        color="#2a6f97",
        label="FastUNet, plans for budgets",
    )
    for name, c in found.items():
        if name.startswith("plan"):
            continue
        plain = name in (EAGER, CHECKPOINT)
        at = c["median"], c["peak_bytes"] / MIB
        axes.plot(*at, "s" if plain else "o", color="#c1666b" if plain else "#e09f3e")
        axes.annotate(name, at, (6, 5), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 1.25 * max(c["median"] for c in found.values()))
    axes.set_ylim(0)
    axes.set_xlabel("seconds per training step")
    axes.set_ylabel("peak memory of the step, MiB")
    axes.set_title(
        f"{run['network']}, {run['hardware']['cpu']}, {run['threads']} threads, "
        f"torch {run['versions']['torch']}",
        fontsize=10,
    )
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    results.IMAGES.mkdir(parents=True, exist_ok=True)
    image = results.IMAGES / f"{path.stem}.png"
    figure.savefig(image, dpi=150)
    return [image]


@click.command()
@click.option("--base", default=64, show_default=True, help="First width.")
@click.option("--bilinear/--transposed", default=False, help="Upsampling.  [default: transposed]")
@click.option("--batch", default=1, show_default=True)
@click.option("--size", default="512x512", show_default=True, metavar="HxW", callback=as_size)
@click.option("--plans", default=5, show_default=True, type=click.IntRange(1), help="Budgets.")
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(1))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file.")
@click.option("--plot", "plotted", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Measure nothing; draw this result file into docs/images.")  # fmt: skip
def main(
    base: int,
    bilinear: bool,
    batch: int,
    size: tuple[int, int],
    plans: int,
    rounds: int,
    output: Path | None,
    plotted: Path | None,
) -> None:
    """Measures the peak memory and the time of training steps on this machine's CPU."""
    if plotted is not None:
        for image in plot(plotted):
            click.echo(image)
        return
    about = results.context("cpu")
    torch.manual_seed(0)
    model = FastUNet(3, 2, bilinear, base_channels=base)
    shape = (batch, 3, *size)
    found = measure(model, shape, plans, rounds)
    upsampling = "bilinear" if bilinear else "transposed"
    network = f"base {base}, {upsampling}, {'x'.join(map(str, shape))}, float32"
    run = {**about, "network": network, "rounds": rounds, "contenders": found}
    click.echo(table(run))
    path = output or results.default_path("cpu", "memory")
    results.write(path, run)
    click.echo(f"\n{path}")
    for image in (*plot(path), *draw(profile(model, shape), results.IMAGES)):
        click.echo(image)


if __name__ == "__main__":
    main()
