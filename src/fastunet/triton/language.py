"""What the kernels share: sources of maps, tiles of pixels, and the pending work.

Maps are channels_last and without gaps between pixels: pixel p of image n of an h x w map begins at
element ``(n * h * w + p) * pixel``. Kernels get sizes as arguments that are never specialised, so
nothing recompiles for another batch or image.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Source(NamedTuple):
    """A map and its pending affine and activation, z = act(scale * (y - center) + shift).

    pixel: elements between pixels. center, scale, shift: None for a plain map; row: elements
    between their rows, 0 where one row serves all samples. aligned: 1 where pixel and channels are
    multiples of 8, else None. Triton by itself sees multiples of 16 only, and takes the word
    of ``// 8 * 8``.
    """

    y: Tensor | None
    pixel: int = 0
    channels: int = 0
    center: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    row: int = 0
    slope: float = 1.0
    aligned: int | None = None


def aligned(*sizes: int) -> int | None:
    return None if any(size % 8 for size in sizes) else 1


@triton.jit
def activate(t, slope):
    # slope * t would make NaN of 0 * -inf
    return tl.where(t < 0, tl.where(slope == 0, 0.0, slope * t), t)


@triton.jit
def activate_bwd(dz, t, slope):
    return tl.where(t <= 0, tl.where(slope == 0, 0.0, slope * dz), dz)


@triton.jit
def row_of(source, n, c):
    """center, scale, shift of sample n at channels c, each [1, len(c)]."""
    at = n * source.row + c
    known = c < source.channels
    center = tl.load(source.center + at, mask=known, other=0.0)
    scale = tl.load(source.scale + at, mask=known, other=0.0)
    shift = tl.load(source.shift + at, mask=known, other=0.0)
    return center[None, :], scale[None, :], shift[None, :]


@triton.jit
def read_raw(source, base, offset, inside, c):
    """y at pixels base + offset [M] and channels c [K]; 0 elsewhere. base is a 64-bit scalar, so
    that offsets within a tile need 32 bits only."""
    pixel, channels = source.pixel, source.channels
    if source.aligned is not None:
        pixel, channels = pixel // 8 * 8, channels // 8 * 8
    mask = inside[:, None] & (c < channels)[None, :]
    at = (offset * pixel)[:, None] + c[None, :]
    return tl.load(source.y + base * pixel + at, mask=mask, other=0.0)


@triton.jit
def read(source, n, base, offset, inside, c):
    """z, in the dtype of y; 0 outside."""
    y = read_raw(source, base, offset, inside, c)
    if source.scale is not None:
        center, scale, shift = row_of(source, n, c)
        z = activate(scale * (y.to(tl.float32) - center) + shift, source.slope)
        y = tl.where(inside[:, None], z, 0.0).to(source.y.dtype.element_ty)
    return y


@triton.jit
def write(out, channels, aligned, base, offset, inside, c, values):
    """To a map without gaps; aligned as in Source."""
    if aligned is not None:
        channels = channels // 8 * 8
    mask = inside[:, None] & (c < channels)[None, :]
    at = (offset * channels)[:, None] + c[None, :]
    tl.store(out + base * channels + at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def tile_of(index, height, width, TH: tl.constexpr, TW: tl.constexpr):
    """Sample, first row, first column; rows and columns [TH * TW] from there, and which of them
    are in the map."""
    columns = tl.cdiv(width, TW)
    tiles = tl.cdiv(height, TH) * columns
    tile = index % tiles
    h, w = tile // columns * TH, tile % columns * TW
    m = tl.arange(0, TH * TW)
    dh, dw = m // TW, m % TW
    return index // tiles, h, w, dh, dw, (h + dh < height) & (w + dw < width)


@triton.jit
def pixel_of(n, h, w, height, width):
    """Counted through the batch, 64 bits."""
    return (tl.cast(n, tl.int64) * height + h) * width + w
