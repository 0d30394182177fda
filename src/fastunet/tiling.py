"""Prediction of whole images, and by tiles of such as are larger than memory.

Tiles begin at multiples of 2**depth, so that pooling sees the same blocks as in the whole image,
and end where the image ends, so that its border is theirs. Where two of them overlap, a pixel takes
the logits of the tile that sees more around it; in the middle eighth of the overlap, a smooth
mixture of both. So the outermost 7/16 of an overlap are never used.
"""

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .reference import UNet
from .reference.unet import is_per_channel
from .weights import unwrap

# A logit sees at most 7 * 2**depth - 5 pixels to each side, and an overlap's outermost 7/16 are not
# used: with an overlap of this many times 2**depth, tiles equal the whole.
OVERLAP = 16
TILE = 768  # side of a tile on the command line and in validation, in pixels
BAND = 64  # rows at most that are given at once
MIXED = 8  # one part in so many of an overlap is mixed


def predict(
    model: nn.Module,
    image: Any,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int = 1,
    *,
    classes: bool = False,
    prepare: Callable[[Tensor], Tensor] | None = None,
    out: Any = None,
) -> Any:
    """The logits of an image of any size, by tiles if it is large.

    Without ``tile`` they are ``model(image)`` in evaluation mode; an image below 2**depth is first
    reflected to that size. With it they are the same up to rounding for each pixel whose tiles
    reach 7 * 2**depth pixels around it, or to the image's end: for all if ``overlap`` is at least
    16 * 2**depth. That holds with transposed upsampling and BatchNorm or no norm. Otherwise a logit
    depends on all of its tile, through the statistics of instance and group norms or the positions
    of bilinear upsampling (align_corners), and is close only.

    The model is run in inference mode, on its device and in its dtype, under the caller's autocast;
    afterwards every module is in the mode it was in.

    Args:
        model: a UNet or FastUNet, also wrapped (``torch.compile``, data parallelism).
        image: [C, H, W] or [N, C, H, W], floating-point: a tensor, a NumPy array or memory map, or
            a ``fastunet.images.ImageFile``, of which only windows are read.
        tile: height and width of a tile in pixels, at least 2 * 2**depth; rounded up to a multiple
            of 2**depth. None: the whole image at once.
        overlap: of two neighbouring tiles, in pixels, at most half a tile; rounded up likewise.
            None: 16 * 2**depth, but at most a third of a tile.
        batch_size: tiles that the model takes at once.
        classes: return the class of each pixel instead of the logits: the greatest logit's, and of
            a single logit whether it is above 0.
        prepare: applied to what the model gets, [n, C, h, w], for instance a normalisation.
        out: an array or tensor to write to by ``out[..., top:bottom, :] = rows``, such as a memory
            map: then memory is that of a row of tiles, whatever the image's height.

    Returns:
        [K, H, W] or [N, K, H, W] in the dtype of the model's logits, or with ``classes`` [H, W] or
        [N, H, W] int64; a tensor on the image's device (an array's is the CPU), or ``out``.

    Raises:
        ValueError: an argument is not as above.
    """
    bands = predict_bands(model, image, tile, overlap, batch_size, classes=classes, prepare=prepare)
    height, width = image.shape[-2:]
    top = 0
    for band in bands:
        if out is None:
            out = band.new_empty((*band.shape[:-2], height, width))
        elif top == 0 and tuple(out.shape) != (size := (*band.shape[:-2], height, width)):
            raise ValueError(f"out must have the shape {[*size]}, got {[*out.shape]}")
        bottom = top + band.shape[-2]
        out[..., top:bottom, :] = band if isinstance(out, Tensor) else band.cpu().numpy()
        top = bottom
    return out


