"""Statistics of a convolution's output, from the parts that tiles of pixels leave.

Parts are merged in the pairwise form of Chan, Golub, LeVeque (1979), in an order that depends on
the shape alone: the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import launch


class Parts(NamedTuple):
    """Per tile of pixels: how many there are, [tiles], and the mean and the sum of squared
    deviations of each channel, [tiles, C]; fp32."""

    pixels: Tensor | None = None
    mean: Tensor | None = None
    m2: Tensor | None = None


def empty_parts(like: Tensor, tiles: int, channels: int) -> Parts:
    shapes = (tiles,), (tiles, channels), (tiles, channels)
    return Parts(*(torch.empty(s, dtype=torch.float32, device=like.device) for s in shapes))


@triton.jit
def tile_statistics(y, inside, tile, c, C, parts):
    """What a tile of y, [pixels, channels] fp32, leaves."""
    count = tl.sum(inside.to(tl.float32))
    mean = tl.sum(tl.where(inside[:, None], y, 0.0), 0) / count
    deviation = tl.where(inside[:, None], y - mean[None, :], 0.0)
    rest = tl.sum(deviation, 0) / count  # what rounding left over
    m2 = tl.sum(deviation * deviation, 0) - rest * rest * count
    tl.store(parts.pixels + tile, count)
    tl.store(parts.mean + tile * C + c, mean + rest, mask=c < C)
    tl.store(parts.m2 + tile * C + c, m2, mask=c < C)


@triton.jit
def merged(count, mean, m2, axis: tl.constexpr):
    """Parts along an axis as one; counts of 0 have no part. count broadcasts to mean and m2."""
    count, mean = tl.broadcast(count, mean)
    total = tl.sum(count, axis)
    weight = count / tl.maximum(tl.expand_dims(total, axis), 1.0)
    # Around one of the parts: sums of the means themselves would lose their last digits.
    pivot = tl.max(tl.where(count > 0, mean, -float("inf")), axis)
    pivot = tl.where(total > 0, pivot, 0.0)
    around = tl.where(count > 0, mean - tl.expand_dims(pivot, axis), 0.0)
    shift = tl.sum(weight * around, axis)
    off = around - tl.expand_dims(shift, axis)
    return total, pivot + shift, tl.sum(tl.where(count > 0, m2 + count * off * off, 0.0), axis)


@triton.jit
def load_parts(parts, first, last, C, c, BT: tl.constexpr):
    """Parts [BT, len(c)] from row `first` on, those up to `last`."""
    t = first + tl.arange(0, BT)
    mask = (t < last)[:, None] & (c < C)[None, :]
    at = t[:, None].to(tl.int64) * C + c[None, :]
    count = tl.load(parts.pixels + t, mask=t < last, other=0.0)
    mean = tl.load(parts.mean + at, mask=mask, other=0.0)
    m2 = tl.load(parts.m2 + at, mask=mask, other=0.0)
    return count[:, None], mean, m2


@triton.jit
def merge_range(parts, first, last, C, c, BT: tl.constexpr):
    count, mean, m2 = merged(*load_parts(parts, first, last, C, c, BT), 0)
    for begin in range(first + BT, last, BT):
        more = merged(*load_parts(parts, begin, last, C, c, BT), 0)
        count, mean, m2 = merge_two(count, mean, m2, *more)
    return count, mean, m2


@triton.jit
def merge_two(count, mean, m2, count1, mean1, m21):
    total = tl.maximum(count + count1, 1.0)
    delta = mean1 - mean
    mean += tl.where(count1 > 0, delta * (count1 / total), 0.0)
    m2 += tl.where(count1 > 0, m21 + delta * delta * (count * count1 / total), 0.0)
    return count + count1, mean, m2


@triton.jit(do_not_specialize=["tiles", "share"])
def merge_kernel(parts, out, tiles, share, C, BT: tl.constexpr, BC: tl.constexpr):
    """One row of `tiles` parts to as many as there are programs along axis 1; axis 2: rows."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    split, row = tl.program_id(1), tl.program_id(2)
    first = row * tiles + split * share
    last = tl.minimum(first + share, (row + 1) * tiles)
    count, mean, m2 = merge_range(parts, first, last, C, c, BT)
    at = row * tl.num_programs(1) + split
    tl.store(out.pixels + at + 0 * c, count)
    tl.store(out.mean + at * C + c, mean, mask=c < C)
    tl.store(out.m2 + at * C + c, m2, mask=c < C)


