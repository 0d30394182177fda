"""The weight's gradient: for every tap, a matrix product over pixels.

One operand is read at its own pixels, the other at the taps around them; either may be rebuilt from
a raw map as it is read. Pixels are split between programs, whose sums are added in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet import backends
from fastunet.aten_convolution import precision_of

from .convolution import Kernel, Place, most_exact
from .language import Source, launch, pixel_of, read, tile_of


class Config(NamedTuple):
    """Pixels of a tile, channels of the tapped and of the other operand, warps, stages."""

    TH: int
    TW: int
    BT: int
    BC: int
    num_warps: int = 4
    num_stages: int = 3


@triton.jit(do_not_specialize=["height", "width", "top", "left", "H", "W", "tiles", "share"])
def weight_grad_kernel(
    tapped,
    height,
    width,
    top,
    left,
    centre,
    partial,  # [splits, taps, channels tapped, channels of centre] fp32
    H,  # of centre
    W,
    tiles,
    share,  # tiles of a split
    SIZE: tl.constexpr,
    PADDING: tl.constexpr,
    STRIDE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    TAPS: tl.constexpr = SIZE * SIZE
    rows, columns = tl.cdiv(tapped.channels, BT), tl.cdiv(centre.channels, BC)
    # Programs of one split follow each other: they read the same pixels.
    blocks = TAPS * rows * columns
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    tap = block % TAPS
    t = block // TAPS % rows * BT + tl.arange(0, BT)
    c = block // TAPS // rows * BC + tl.arange(0, BC)
    first_h, last_h = tl.maximum(0, -top), tl.minimum(height, H * STRIDE - top)
    first_w, last_w = tl.maximum(0, -left), tl.minimum(width, W * STRIDE - left)
    # An operand with pending work comes second: that one is in shared memory in any case.
    SWAP: tl.constexpr = tapped.scale is not None
    acc = tl.zeros((BC, BT) if SWAP else (BT, BC), tl.float32)
    for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
        n, h, w, dh, dw, inside = tile_of(tile, H, W, TH, TW)
        d = read(centre, n, pixel_of(n, h, w, H, W), dh * W + dw, inside, c)
        hs = h * STRIDE - PADDING - top + tap // SIZE
        ws = w * STRIDE - PADDING - left + tap % SIZE
        dh, dw = dh * STRIDE, dw * STRIDE
        inside &= (hs + dh >= first_h) & (hs + dh < last_h)
        inside &= (ws + dw >= first_w) & (ws + dw < last_w)
        base = pixel_of(n, hs, ws, height, width)
        x = read(tapped, n, base, dh * width + dw, inside, t)
        if SWAP:
            acc = tl.dot(tl.trans(d), x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(x), d, acc, input_precision=PRECISION)
    if SWAP:
        acc = tl.trans(acc)
    row = ((split * TAPS + tap).to(tl.int64) * tapped.channels + t)[:, None] * centre.channels
    mask = (t < tapped.channels)[:, None] & (c < centre.channels)[None, :]
    tl.store(partial + row + c[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["splits"])
def add_splits_kernel(
    partial,
    splits,
    out,
    stride,
    channels,
    others,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """out[c * stride + t * TAPS + tap] = the sum over splits of partial[split, tap, t, c]"""
    t = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    mask = (t < channels) & (c < others)
    for tap in tl.static_range(TAPS):
        total = tl.zeros((BT, BC), tl.float32)
        for split in range(splits):
            row = (t.to(tl.int64) + (split * TAPS + tap) * channels) * others
            total += tl.load(partial + row + c, mask=mask, other=0.0)
        tl.store(out + c.to(tl.int64) * stride + t * TAPS + tap, total, mask=mask)


def configuration(
    kernel: Kernel, dtype: torch.dtype, size: tuple[int, int], tapped: int, centre: int
) -> Config:
    """Tiles of 64 pixels (32 in fp32), and as many channels as a program's registers hold."""
    pixels = 64 if dtype != torch.float32 else 32
    TW = min(pixels, max(16, triton.next_power_of_2(size[1]) // 2))
    most = 64 if dtype == torch.float32 or tapped % 8 or centre % 8 else 128
    most = min(most, most_exact(dtype))
    block = [min(most, max(16, triton.next_power_of_2(c))) for c in (tapped, centre)]
    if block == [128, 128]:
        block[0] = 64
    return Config(pixels // TW, TW, *block)


def programs_wanted(device: torch.device) -> int:
    """That fill the device a few times over; the same on every run there."""
    if backends.elsewhere():
        return 4 * backends.machine.processors
    if device.type != "cuda":  # interpreted, or compiled only
        return 8
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def weight_grad(
    kernel: Kernel,
    config: Config,
    tapped: Source,
    place: Place,
    centre: Source,
    samples: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """Writes out, [channels of centre, channels tapped, taps], fp32, its last two dimensions dense.

    size, dtype: of centre's map.
    """
    if out.numel() == 0:
        return
    tiles = samples * triton.cdiv(size[0], config.TH) * triton.cdiv(size[1], config.TW)
    if tiles == 0:
        out.zero_()
        return
    blocks = triton.cdiv(tapped.channels, config.BT) * triton.cdiv(centre.channels, config.BC)
    blocks *= kernel.taps
    share = triton.cdiv(tiles, max(1, programs_wanted(out.device) // blocks))
    splits = triton.cdiv(tiles, share)
    shape = (splits, kernel.taps, tapped.channels, centre.channels)
    partial = torch.empty(shape, dtype=torch.float32, device=out.device)
    launch(weight_grad_kernel, (blocks * splits,))(
        tapped,
        *place,
        centre,
        partial,
        *size,
        tiles,
        share,
        SIZE=kernel.size,
        PADDING=kernel.padding,
        STRIDE=kernel.stride,
        TH=config.TH,
        TW=config.TW,
        BT=config.BT,
        BC=config.BC,
        PRECISION=precision_of(dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    launch(add_splits_kernel, (triton.cdiv(shape[2], 16), triton.cdiv(shape[3], 32)))(
        partial, splits, out, out.stride(0), shape[2], shape[3], TAPS=kernel.taps, BT=16, BC=32
    )
