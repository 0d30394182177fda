"""Images and masks in files: read whole or by windows, written whole or not at all."""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .files import whole_file
from .pixels import SUFFIXES as SUFFIXES
from .pixels import open_source

SIDE = 256  # of the tiles that are written
# Okabe and Ito's, which the colour-blind tell apart: of classes 1, 2, ...
COLOURS = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")


def read_image(path: str | os.PathLike) -> Tensor:
    """The whole of an image, as ``ImageFile`` gives it: [C, H, W] float32."""
    with ImageFile(path) as image:
        return image[:, :, :]


def read_mask(path: str | os.PathLike) -> Tensor:
    """A mask of integers: [H, W] int64, the values as stored, of a palette the indices.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, has more than one channel or other values than integers.
    """
    with ImageFile(path, "mask") as mask:
        return torch.from_numpy(mask.pixels(slice(None), slice(None))[0].astype(np.int64))


class ImageFile:
    """An image in a file, of which windows can be read: ``image[:, top:bottom, left:right]``.

    A window is a [C, h, w] float32 tensor. Integers are scaled to 0..1 by their type's range,
    floating-point values are as stored. Of a NPY, an uncompressed TIFF, or one in tiles or strips,
    only the window is read; a PNG, a JPEG, a GIF or a TIFF in one compressed piece is decoded as a
    whole, once.

    Channels: an alpha channel of a PNG is left out, a palette becomes RGB; all samples, or all
    pages, of a TIFF's first series are channels; a NPY is [H, W], [C, H, W] or [H, W, C], where
    the shorter of the first and last dimension holds the channels (of two equal ones the first).
    A GIF is RGB, and must have one frame. EXIF orientation is applied.

    Args:
        path: of a .png, .jpg, .jpeg, .gif, .tif, .tiff or .npy file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is empty or no image; on reading, also for a window with
            values that are not finite.
    """

    def __init__(self, path: str | os.PathLike, what: str = "image"):
        self.path, self.what = os.fsdecode(path), what
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"{self} is not a file")
        with self.reading():
            self.source = open_source(self.path, labels=what == "mask")
        planes, height, width, samples = self.source.layout
        self.shape = (planes * samples, height, width)
        self.dtype = self.source.dtype
        integer = self.dtype.kind in "bui"
        if min(self.shape) < 1:
            raise ValueError(f"{self} must have pixels, got {list(self.shape)}")
        if what == "mask":
            if self.shape[0] != 1:
                raise ValueError(f"{self} must have one channel, got {self.shape[0]}")
            if not integer:
                raise ValueError(f"{self} must be of integers, got {self.dtype}")
        elif not (self.dtype.kind == "f" or (integer and self.dtype.itemsize <= 2)):
            raise ValueError(
                f"{self} must be of 8- or 16-bit integers or of floating-point numbers, "
                f"got {self.dtype}"
            )

    def __str__(self) -> str:
        return f"{self.what} {self.path!r}"

    def __enter__(self) -> "ImageFile":
        return self

    def __exit__(self, *error) -> None:
        self.source.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # decoders raise whatever damaged bytes lead them to
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{self} cannot be read: {reason}") from error

    def pixels(self, rows: slice, columns: slice) -> NDArray:
        """A window of the values as stored: [C, h, w]."""
        _, height, width = self.shape
        y, x = rows.indices(height), columns.indices(width)
        with self.reading():
            window = self.source.read(slice(*y), slice(*x))
            planes, h, w, samples = window.shape
            return window.transpose(0, 3, 1, 2).reshape(planes * samples, h, w)

    def __getitem__(self, window: tuple[slice, slice, slice]) -> Tensor:
        channels, rows, columns = window
        values = self.pixels(rows, columns)[channels]
        if self.dtype.kind == "b":
            scaled = values.astype(np.float32)
        elif self.dtype.kind == "f":
            with np.errstate(over="ignore"):
                scaled = values.astype(np.float32)
            if not np.isfinite(scaled).all():
                raise ValueError(f"{self} must have finite float32 values, got NaN or infinite")
        else:
            least, most = np.iinfo(self.dtype).min, np.iinfo(self.dtype).max
            scaled = values.astype(np.float32)
            scaled -= least
            scaled /= most - least
        return torch.from_numpy(np.ascontiguousarray(scaled))


def write_mask(path: str | os.PathLike, mask: Tensor) -> None:
    """Writes a mask as a PNG or a compressed TIFF, by the suffix, whole or not at all.

    Args:
        path: of a .png, .tif or .tiff file.
        mask: [H, W] integers in 0..65535, stored in 8 bits where they fit, in 16 otherwise.

    Raises:
        ValueError: the mask is not one, or the suffix is another.
        OSError: the folder cannot be written to, or the disk is full.
    """
    if mask.dim() != 2 or mask.numel() == 0 or mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"a mask must be [H, W] of integers, got {described(mask)}")
    least, most = (int(bound) for bound in mask.to(torch.int64).aminmax())
    if least < 0:
        raise ValueError(f"a mask's values must be in 0..65535, got {least}")
    array = mask[None].cpu().numpy().astype(mask_type(most))
    write_bands(path, [array], array.shape, array.dtype)


