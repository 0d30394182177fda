"""What ``fastunet predict`` does: masks and overlays of image files, from a checkpoint."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from .checkpoints import load, load_model
from .images import SUFFIXES, ImageFile, contrast, mask_type, overlay, write_bands
from .tiling import check_tiles, predict_bands, trim_memory

# Larger masks are TIFFs: most programs, Pillow among them, refuse to open such PNGs.
PNG_PIXELS = 2**26
BAND = 64  # rows of an overlay that are made at once
PROBE = 1024  # side of the middle that an overlay's contrast is taken from


def predict_files(
    source: str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int = 1,
    overlays: bool = True,
    device: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Writes ``out/masks/NAME.png`` and ``out/overlays/NAME.png`` of an image or a folder's images.

    At the images' sizes; beyond 2**26 pixels as ``.tif``, piece by piece. A mask has the values
    that the masks of the training had. ``tile``, ``overlap`` and ``batch_size`` as of
    ``fastunet.predict``. With ``overwrite`` files of these names are replaced, but never an image
    itself.

    Returns:
        A sentence for each image whose pixels turned out to be damaged; the others are written.

    Raises:
        FileNotFoundError: there is no such image, folder or checkpoint.
        ValueError: one of the arguments or of the images' headers is not right, or a file is there
            already; nothing has been written then.
        OSError: a file cannot be written.
    """
    where = device_of(device)
    known = load(checkpoint)
    model, prepare = load_model(known)
    model = model.to(where)
    check_tiles(model.depth, tile, overlap, batch_size)
    values = known["mask_values"]
    values = torch.tensor(values if model.n_classes > 1 else [0, *values])
    dtype = mask_type(int(values.max()))
    if values.min() < 0:
        raise ValueError(f"the checkpoint's mask values must be in 0..65535, got {values.tolist()}")
    folders = ("masks", "overlays") if overlays else ("masks",)
    jobs = find_jobs(
        Path(source), [Path(out, folder) for folder in folders], model.n_channels, overwrite
    )
    pixels = sum(height * width for _, _, (_, height, width) in jobs)
    faults = []
    with tqdm(total=pixels / 1e6, unit="MP", disable=None) as progress:
        for path, name, (_, height, width) in jobs:
            done = progress.n
            try:
                with ImageFile(path) as image:
                    bands = predict_bands(
                        model,
                        image,
                        tile,
                        overlap,
                        batch_size,
                        classes=True,
                        prepare=prepare,
                    )
                    mask = Path(out, "masks", name)
                    mask.parent.mkdir(parents=True, exist_ok=True)
                    write_bands(
                        mask,
                        as_values(bands, values, dtype, progress),
                        (1, height, width),
                        dtype,
                    )
                    if overlays:
                        write_overlay(Path(out, "overlays", name), image, mask, values)
            except ValueError as fault:
                faults.append(str(fault))
            progress.update(done + height * width / 1e6 - progress.n)
    return faults


def find_jobs(
    source: Path, folders: list[Path], channels: int, overwrite: bool
) -> list[tuple[Path, str, tuple]]:
    """Each image, the name of what is written of it into the folders, and its shape.

    All headers are read.
    """
    paths = [source]
    if source.is_dir():
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(
                f"folder '{source}' must hold images ({', '.join(SUFFIXES)}), it has none"
            )
    jobs: dict[str, tuple[Path, str, tuple]] = {}
    for path in paths:
        with ImageFile(path) as image:
            shape = image.shape
        if shape[0] != channels:
            raise ValueError(
                f"{image} must have the model's n_channels = {channels} channels, got {shape[0]}"
            )
        if path.stem in jobs:
            raise ValueError(
                f"the images' names must differ in more than the suffix, "
                f"got '{jobs[path.stem][0]}' and '{path}'"
            )
        name = f"{path.stem}{'.png' if shape[1] * shape[2] <= PNG_PIXELS else '.tif'}"
        for file in (folder / name for folder in folders):
            if not file.exists():
                continue
            if file.samefile(path):
                raise ValueError(f"out must not be where it would replace the image '{path}'")
            if not overwrite:
                raise ValueError(f"out must not hold '{file}' yet: pass --overwrite to replace it")
        jobs[path.stem] = (path, name, shape)
    return [*jobs.values()]


def as_values(
    bands: Iterator[Tensor], values: Tensor, dtype: np.dtype, progress: tqdm
) -> Iterator[NDArray]:
    """Classes [h, W] as the values of a mask file, [1, h, W]."""
    for band in bands:
        yield values[band][None].numpy().astype(dtype)
        progress.update(band.numel() / 1e6)


def write_overlay(path: Path, image: ImageFile, mask: Path, values: Tensor) -> None:
    _, height, width = image.shape
    top, left = max(height - PROBE, 0) // 2, max(width - PROBE, 0) // 2
    limits = contrast(image[:, top : top + PROBE, left : left + PROBE])
    classes = torch.zeros(65536, dtype=torch.int64)
    classes[values] = torch.arange(len(values))

    def bands() -> Iterator[NDArray]:
        with ImageFile(mask, "mask") as found:
            for top in range(0, height, BAND):
                rows, columns = slice(top, top + BAND), slice(None)
                band = classes[torch.from_numpy(found.pixels(rows, columns)[0].astype(np.int64))]
                yield overlay(image[:, rows, columns], band, limits=limits).numpy()
                trim_memory()

    path.parent.mkdir(parents=True, exist_ok=True)
    write_bands(path, bands(), (3, height, width), np.dtype(np.uint8))


def device_of(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that is there, got {name!r}: {reason}") from None
    return device
