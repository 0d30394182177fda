"""resample: pooling, upsampling and placement of a source, and the gradient as a gather.

Upsampling positions are exact: pixel d of the larger map lies at ``position(d) / unit`` of the
smaller one, both integers, as PyTorch's interpolate defines them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    MAX_POOL,
    NEAREST,
    NONE,
    Activation,
)
from fastunet.maps import empty_map, empty_vectors

from .language import (
    as_source,
    block_of,
    dense_map,
    launch,
    pending,
    pending_bwd,
    pixel_of,
    read_raw,
    source_of,
    write,
)

MODE_NONE: tl.constexpr = tl.constexpr(NONE)
MODE_POOL: tl.constexpr = tl.constexpr(MAX_POOL)
MODE_NEAREST: tl.constexpr = tl.constexpr(NEAREST)
MODE_BILINEAR: tl.constexpr = tl.constexpr(BILINEAR)
MODE_CORNERS: tl.constexpr = tl.constexpr(BILINEAR_ALIGN_CORNERS)


@triton.jit
def resampled(size, MODE: tl.constexpr):
    if MODE == MODE_NONE:
        return size
    elif MODE == MODE_POOL:
        return size // 2
    else:
        return size * 2


@triton.jit
def unit(size, MODE: tl.constexpr):
    """Steps of ``position`` between neighbours of the smaller map."""
    if MODE == MODE_BILINEAR:
        return 4
    elif MODE == MODE_CORNERS:
        return 2 * size - 1
    else:
        return 1


@triton.jit
def position(d, size, MODE: tl.constexpr):
    """Where pixel d of the resampled map lies in the map of this size."""
    if MODE == MODE_BILINEAR:
        return tl.minimum(tl.maximum(2 * d - 1, 0), 4 * (size - 1))
    elif MODE == MODE_CORNERS:
        return tl.cast(d, tl.int64) * (size - 1)
    elif MODE == MODE_NEAREST:
        return d // 2
    else:
        return d


@triton.jit
def first_reader(i, size, MODE: tl.constexpr):
    """The first pixel of the resampled map that pixel i has a part in."""
    if MODE == MODE_BILINEAR:
        return 2 * i - 1
    elif MODE == MODE_CORNERS:
        # d * (size - 1) > (i - 1) * (2 * size - 1)
        before = tl.cast(i - 1, tl.int64) * (2 * size - 1)
        return tl.where(i == 0, 0, (before // tl.maximum(size - 1, 1)).to(tl.int32) + 1)
    elif MODE == MODE_NEAREST:
        return 2 * i
    else:
        return i


@triton.jit
def part(d, i, size, MODE: tl.constexpr):
    """The weight of pixel i of the smaller map in pixel d of the larger one."""
    steps = unit(size, MODE)
    away = tl.abs(position(d, size, MODE) - i * tl.cast(steps, tl.int64))
    return tl.maximum(steps - away, 0).to(tl.float32) / steps


@triton.jit
def value(source, n, h, w, height, width, inside, c):
    """z in fp32, and y; h and w [P]"""
    y = read_raw(source, 0, pixel_of(n, h, w, height, width), inside, c).to(tl.float32)
    return pending(source, n, y, c), y


@triton.jit(do_not_specialize=["height", "width", "H", "W", "top", "left"])
def resample_kernel(
    source,
    height,
    width,
    out,  # as a source: where to write
    H,
    W,
    top,
    left,
    MODE: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    c, tile = block_of(source.channels, BC)
    tiles = tl.cdiv(H * W, BP)
    n, p = tile // tiles, tile % tiles * BP + tl.arange(0, BP)
    h, w = p // W - top, p % W - left
    inside = (h >= 0) & (h < resampled(height, MODE)) & (w >= 0) & (w < resampled(width, MODE))
    inside &= p < H * W
    if MODE == MODE_POOL:
        z, _ = value(source, n, 2 * h, 2 * w, height, width, inside, c)
        for i in tl.static_range(1, 4):
            other, _ = value(source, n, 2 * h + i // 2, 2 * w + i % 2, height, width, inside, c)
            z = tl.where((other > z) | (other != other), other, z)
    else:
        first_h = position(h, height, MODE) // unit(height, MODE)
        first_w = position(w, width, MODE) // unit(width, MODE)
        if MODE == MODE_NONE or MODE == MODE_NEAREST:  # noqa: SIM109
            z, _ = value(source, n, first_h, first_w, height, width, inside, c)
        else:
            z = tl.zeros((BP, BC), tl.float32)
            for i in tl.static_range(4):
                hs, ws = first_h + i // 2, first_w + i % 2
                known = inside & (hs < height) & (ws < width)
                weight = part(h, hs, height, MODE) * part(w, ws, width, MODE)
                corner, _ = value(source, n, hs, ws, height, width, known, c)
                z += tl.where(known[:, None], weight[:, None] * corner, 0.0)
    z = tl.where(inside[:, None], z, 0.0)
    write(out, 0, pixel_of(n, 0, p, H, W), p < H * W, c, z)


@triton.jit
def store_grad(source, n, h, w, height, width, inside, c, dz, y, dy):
    """Stores dy; returns the terms of dscale and dshift."""
    pixel = pixel_of(n, h, w, height, width)
    of_scale, of_shift = dz, dz  # nobody's, where there is no affine
    if source.scale is not None:
        dz, of_scale, of_shift = pending_bwd(source, n, y, inside, c, dz)
    write(dy, 0, pixel, inside, c, dz)
    return of_scale, of_shift


@triton.jit
def read_grad(dz, n, h, w, H, W, top, left, inside, c):
    """dz at pixel (h, w) before placement, fp32; 0 where that is cropped away."""
    h, w = h + top, w + left
    inside &= (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return read_raw(dz, 0, pixel_of(n, h, w, H, W), inside, c).to(tl.float32)


@triton.jit(do_not_specialize=["height", "width", "H", "W", "top", "left"])
def resample_bwd_kernel(
    source,
    height,
    width,
    dz,  # as a source
    H,
    W,
    top,
    left,
    dy,
    dscale,  # [N, tiles, C]
    dshift,
    MODE: tl.constexpr,
    READERS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    c, tile = block_of(source.channels, BC)
    # Pixels of the source, or windows of the pooling (partial ones at odd edges).
    WINDOW: tl.constexpr = 2 if MODE == MODE_POOL else 1
    rows, columns = tl.cdiv(height, WINDOW), tl.cdiv(width, WINDOW)
    tiles = tl.cdiv(rows * columns, BP)
    n, p = tile // tiles, tile % tiles * BP + tl.arange(0, BP)
    h, w = p // columns, p % columns
    inside = p < rows * columns
    if MODE == MODE_POOL:
        whole = inside & (h < height // 2) & (w < width // 2)
        grad = read_grad(dz, n, h, w, H, W, top, left, whole, c)
        best, _ = value(source, n, 2 * h, 2 * w, height, width, whole, c)
        winner = tl.zeros((BP, BC), tl.int32)
        for i in tl.static_range(1, 4):
            z, _ = value(source, n, 2 * h + i // 2, 2 * w + i % 2, height, width, whole, c)
            better = (z > best) | (z != z)
            best = tl.where(better, z, best)
            winner = tl.where(better, i, winner)
        of_scale = tl.zeros((BP, BC), tl.float32)
        of_shift = tl.zeros((BP, BC), tl.float32)
        for i in tl.static_range(4):
            hs, ws = 2 * h + i // 2, 2 * w + i % 2
            known = inside & (hs < height) & (ws < width)
            _, y = value(source, n, hs, ws, height, width, known, c)
            won = tl.where(whole[:, None] & (winner == i), grad, 0.0)
            a, b = store_grad(source, n, hs, ws, height, width, known, c, won, y, dy)
            of_scale += a
            of_shift += b
    else:
        first_h, first_w = first_reader(h, height, MODE), first_reader(w, width, MODE)
        last_h, last_w = resampled(height, MODE), resampled(width, MODE)
        total = tl.zeros((BP, BC), tl.float32)
        for i in range(READERS):
            hd = first_h + i
            in_row = inside & (hd >= 0) & (hd < last_h)
            of_row = part(hd, h, height, MODE)
            for j in tl.static_range(READERS):
                wd = first_w + j
                weight = of_row * part(wd, w, width, MODE)
                known = in_row & (wd >= 0) & (wd < last_w) & (weight > 0)
                grad = read_grad(dz, n, hd, wd, H, W, top, left, known, c)
                total += weight[:, None] * grad
        _, y = value(source, n, h, w, height, width, inside, c)
        of_scale, of_shift = store_grad(source, n, h, w, height, width, inside, c, total, y, dy)
    if source.scale is not None:
        at = tile * source.channels + c
        tl.store(dscale + at, tl.sum(of_scale, 0), mask=c < source.channels)
        tl.store(dshift + at, tl.sum(of_shift, 0), mask=c < source.channels)


# How many pixels of the larger map at most have a part of one pixel, in one dimension.
READERS = {NONE: 1, MAX_POOL: 1, NEAREST: 2, BILINEAR: 4, BILINEAR_ALIGN_CORNERS: 5}


class Blocks(NamedTuple):
    BP: int
    BC: int


def blocks(channels: int, values: int) -> Blocks:
    """Pixels and channels of a program that handles about so many values."""
    BC = min(64, triton.next_power_of_2(channels))
    if channels % 8:  # more instructions and addresses for each value
        values //= 2
    return Blocks(values // BC, BC)


def place_of(source: Activation) -> tuple[int, int]:
    """top, left of the placement: half of the margin, rounded down."""
    h, w = source.y.shape[2:]
    if source.mode == MAX_POOL:
        h, w = h // 2, w // 2
    elif source.mode != NONE:
        h, w = 2 * h, 2 * w
    return (source.size[0] - h) // 2, (source.size[1] - w) // 2


def resample(source: Activation, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = empty_map(source.y, source.y.size(1), source.size)
    if out.numel() == 0:
        return out
    n, c, h, w = out.shape
    block = blocks(c, 2048)
    grid = (n * triton.cdiv(h * w, block.BP) * triton.cdiv(c, block.BC),)
    target = dense_map(out)
    launch(resample_kernel, grid)(
        source_of(source),
        *source.y.shape[2:],
        as_source(target),
        h,
        w,
        *place_of(source),
        MODE=source.mode,
        BP=block.BP,
        BC=block.BC,
    )
    return out if target is out else out.copy_(target)


def resample_bwd(source: Activation, dz: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    n, c, h, w = source.y.shape
    dy = empty_map(source.y, c, (h, w))
    scale = source.scale
    if dy.numel() == 0:
        return dy, *zero_sums(source)
    window = 2 if source.mode == MAX_POOL else 1
    block = blocks(c, 1024)
    tiles = triton.cdiv(triton.cdiv(h, window) * triton.cdiv(w, window), block.BP)
    sums = None if scale is None else [scale.new_empty(n, tiles, c) for _ in range(2)]
    launch(resample_bwd_kernel, (n * tiles * triton.cdiv(c, block.BC),))(
        source_of(source),
        h,
        w,
        as_source(dz),
        *source.size,
        *place_of(source),
        as_source(dy),
        *(sums or (None, None)),
        MODE=source.mode,
        READERS=READERS[source.mode],
        BP=block.BP,
        BC=block.BC,
    )
    if scale is None or sums is None:
        return dy, None, None
    return dy, *add_tiles(scale, *sums)


def add_tiles(scale: Tensor, dscale: Tensor, dshift: Tensor) -> tuple[Tensor, Tensor]:
    """dscale and dshift from sums over tiles, [N, tiles, C]: those of one row of scale added up."""
    shape = scale.size(0), dscale.numel() // scale.numel(), scale.size(1)
    return dscale.view(shape).sum(1), dshift.view(shape).sum(1)


def zero_sums(source: Activation) -> tuple[Tensor | None, Tensor | None]:
    if source.scale is None:
        return None, None
    dscale, dshift = empty_vectors(source.scale)
    return dscale.zero_(), dshift.zero_()