def predict_bands(
    model: nn.Module,
    image: Any,
    tile: int | None = None,
    overlap: int | None = None,
    batch_size: int = 1,
    *,
    classes: bool = False,
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """What ``predict`` returns, in bands of rows from top to bottom: [..., h, W] each.

    Held are the rows of one row of tiles. The model is in evaluation mode until the last band.
    """
    unet = unwrap(model)
    if not isinstance(unet, UNet):
        raise ValueError(f"the model must be a UNet or FastUNet, got {type(unet).__name__}")
    check_image(unet, image)
    check_tiles(unet.depth, tile, overlap, batch_size)
    tile, overlap = tile_and_overlap(2**unet.depth, max(image.shape[-2:]), tile, overlap)
    logits = rows_of_logits(model, unet, image, tile, overlap, batch_size, prepare)
    return map(class_of, logits) if classes else logits


def rows_of_logits(
    model: nn.Module,
    unet: UNet,
    image: Any,
    tile: int,
    overlap: int,
    batch_size: int,
    prepare: Callable[[Tensor], Tensor] | None,
) -> Iterator[Tensor]:
    *batch, _, height, width = image.shape
    down = parts(height, tile, overlap, 2**unet.depth)
    across = parts(width, tile, overlap, 2**unet.depth)
    device = image.device if isinstance(image, Tensor) else torch.device("cpu")
    jobs = [(n, part) for part in across for n in range(*batch or [1])]
    rows = None  # [N, K, h, W] of a row of tiles
    with evaluating(model):
        for row in down:
            if rows is not None:
                rows[..., row.before :, :] = 0
            for _, same in groupby(jobs, key=lambda job: job[1].stop - job[1].start):
                for some in split([*same], batch_size):
                    patches = [window(image, n, row, part, unet) for n, part in some]
                    logits = run(model, torch.stack(patches), unet, prepare)
                    exact = torch.promote_types(logits.dtype, torch.float32)
                    if rows is None:
                        most = max(row.last - row.first for row in down)
                        size = (*(batch or [1]), logits.size(1), most, width)
                        rows = torch.zeros(size, dtype=exact, device=device)
                    for (n, part), found in zip(some, logits.to(device, exact), strict=True):
                        found = part.used(row.used(found, -2), -1)
                        weight = row.weight(found)[:, None] * part.weight(found)
                        there = rows[n, :, : row.last - row.first, part.first : part.last]
                        there += found * weight
                    trim_memory()
            assert rows is not None
            final = row.last - row.first - row.after  # the others are begun by this row of tiles
            for finished in rows[..., :final, :].split(BAND, -2):
                finished = finished.to(logits.dtype, copy=True)
                yield finished if batch else finished[0]
            rows[..., : row.after, :] = rows[..., final : final + row.after, :].clone()


@torch.inference_mode()
def run(model: nn.Module, x: Tensor, unet: UNet, prepare: Callable | None) -> Tensor:
    like = next(unet.parameters())
    x = x.to(like.device, like.dtype)
    return model(x if prepare is None else prepare(x))


def window(image: Any, n: int, row: "Part", part: "Part", unet: UNet) -> Tensor:
    """[C, h, w] of the n-th image, reflected to what the model takes at least."""
    found = read(image, n, slice(row.start, row.stop), slice(part.start, part.stop))
    least = 2**unet.depth
    alone = any(map(is_per_channel, unet.downs[-1].modules()))
    if alone and max(found.shape[1:]) < 2 * least:
        least *= 2
    for dim in (1, 2):
        if (length := found.size(dim)) < least:
            index = torch.arange(least, device=found.device) % max(2 * (length - 1), 1)
            found = found.index_select(dim, torch.minimum(index, 2 * (length - 1) - index))
    return found


def read(image: Any, n: int, rows: slice, columns: slice) -> Tensor:
    found = image[:, rows, columns] if len(image.shape) == 3 else image[n, :, rows, columns]
    return found if isinstance(found, Tensor) else torch.tensor(found)


class Part(NamedTuple):
    """A tile's pixels along one axis, and which of its logits are used, with what weight."""

    start: int
    stop: int
    first: int  # of those used
    last: int
    before: int  # of those, how many are mixed with the tile before, at the beginning
    after: int  # and with the one after, at the end

    def used(self, logits: Tensor, dim: int) -> Tensor:
        return logits.narrow(dim, self.first - self.start, self.last - self.first)

    def weight(self, like: Tensor) -> Tensor:
        weight = like.new_ones(self.last - self.first)
        weight[: self.before] = rising(self.before, like)
        if self.after:
            weight[-self.after :] = 1 - rising(self.after, like)
        return weight


def rising(length: int, like: Tensor) -> Tensor:
    """From 0 to 1, smoothly."""
    t = (torch.arange(length, dtype=like.dtype, device=like.device) + 0.5) / max(length, 1)
    return t * t * (3 - 2 * t)


def parts(length: int, tile: int, overlap: int, multiple: int) -> list[Part]:
    """Tiles along an axis: as few as overlap enough, evenly spread, at multiples."""
    span = max(-(-length // multiple) * multiple - tile, 0)  # from the first start to the last
    steps = -(-span // (tile - overlap))
    starts = [span * i // (steps * multiple) * multiple for i in range(steps)] + [span]
    seams = []
    for start, following in pairwise(starts):
        both = start + tile - following
        mixed = both // MIXED
        first = following + (both - mixed) // 2
        seams.append((first, first + mixed))
    bounds = [(0, 0), *seams, (length, length)]
    return [
        Part(start, min(start + tile, length), before[0], after[1],
             before[1] - before[0], after[1] - after[0])
        for start, before, after in zip(starts, bounds, bounds[1:], strict=False)
    ]  # fmt: skip


def check_tiles(depth: int, tile: int | None, overlap: int | None, batch_size: int) -> None:
    least = 2 * 2**depth
    if tile is not None and not (is_count(tile) and tile >= least):
        raise ValueError(
            f"tile must be an integer of at least 2 * 2**depth = {least}, got {tile!r}"
        )
    if overlap is not None:
        if not isinstance(overlap, int) or isinstance(overlap, bool) or overlap < 0:
            raise ValueError(f"overlap must be an integer of at least 0, got {overlap!r}")
        if tile is not None and overlap > tile // 2:
            raise ValueError(
                f"overlap must be at most half of a tile, {tile // 2}, got {overlap!r}"
            )
    if not is_count(batch_size):
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")


def tile_and_overlap(
    multiple: int, size: int, tile: int | None, overlap: int | None
) -> tuple[int, int]:
    """Both as multiples of 2**depth."""
    if tile is None:
        return -(-size // multiple) * multiple, 0
    if overlap is None:
        overlap = min(OVERLAP * multiple, tile // 3)
    # Rounded up, but not beyond half of a tile, of which the multiple may be an odd one.
    whole = -(-tile // multiple)
    return whole * multiple, min(-(-overlap // multiple), whole // 2) * multiple


def check_image(unet: UNet, image: Any) -> None:
    shape: Sequence[int] = getattr(image, "shape", ())
    if len(shape) not in (3, 4) or min(shape) < 1:
        got = [*shape] or type(image).__name__
        raise ValueError(f"the image must be [C, H, W] or [N, C, H, W], none of them 0, got {got}")
    if shape[-3] != unet.n_channels:
        raise ValueError(
            f"the image must have n_channels = {unet.n_channels} channels, got {shape[-3]}"
        )
    pixel = read(image, 0, slice(0, 1), slice(0, 1))
    if not pixel.is_floating_point():
        raise ValueError(
            f"the image must be floating-point, as fastunet.images.read_image scales it, "
            f"got {pixel.dtype}"
        )
    if len(devices := {p.device for p in (*unet.parameters(), *unet.buffers())}) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the model must be on one device, got {names}")


def class_of(logits: Tensor) -> Tensor:
    """[..., K, h, w] -> [..., h, w]"""
    return (logits.squeeze(-3) > 0).long() if logits.size(-3) == 1 else logits.argmax(-3)


def trim_memory() -> None:
    """glibc keeps what is freed in pieces below 32 MB, and more of it with each tile; what is kept
    for the next tile's maps stays."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def split(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
