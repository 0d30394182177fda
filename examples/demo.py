"""Trains a plain U-Net and a FastUNet side by side: same weights, same batches, same head.

Both learn to find grey and white matter in an MR image, and are tested on slices they never saw.
Prints what each needed and reached; writes prediction.png, loss.png and result.json.
"""

import copy
import json
import platform
import re
import statistics
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from fastunet import FastUNet
from fastunet.files import whole_file
from fastunet.memory import measure_allocations, saved_for_backward
from fastunet.reference import UNet
from fastunet.training import mni152

LEARNING_RATE = 3e-3
EARLY = 20  # steps; later, rounding differences have grown by chaos, as between any two runs
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SHOWN = 97  # the axial slice of prediction.png


class Contestant:
    """A model with its optimizer, and what it has cost so far."""

    def __init__(self, model: nn.Module, device: torch.device, steps: int):
        self.name = type(model).__name__
        self.model = model
        self.device = device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.losses: list[float] = []
        self.step_ms: list[float] = []

    def measure(self, images: Tensor, labels: Tensor, exact_loss: float) -> None:
        """Rounding error, bytes saved for backward, peak of forward and backward; on a copy."""
        model = copy.deepcopy(self.model)
        loss = loss_of(model, images, labels)
        self.first_loss_error = abs(loss.item() - exact_loss)
        loss.backward()  # the first call sets things up: it is not the one to measure
        del loss
        model.zero_grad()
        fixed = [*model.parameters(), *model.buffers()]
        self.saved_bytes = saved_for_backward(lambda: loss_of(model, images, labels), fixed)
        self.peak_bytes = measure_allocations(
            lambda: loss_of(model, images, labels).backward(), self.device
        ).peak_bytes

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        self.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = loss_of(self.model, images, labels)
        loss.backward()
        self.optimizer.step()
        self.synchronize()
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.schedule.step()
        self.losses.append(loss.item())

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def test(self, data: mni152.Slices, batch_size: int) -> None:
        """The likeliest class of each pixel, [N, H, W], and its overlap with the truth."""
        self.model.eval()
        parts = [self.model(images).argmax(1) for images in data.images.split(batch_size)]
        self.prediction = torch.cat(parts)
        self.dice = dice(self.prediction, data.labels)

    def report(self) -> dict:
        return {
            "median_step_ms": statistics.median(self.step_ms),
            "saved_bytes": self.saved_bytes,
            "peak_bytes": self.peak_bytes,
            "first_loss_error": self.first_loss_error,
            "dice": self.dice,
            "losses": self.losses,
            "step_ms": self.step_ms,
        }


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def dice(prediction: Tensor, truth: Tensor) -> dict[str, float]:
    """Dice overlap of grey and of white matter over all pixels together, and their mean."""
    scores = {}
    for name in ("grey", "white"):
        index = mni152.CLASSES.index(name)
        found, true = prediction == index, truth == index
        scores[name] = 2 * (found & true).sum().item() / (found.sum() + true.sum()).item()
    return {**scores, "mean": statistics.mean(scores.values())}


def train(contestants: list[Contestant], data: mni152.Slices, steps: int, batch_size: int) -> None:
    """A step of each in turn, so that whatever else the machine does slows both alike."""
    order = torch.empty(0, dtype=torch.long)
    progress = tqdm(range(steps), desc="training both", unit="step", disable=None)
    for step in progress:
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(data.z))])
        batch, order = order[:batch_size], order[batch_size:]
        images, labels = data.images[batch], data.labels[batch]
        for contestant in contestants if step % 2 else reversed(contestants):
            contestant.train_step(images, labels)
        progress.set_postfix({c.name: f"{c.losses[-1]:.3f}" for c in contestants})


def hardware(device: torch.device) -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def print_comparison(result: dict) -> None:
    models = result["models"]
    rows = [["", *models]]
    for title, key, unit in (
        ("ms per training step (median)", "median_step_ms", 1),
        ("MB saved for backward", "saved_bytes", 1e6),
        ("MB at the peak of forward, backward", "peak_bytes", 1e6),
    ):
        rows.append([title, *(f"{model[key] / unit:.1f}" for model in models.values())])
    errors = (f"{model['first_loss_error']:.1e}" for model in models.values())
    rows.append(["|first loss - float64's|", *errors])
    for span, difference in result["largest_loss_difference"].items():
        rows.append([f"largest |loss difference|, {span} steps", "", f"{difference:.1e}"])
    for tissue in ("grey", "white", "mean"):
        scores = (f"{model['dice'][tissue]:.3f}" for model in models.values())
        rows.append([f"held-out Dice, {tissue}", *scores])
    click.echo("\n" + ", ".join(f"{key}: {value}" for key, value in result["hardware"].items()))
    align = ("left", "right", "right")
    click.echo(tabulate(rows, headers="firstrow", colalign=align, disable_numparse=True))
    click.echo(
        "UNet / FastUNet: {time:.2f}x the time, {saved:.2f}x the bytes saved for backward, "
        "{peak:.2f}x the peak memory".format(**result["ratios"])
    )


