"""What is in an image file, in the file's own order: whole, mapped, or by tiles and strips.

PNG, JPEG and GIF through Pillow, TIFF through tifffile, NPY through numpy.
"""

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".npy")
PILLOW = ("PNG", "JPEG", "GIF")  # what it may take a file for

Layout = tuple[int, int, int, int]  # planes, height, width, samples: planes * samples channels


class Source(Protocol):
    """What is in a file, in the file's own order."""

    layout: Layout
    dtype: np.dtype

    def read(self, rows: slice, columns: slice) -> NDArray: ...  # [planes, h, w, samples]

    def close(self) -> None: ...


def open_source(path: str, labels: bool) -> Source:
    suffix = Path(path).suffix.lower()
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty")
    if suffix == ".npy":
        return Mapped(lambda: with_planes(np.lib.format.open_memmap(path, mode="r")))
    if suffix in (".tif", ".tiff"):
        return open_tiff(path, labels)
    if suffix in (".png", ".jpg", ".jpeg", ".gif"):
        return Picture(path, labels)
    raise ValueError(f"its name must end in {', '.join(SUFFIXES)}")


def with_planes(array: NDArray) -> NDArray:
    """[H, W], [C, H, W] or [H, W, C] as [planes, H, W, samples]."""
    if array.ndim == 2:
        return array[None, :, :, None]
    if array.ndim == 3:
        return array[..., None] if array.shape[0] <= array.shape[2] else array[None]
    raise ValueError(f"its shape must be [H, W], [C, H, W] or [H, W, C], got {list(array.shape)}")


class Mapped:
    """Pixels that lie in a file as they are.

    Mapped anew for each window, so that what was read does not stay in the process's memory.
    """

    def __init__(self, map_file: Callable[[], NDArray]):
        self.map_file = map_file
        array = map_file()
        self.layout, self.dtype = array.shape, array.dtype

    def read(self, rows: slice, columns: slice) -> NDArray:
        return np.array(self.map_file()[:, rows, columns])

    def close(self) -> None:
        pass


class Picture:
    """A PNG, JPEG or GIF: its size is known at once, its pixels when the first are asked for."""

    def __init__(self, path: str, labels: bool):
        self.path, self.labels = path, labels
        self.array: NDArray | None = None
        with Image.open(path, formats=PILLOW) as picture:
            if picture.format == "GIF" and (frames := getattr(picture, "n_frames", 1)) > 1:
                raise ValueError(f"it must be one frame, got {frames}")
            # Of some palettes of a GIF, Pillow says that they are greys; not of all such.
            self.rgb = picture.format == "GIF" and not labels
            # Turning and converting one pixel tells what becomes of all.
            probe = self.converted(Image.new(picture.mode, (1, 1)))
            # Of a PNG, Pillow would decode all to find what may stand behind the pixels.
            self.exif = picture.format != "PNG" or "exif" in picture.info
            turned = self.exif and picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = picture.size[::-1] if turned else picture.size
        self.layout = (1, height, width, probe.shape[2])
        self.dtype = probe.dtype

    def converted(self, picture: Image.Image) -> NDArray:
        """[H, W, C]"""
        mode = picture.mode
        if self.rgb:
            array = np.asarray(picture.convert("RGB"))
        elif mode == "I":  # how Pillow has had 16-bit greys
            array = np.asarray(picture).astype(np.uint16)
        elif mode in ("1", "L", "RGB") or mode.startswith("I;16") or (self.labels and mode == "P"):
            array = np.asarray(picture)
        else:
            array = np.asarray(picture.convert("L" if mode in ("LA", "La") else "RGB"))
        return array if array.ndim == 3 else array[..., None]

    def read(self, rows: slice, columns: slice) -> NDArray:
        if self.array is None:
            with Image.open(self.path, formats=PILLOW) as picture:
                upright = ImageOps.exif_transpose(picture) if self.exif else picture
                self.array = self.converted(upright)[None]
        return self.array[:, rows, columns]

    def close(self) -> None:
        self.array = None


