"""What the kernels share: sources of maps, tiles of pixels, and the pending work.

Maps are channels_last and without gaps between pixels: pixel p of image n of an h x w map begins at
element ``(n * h * w + p) * pixel``. Kernels get sizes as arguments that are never specialised, so
nothing recompiles for another batch or image.
"""

import contextvars
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet import backends
from fastunet.activation import Activation
from fastunet.maps import channel_adjacent


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


_ahead = contextvars.ContextVar("ahead", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable:
    """``kernel[grid]``; on a machine that is only assumed, and where kernels are compiled ahead,
    nothing is launched."""
    if backends.elsewhere():
        return backends.do_nothing
    return functools.partial(kernel.warmup, grid=grid) if _ahead.get() else kernel[grid]


def compile_ahead(work: Callable[[], Any]) -> None:
    """Compiles the kernels that the work would launch, several at a time, and launches none.

    What does not compile raises only where it is launched.
    """
    if triton.knobs.runtime.interpret:
        return
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def compile() -> None:
        _ahead.set(True)
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            work()

    try:
        # In a context of its own: Triton's mode would stay where an interrupt comes as it ends.
        contextvars.copy_context().run(compile)
    finally:
        pool.shutdown(cancel_futures=True)


def address(t: Tensor) -> int:
    return 0 if backends.elsewhere() else t.data_ptr()


def aligned(*sizes: int) -> int | None:
    return None if any(size % 8 for size in sizes) else 1


def dense_map(x: Tensor) -> Tensor:
    """x, or a copy, with adjacent channels and pixels that are evenly spaced throughout."""
    x = channel_adjacent(x)
    n, _, h, w = x.shape
    strides = x.stride(0), x.stride(2), x.stride(3)
    pixel = pixel_stride(x)
    dense = h * w * pixel, w * pixel, pixel
    for size, stride, expected in zip((n, h, w), strides, dense, strict=True):
        if size > 1 and stride != expected:
            return x.contiguous(memory_format=torch.channels_last)
    return x


def pixel_stride(x: Tensor) -> int:
    """Elements between pixels of a dense map; strides of a single index mean nothing."""
    n, c, h, w = x.shape
    if w > 1:
        return x.stride(3)
    if h > 1:
        return x.stride(2)
    return x.stride(0) // (h * w) if n > 1 else c


def source_of(activation: Activation) -> Source:
    y, center, scale, shift, slope = activation[:5]
    if scale is None:
        return as_source(y)
    assert center is not None
    assert shift is not None
    return as_source(y)._replace(
        center=center.contiguous(),
        scale=scale.contiguous(),
        shift=shift.contiguous(),
        row=0 if scale.size(0) == 1 else scale.size(1),
        slope=slope,
    )


def as_source(x: Tensor) -> Source:
    """A plain map."""
    x = dense_map(x)
    pixel, channels = pixel_stride(x), x.size(1)
    return Source(x, pixel, channels, aligned=aligned(pixel, channels))


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
        z = pending(source, n, y.to(tl.float32), c)
        y = tl.where(inside[:, None], z, 0.0).to(source.y.dtype.element_ty)
    return y


@triton.jit
def pending(source, n, y, c):
    """z of y, both fp32."""
    if source.scale is not None:
        center, scale, shift = row_of(source, n, c)
        y = activate(scale * (y - center) + shift, source.slope)
    return y


@triton.jit
def pending_bwd(source, n, y, inside, c, dz):
    """dy, and the terms of dscale and dshift, from dz; all fp32. The source has an affine."""
    center, scale, shift = row_of(source, n, c)
    deviation = y - center
    g = activate_bwd(dz, scale * deviation + shift, source.slope)
    g = tl.where(inside[:, None], g, 0.0)
    return scale * g, g * deviation, g


@triton.jit
def write(out, base, offset, inside, c, values):
    """To a map, given as a source, which may be wider than what is written."""
    pixel, channels = out.pixel, out.channels
    if out.aligned is not None:
        pixel, channels = pixel // 8 * 8, channels // 8 * 8
    mask = inside[:, None] & (c < channels)[None, :]
    at = (offset * pixel)[:, None] + c[None, :]
    tl.store(out.y + base * pixel + at, values.to(out.y.dtype.element_ty), mask=mask)


@triton.jit
def block_of(channels, BC: tl.constexpr):
    """This program's channels, and its number among those that have the same; programs that touch
    the same pixels follow each other."""
    blocks = tl.cdiv(channels, BC)
    return tl.program_id(0) % blocks * BC + tl.arange(0, BC), tl.program_id(0) // blocks


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
