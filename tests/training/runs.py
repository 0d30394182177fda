"""Small runs: something to learn from, how to start them, and whether two ended alike."""

from pathlib import Path

import numpy as np
import tifffile
import torch
from click.testing import CliRunner
from PIL import Image

from fastunet import checkpoints
from fastunet.cli import main
from fastunet.training import Settings
from fastunet.training.data import open_data


def draw(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image [H, W, 3] uint8 with a bright disc on noise, and its mask [H, W]."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    centre = random.uniform(0.3, 0.7, 2) * (height, width)
    mask = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (min(height, width) / 3) ** 2).astype(
        "u1"
    )
    image = mask[..., None] * 120 + random.integers(0, 100, (height, width, 3))
    return image.astype("u1"), mask


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)


def write_folder(root: Path, suffixes: tuple[str, str] = (".png", ".png"), count: int = 8) -> Path:
    for index in range(count):
        image, mask = draw(index, 20 + 7 * index, 50 - 3 * index)
        write(root / "images" / f"{index}{suffixes[0]}", image)
        write(root / "masks" / f"{index}{suffixes[1]}", mask)
    return root


def options(folder: Path, out: Path, /, **changes) -> dict:
    """A run of base 4 and depth 2 with three steps in an epoch."""
    chosen = {"images": folder / "images", "masks": folder / "masks", "out": out}
    chosen |= {"base": 4, "depth": 2, "size": 32, "batch_size": 2, "epochs": 2, "workers": 0}
    chosen |= {"val_share": 0.25, "lr": 0.01}
    return chosen | changes


def command(folder: Path, out: Path, /, **changes) -> list[str]:
    """The same as arguments of the command line."""
    given = options(folder, out, **changes)
    flags = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    pairs = (
        [f] if v is True else [f, str(v)]
        for f, v in flags.items()
        if v is not None and v is not False
    )
    return ["train", *(word for pair in pairs for word in pair)]


def fails(arguments: list[str]) -> str:
    """The one sentence of a command that fails."""
    result = CliRunner().invoke(main, arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2)
    return result.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("last.pt", "best.pt"):
        first, second = (checkpoints.load(out / name) for out in (one, other))
        assert_same(without_times(first), without_times(second))


def without_times(checkpoint: dict) -> dict:
    training = checkpoint.get("training", {"history": []})
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in training["history"]]
    kept = {k: v for k, v in training.items() if k != "random"}  # loaders draw from it, for nobody
    return {**checkpoint, "training": {**kept, "history": rows}}


def assert_same(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def assert_scores(folder: Path, out: Path) -> None:
    """By their definitions, of the newest weights on the images that the run held out."""
    checkpoint = checkpoints.load(out / "last.pt")
    held_out = open_data(Settings(**options(folder, out))).validation
    assert len(held_out) == 2
    model, prepare = checkpoints.load_model(out / "last.pt")
    pairs = []
    with torch.no_grad():
        for image, mask in (held_out[i] for i in range(len(held_out))):
            logits = model(prepare(image[None]))
            pairs.append((logits.argmax(1).flatten(), mask.flatten()))
    found, true = (torch.cat(part) for part in zip(*pairs, strict=True))
    row = checkpoint["training"]["history"][-1]
    for c in (0, 1):
        both = ((found == c) & (true == c)).sum().item()
        either = ((found == c) | (true == c)).sum().item()
        assert np.isclose(row[f"iou/{c}"], both / either)
        assert np.isclose(row[f"dice/{c}"], 2 * both / (either + both))