def open_tiff(path: str, labels: bool) -> Source:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tifffile.TiffFile(path))
        series = file.series[0].levels[0]
        page = series.keyframe
        height, width = page.imagelength, page.imagewidth
        samples = page.samplesperpixel if page.planarconfig == 1 else 1
        planes, rest = divmod(math.prod(series.shape), max(height * width * samples, 1))
        lengths = dict(zip(series.axes, series.shape, strict=True))
        if rest or any(n > 1 for axis, n in lengths.items() if axis not in "YXSCQI"):
            raise ValueError(f"it must be one image of channels, got {lengths}")
        colours = page.colormap if page.photometric == 3 and not labels else None
        unmarked = series.axes == "QYX" and series.shape[0] > series.shape[2]  # [H, W, C]
        layout: Layout = (planes, height, width, samples)
        if unmarked:
            layout = (1, planes, height, width)
        if series.dataoffset is not None and colours is None:
            dtype = series.dtype.newbyteorder(file.byteorder)
            offset = series.dataoffset
            return Mapped(lambda: np.memmap(path, dtype, "r", offset, layout))
        segments = TiffSegments(file, series, (planes, height, width, samples), colours)
        if unmarked:
            array = segments.read(slice(0, height), slice(0, width)).reshape(layout)
            return Mapped(lambda: array)
        stack.pop_all()
        return segments


class TiffSegments:
    """The tiles or strips of a TIFF, decoded when a window first needs them.

    Those in the rows last asked for are kept: a window beside the one before decodes only what is
    new, and memory stays that of a band of the image.
    """

    def __init__(
        self,
        file: tifffile.TiffFile,
        series: tifffile.TiffPageSeries,
        layout: Layout,
        colours: NDArray | None,
    ):
        self.file, self.page, self.colours = file, series.keyframe, colours
        self.planes, _, _, samples = layout
        self.layout = (*layout[:3], samples if colours is None else len(colours))
        self.dtype = np.dtype(self.page.dtype if colours is None else colours.dtype)
        self.per_page = self.page.samplesperpixel if self.page.planarconfig == 2 else 1
        self.size = self.page.chunks[:2]  # rows and columns of a segment
        self.across = math.ceil(layout[2] / self.size[1])
        self.down = math.ceil(layout[1] / self.size[0])
        self.kept: dict[tuple[int, int, int], NDArray] = {}
        self.check(series)
        # of each page, where its segments are
        self.places = [(page.dataoffsets, page.databytecounts) for page in series.pages if page]
        self.jpeg = {}
        if self.page.compression in (6, 7, 33007, 34892):
            self.jpeg = {"jpegtables": self.page.jpegtables, "jpegheader": self.page.jpegheader}

    def check(self, series: tifffile.TiffPageSeries) -> None:
        """A damaged header could ask for any amount of memory."""
        most = self.per_page * self.down * self.across
        length = self.file.filehandle.size
        itemsize = np.dtype(self.page.dtype).itemsize
        decoded = math.prod(self.size) * self.layout[3] * itemsize
        for page in series.pages:
            if page is None or len(page.dataoffsets) != most or len(page.databytecounts) != most:
                raise ValueError(f"it must have {most} tiles or strips on each page")
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                if offset + count > length:
                    raise ValueError("it is truncated")
                if decoded > 2**26 and count and decoded > 2**11 * count:
                    raise ValueError(f"{count} bytes cannot hold {decoded} bytes of pixels")

    def read(self, rows: slice, columns: slice) -> NDArray:
        height, width = max(rows.stop - rows.start, 0), max(columns.stop - columns.start, 0)
        window = np.empty((self.planes, height, width, self.layout[3]), self.dtype)
        if not window.size:
            return window
        (h, w) = self.size
        down = range(rows.start // h, (rows.stop - 1) // h + 1)
        self.kept = {key: segment for key, segment in self.kept.items() if key[1] in down}
        for plane in range(self.planes):
            for i in down:
                for j in range(columns.start // w, (columns.stop - 1) // w + 1):
                    top, left = max(i * h, rows.start), max(j * w, columns.start)
                    part = self.segment(plane, i, j)[
                        top - i * h : rows.stop - i * h, left - j * w : columns.stop - j * w
                    ]
                    y, x = top - rows.start, left - columns.start
                    window[plane, y : y + part.shape[0], x : x + part.shape[1]] = part
        return window

    def segment(self, plane: int, i: int, j: int) -> NDArray:
        """[h, w, samples], less at the image's ends."""
        key = (plane, i, j)
        if key not in self.kept:
            page, plane = divmod(plane, self.per_page)
            index = (plane * self.down + i) * self.across + j
            offsets, counts = self.places[page]
            data = None  # left out: all of it is what the header says
            if counts[index]:
                self.file.filehandle.seek(offsets[index])
                data = self.file.filehandle.read(counts[index])
            segment, _, shape = self.page.decode(data, index, _fullsize=False, **self.jpeg)
            if segment is None:
                segment = np.full(shape, self.page.nodata, self.page.dtype)
            segment = segment[0]
            if self.colours is not None:
                segment = self.colours[:, segment[..., 0]].transpose(1, 2, 0)
            self.kept[key] = segment
        return self.kept[key]

    def close(self) -> None:
        self.file.close()