@triton.jit
def channels_of_groups(C, width, BG: tl.constexpr, BW: tl.constexpr):
    """The channels of a program's groups. What is beyond a group or the map is number C: never
    read, never written."""
    g = tl.program_id(0) * BG + tl.arange(0, BG * BW) // BW
    k = tl.arange(0, BG * BW) % BW
    return tl.where((k < width) & (g * width < C), g * width + k, C)


@triton.jit
def to_channels(of_groups, BW: tl.constexpr):
    BG: tl.constexpr = of_groups.shape[0]
    return tl.broadcast_to(of_groups[:, None], (BG, BW)).reshape(BG * BW)


@triton.jit(do_not_specialize=["tiles", "eps"])
def finish_kernel(
    parts,
    tiles,  # parts of a row
    bias,
    gamma,
    beta,
    eps,
    center,
    scale,
    shift,
    var,
    C,
    width,  # channels that share statistics
    BG: tl.constexpr,  # groups of a program
    BW: tl.constexpr,  # at least width
    BT: tl.constexpr,
):
    row = tl.program_id(1)
    c = channels_of_groups(C, width, BG, BW)
    count, mean, m2 = merge_range(parts, row * tiles, (row + 1) * tiles, C, c, BT)
    known = c < C
    offset = tl.zeros((BG * BW,), tl.float32)
    if width > 1:
        if bias is not None:
            offset = tl.load(bias + c, mask=known, other=0.0)
        count = tl.where(known, count, 0.0).reshape(BG, BW)
        mean, m2 = (mean + offset).reshape(BG, BW), m2.reshape(BG, BW)
        count, mean, m2 = merged(count, mean, m2, 1)
        count, mean, m2 = to_channels(count, BW), to_channels(mean, BW), to_channels(m2, BW)
    variance = m2 / tl.maximum(count, 1.0)
    factor = 1.0 / tl.sqrt_rn(variance + eps)
    if gamma is not None:
        factor *= tl.load(gamma + c, mask=known, other=0.0)
    add = tl.zeros((BG * BW,), tl.float32)
    if beta is not None:
        add = tl.load(beta + c, mask=known, other=0.0)
    at = row * C + c
    tl.store(center + at, mean - offset, mask=known)
    tl.store(scale + at, factor, mask=known)
    tl.store(shift + at, add, mask=known)
    tl.store(var + at, variance, mask=known)


def finish(
    parts: Parts,
    rows: int,
    groups: int,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """center, scale, shift, var, [rows, C], as ``reference.normalization`` defines them.

    parts: those of one row follow each other. bias, gamma, beta: fp32, dense.
    groups: 0 for statistics of the batch.
    """
    pixels, mean, _ = parts
    assert pixels is not None
    assert mean is not None
    C = mean.size(1)
    center, scale, shift, var = (mean.new_empty((rows, C)) for _ in range(4))
    if rows == 0:
        return center, scale, shift, var
    tiles = pixels.size(0) // rows
    if tiles > MOST:
        share = max(MOST, triton.cdiv(tiles, MOST))
        splits = triton.cdiv(tiles, share)
        fewer = empty_parts(mean, rows * splits, C)
        grid = (triton.cdiv(C, 32), splits, rows)
        launch(merge_kernel, grid)(parts, fewer, tiles, share, C, BT=64, BC=32)
        parts, tiles = fewer, splits
    width = C // groups if groups else 1
    BG, BW = channel_block(C, width)
    launch(finish_kernel, (triton.cdiv(C // width, BG), rows))(
        parts,
        tiles,
        bias,
        gamma,
        beta,
        eps,
        center,
        scale,
        shift,
        var,
        C,
        width,
        BG=BG,
        BW=BW,
        BT=max(1, min(32, 8192 // (BG * BW))),
    )
    return center, scale, shift, var


# Parts of a row that one program may merge.
MOST = 256


def channel_block(C: int, width: int) -> tuple[int, int]:
    """Groups, and channels of each (a power of 2), that a program handles."""
    BW = triton.next_power_of_2(width)
    return max(1, min(64, triton.next_power_of_2(C)) // BW), BW