def mask_type(most: int) -> np.dtype:
    """What stores a mask with values up to this."""
    if most > 65535:
        raise ValueError(f"a mask's values must be in 0..65535, got {most}")
    return np.dtype(np.uint8 if most < 256 else np.uint16)


def write_bands(
    path: str | os.PathLike,
    bands: Iterable[NDArray],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> None:
    """Writes rows of an image as they come, whole or not at all.

    Args:
        path: of a .tif or .tiff, compressed in tiles, of which only a row is in memory; or of a
            .png, which is held until it is complete.
        bands: [C, h, W] from top to bottom, ``h`` of any size; C is 1 or 3 (RGB).
        shape: [C, H, W] in all.
        dtype: of the bands, 8- or 16-bit unsigned integers.

    Raises:
        ValueError: the suffix is another, or the bands do not make up the height.
        OSError: the folder cannot be written to, or the disk is full.
    """
    channels, height, width = shape
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        whole = np.concatenate([*bands], axis=1)
        with whole_file(path) as file:
            picture = whole[0] if channels == 1 else whole.transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG")
        return
    if suffix not in (".tif", ".tiff"):
        raise ValueError(f"the name must end in .png, .tif or .tiff, got {os.fsdecode(path)!r}")
    with (
        whole_file(path) as file,
        # 64-bit offsets, in case that compression does not help
        tifffile.TiffWriter(file, bigtiff=math.prod(shape) > 2**30) as writer,
    ):
        writer.write(
            tiles(bands, height),
            shape=(height, width, 3) if channels == 3 else (height, width),
            dtype=dtype,
            tile=(SIDE, SIDE),
            photometric="rgb" if channels == 3 else "minisblack",
            compression="zlib",
            maxworkers=1,  # more would hold many tiles that wait
        )


def tiles(bands: Iterable[NDArray], height: int) -> Iterator[NDArray]:
    """Bands cut into tiles, row by row: [SIDE, SIDE] or [SIDE, SIDE, C] each."""
    rows: NDArray | None = None  # that are not cut yet
    given = cut = 0
    for band in bands:
        given += band.shape[1]
        rows = band if rows is None else np.concatenate([rows, band], axis=1)
        while given - cut >= SIDE or (given == height and cut < height):
            for left in range(0, rows.shape[2], SIDE):
                part = rows[:, :SIDE, left : left + SIDE]
                tile = np.zeros((len(part), SIDE, SIDE), part.dtype)
                tile[:, : part.shape[1], : part.shape[2]] = part
                yield tile[0] if len(tile) == 1 else np.ascontiguousarray(tile.transpose(1, 2, 0))
            cut += SIDE
            rows = rows[:, SIDE:]
    if given != height:
        raise ValueError(f"the bands must have {height} rows in all, got {given}")


def overlay(
    image: Tensor,
    mask: Tensor,
    opacity: float = 0.5,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """The image with each class but 0 in a colour of its own: [3, H, W] uint8.

    Args:
        image: [C, H, W] floating-point: the first three channels are shown, or the first as grey.
        mask: [H, W] integers; beyond class 7 colours repeat.
        opacity: of the colours, 0..1.
        limits: the values shown black and white; by default those of ``contrast``.

    Raises:
        ValueError: the image and the mask are not of one size.
    """
    if image.dim() != 3 or mask.shape != image.shape[1:]:
        raise ValueError(
            f"image and mask must be [C, H, W] and [H, W], got {described(image)} "
            f"and {described(mask)}"
        )
    low, high = limits or contrast(image)
    shown = image[:3] if image.size(0) >= 3 else image[:1].expand(3, -1, -1)
    shown = ((shown.float().cpu() - low) / (high - low)).clamp(0, 1) * 255
    colours = torch.tensor([[*bytes.fromhex(colour)] for colour in COLOURS]).float()
    mask = mask.cpu().long()
    colour = colours[(mask - 1) % len(COLOURS)].permute(2, 0, 1)
    mixed = torch.where(mask == 0, shown, shown.lerp(colour, opacity))
    return mixed.round().to(torch.uint8)


def contrast(image: Tensor) -> tuple[float, float]:
    """What to show black and white: nearly the least and the greatest value, or 0 and 1."""
    values = image[:3].flatten()
    values = values[:: max(values.numel() // 100_000, 1)].float().cpu()
    low, high = values.quantile(torch.tensor([0.002, 0.998])).tolist()
    return (low, high) if low < high else (0.0, 1.0)


def described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}".replace("torch.", "")