def prediction_figure(panels: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(3.2 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        colours = {"cmap": "gray"} if panel.is_floating_point() else {"vmin": 0, "vmax": 2}
        axis.imshow(panel.cpu().T, origin="lower", **colours)  # the front of the head is up
        axis.set_title(title)
        axis.axis("off")
    return figure


def loss_figure(contestants: list[Contestant], differences: list[float]) -> Figure:
    figure = Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for contestant, style in zip(contestants, ("-", "--"), strict=True):
        above.semilogy(contestant.losses, style, label=contestant.name)
    above.set_ylabel("training loss")
    above.legend()
    below.semilogy([difference or float("nan") for difference in differences], ".-")
    below.set(xlabel="step", ylabel="|loss difference|")
    return figure


def write_whole(path: Path, content: Figure | str) -> None:
    """The file appears complete or not at all."""
    with whole_file(path) as file:
        if isinstance(content, Figure):
            content.savefig(file, format="png", dpi=150)
        else:
            file.write(content.encode())


def choose_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise click.UsageError(f"--device must be cpu or cuda, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.UsageError(f"--device {name}: PyTorch sees no such GPU on this machine")
    return device


@click.command(help=__doc__)
@click.option("--steps", default=120, show_default=True, type=click.IntRange(min=1))
@click.option("--base-channels", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--batch-size", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--device", help="cpu or cuda.  [default: cuda where there is one]")
@click.option(
    "--layout",
    default="channels_last",
    show_default=True,
    type=click.Choice(list(LAYOUTS)),
    help="Of both models. On CPUs the plain U-Net is faster but less accurate in channels_last.",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--output", default="demo-output", show_default=True, type=click.Path(file_okay=False)
)
def main(
    steps: int,
    base_channels: int,
    batch_size: int,
    device: str | None,
    layout: str,
    seed: int,
    output: str,
) -> None:
    settings = {"steps": steps, "base_channels": base_channels}
    settings |= {"batch_size": batch_size, "layout": layout, "seed": seed}
    place, folder = choose_device(device), Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--output {output} cannot be made: {error.strerror}") from error
    torch.manual_seed(seed)
    data, held_out = (slices.to(place) for slices in mni152.load())
    if batch_size > len(data.z):
        raise click.UsageError(f"--batch-size must be at most {len(data.z)}, got {batch_size}")

    unet = UNet(1, len(mni152.CLASSES), base_channels=base_channels).to(place)
    fast = FastUNet(1, len(mni152.CLASSES), base_channels=base_channels).to(place)
    fast.load_state_dict(unet.state_dict())
    images, labels = data.images[:batch_size].clone(), data.labels[:batch_size].clone()
    exact_loss = loss_of(copy.deepcopy(unet).double(), images.double(), labels).item()
    pair = [Contestant(m.to(memory_format=LAYOUTS[layout]), place, steps) for m in (unet, fast)]
    for contestant in pair:
        contestant.measure(images, labels, exact_loss)
    train(pair, data, steps, batch_size)
    for contestant in pair:
        contestant.test(held_out, batch_size)

    differences = [abs(a - b) for a, b in zip(pair[0].losses, pair[1].losses, strict=True)]
    plain, fastest = (contestant.report() for contestant in pair)
    keys = {"time": "median_step_ms", "saved": "saved_bytes", "peak": "peak_bytes"}
    result = {
        "hardware": hardware(place),
        "settings": settings,
        "slices": {"shape": list(data.images.shape[2:]), "train": data.z, "held_out": held_out.z},
        "models": {"UNet": plain, "FastUNet": fastest},
        "ratios": {name: plain[key] / fastest[key] for name, key in keys.items()},
        "largest_loss_difference": {
            f"first {EARLY}": max(differences[:EARLY]),
            "all": max(differences),
        },
    }
    print_comparison(result)

    shown = held_out.z.index(SHOWN)
    panels = {f"slice {SHOWN}": held_out.images[shown, 0], "truth": held_out.labels[shown]}
    panels |= {contestant.name: contestant.prediction[shown] for contestant in pair}
    write_whole(folder / "prediction.png", prediction_figure(panels))
    write_whole(folder / "loss.png", loss_figure(pair, differences))
    write_whole(folder / "result.json", json.dumps(result, indent=1))
    click.echo(f"prediction.png, loss.png and result.json are in {folder}")


if __name__ == "__main__":
    main()
