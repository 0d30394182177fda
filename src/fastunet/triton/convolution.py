"""The convolution as an implicit matrix product: pixels x (taps and input channels) x outputs.

One kernel does the 3x3 convolution and its input gradient, the transposed convolution (a tap per
output phase) and its input gradient (four taps at stride 2), and the head (one tap). It reads one
or two sources with their affine and activation pending; see the epilogues below for what it makes
of its sums.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastunet.aten_convolution import precision_of

from .language import (
    Source,
    address,
    aligned,
    block_of,
    launch,
    pending,
    pending_bwd,
    pixel_of,
    read,
    read_raw,
    tile_of,
    write,
)
from .statistics import Parts, tile_statistics
from .weight import pack

NO_SOURCE, NO_PARTS = Source(None), Parts()


class Kernel(NamedTuple):
    """Taps: size x size of them, padded before; input pixels per output pixel; output phases."""

    size: int
    padding: int = 0
    stride: int = 1
    up: int = 1

    @property
    def taps(self) -> int:
        return self.size * self.size


CONV3X3 = Kernel(3, padding=1)
POINTWISE = Kernel(1)
TRANSPOSED = Kernel(1, up=2)
TRANSPOSED_GRAD = Kernel(2, stride=2)


class Place(NamedTuple):
    """Height and width of a source, and where it lies in the convolution's input."""

    height: int
    width: int
    top: int = 0
    left: int = 0


# A source as it is read, and where.
Read = tuple[Source, Place]


class Sums(NamedTuple):
    """Per tile of pixels: sums of g * (y - center) and of g, [tiles, O] fp32."""

    dscale: Tensor | None = None
    dshift: Tensor | None = None


NO_SUMS = Sums()


class Config(NamedTuple):
    """Pixels of a tile, output channels and input channels at a time, warps, pipeline stages.

    described: sources are read through tensor descriptors (TMA), a row of pixels at a time.
    """

    TH: int
    TW: int
    BN: int
    BK: int
    num_warps: int = 4
    num_stages: int = 3
    described: bool = False


@triton.jit
def accumulate(
    acc,
    source,
    height,
    width,
    top,
    left,
    weight,  # of this source, [taps, outputs, K]
    K,
    n,
    h,
    w,
    dh,
    dw,
    o,
    outputs,
    H,  # of the convolution's input
    W,
    first_tap,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc += the products with one source, for output pixels (dh, dw) of a tile whose first tap
    reads (h, w)."""
    # What of the source lies within the convolution's input.
    first_h, last_h = tl.maximum(0, -top), tl.minimum(height, H - top)
    first_w, last_w = tl.maximum(0, -left), tl.minimum(width, W - left)
    h, w = h - top, w - left
    dh, dw = dh * STRIDE, dw * STRIDE
    offset = dh * width + dw
    k = tl.arange(0, BK)
    TAPS: tl.constexpr = SIZE * SIZE
    # One loop, so that loads run ahead through all of it. It runs once at least: else sums would be
    # set to zero between it and the last wait, and ptxas serialises such products (C7515). Those
    # with descriptors below it does not.
    for step in range(tl.maximum(TAPS * tl.cdiv(source.channels, BK), 1)):
        tap = step % TAPS
        c = step // TAPS * BK + k
        hs, ws = h + tap // SIZE, w + tap % SIZE
        inside = (hs + dh >= first_h) & (hs + dh < last_h)
        inside &= (ws + dw >= first_w) & (ws + dw < last_w)
        x = read(source, n, pixel_of(n, hs, ws, height, width), offset, inside, c)
        at = ((first_tap + tap) * outputs + o[None, :]) * K + c[:, None]
        factors = tl.load(weight + at, mask=(o < outputs)[None, :], other=0.0)
        acc = tl.dot(x, factors, acc, input_precision=PRECISION)
    return acc


@triton.jit
def accumulate_described(
    acc,
    source,  # descriptor of [N, height, width, channels]
    channels,
    weight,  # descriptor of [taps, outputs, K]
    second,
    n,
    h,
    w,
    o,
    first_tap,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same for a plain source, of a row of BM pixels from (h, w) on, by the TMA unit: it fills
    in zeros around the map."""
    TAPS: tl.constexpr = SIZE * SIZE
    for step in range(TAPS * tl.cdiv(channels, BK)):
        tap, c = step % TAPS, step // TAPS * BK
        x = source.load([n, h + tap // SIZE, w + tap % SIZE, c]).reshape(BM, BK)
        factors = weight.load([first_tap + tap, o, second + c]).reshape(BN, BK)
        acc = tl.dot(x, factors.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def source_grad(dz, target, n, base, offset, inside, tile, o, sums):
    """dy of the source that dz is the gradient of, and this tile's part of dscale and dshift."""
    y = read_raw(target, base, offset, inside, o).to(tl.float32)
    dy, of_scale, of_shift = pending_bwd(target, n, y, inside, o, dz)
    at = tile * target.channels + o
    tl.store(sums.dscale + at, tl.sum(of_scale, 0), mask=o < target.channels)
    tl.store(sums.dshift + at, tl.sum(of_shift, 0), mask=o < target.channels)
    return dy


@triton.jit(
    do_not_specialize=[
        *("height0", "width0", "top0", "left0", "height1", "width1", "top1", "left1"),
        *("H", "W"),
    ]
)
def convolution_kernel(
    source0,
    described0,
    height0,
    width0,
    top0,
    left0,
    source1,
    described1,
    height1,
    width1,
    top1,
    left1,
    weight,
    described_weight,
    K,
    second,  # where the weights of source1 begin in K
    bias,
    folded,
    target,
    parts,
    sums,
    out,  # as a source
    H,  # the grid of pixels; the output is UP times larger
    W,
    SIZE: tl.constexpr,
    PADDING: tl.constexpr,
    STRIDE: tl.constexpr,
    UP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    outputs = out.channels
    o, tile = block_of(outputs, BN)
    phase, tile = tile % (UP * UP), tile // (UP * UP)
    n, h, w, dh, dw, inside = tile_of(tile, H, W, TH, TW)
    h0, w0 = h * STRIDE - PADDING, w * STRIDE - PADDING

    acc = tl.zeros((TH * TW, BN), tl.float32)
    if described0 is not None:
        tl.static_assert(TH == 1 and STRIDE == 1)
        o0 = tl.program_id(0) % tl.cdiv(outputs, BN) * BN
        acc = accumulate_described(
            *(acc, described0, source0.channels, described_weight, 0),
            *(n, h0 - top0, w0 - left0, o0, phase, SIZE, TW, BN, BK, PRECISION),
        )
        if described1 is not None:
            acc = accumulate_described(
                *(acc, described1, source1.channels, described_weight, second),
                *(n, h0 - top1, w0 - left1, o0, phase, SIZE, TW, BN, BK, PRECISION),
            )
    else:
        read_at = n, h0, w0, dh, dw, o, outputs, H * STRIDE, W * STRIDE, phase
        acc = accumulate(
            *(acc, source0, height0, width0, top0, left0, weight, K),
            *read_at,
            *(SIZE, STRIDE, BK, PRECISION),
        )
        if source1.y is not None:
            acc = accumulate(
                *(acc, source1, height1, width1, top1, left1, weight + second, K),
                *read_at,
                *(SIZE, STRIDE, BK, PRECISION),
            )
    base = pixel_of(n, h * UP + phase // UP, w * UP + phase % UP, H * UP, W * UP)
    offset = dh * (UP * UP * W) + dw * UP
    if bias is not None:
        acc += tl.load(bias + o, mask=o < outputs, other=0.0)[None, :]
    acc = pending(folded, n, acc, o)
    if target.y is not None:
        acc = source_grad(acc, target, n, base, offset, inside, tile, o, sums)
    if CHANNELS_LAST:
        write(out, base, offset, inside, o, acc)
    else:
        pixels = tl.cast(H, tl.int64) * W * (UP * UP)
        at = (base + n * (outputs - 1) * pixels + offset)[:, None] + o[None, :] * pixels
        y = acc.to(out.y.dtype.element_ty)
        tl.store(out.y + at, y, mask=inside[:, None] & (o < outputs)[None, :])
    if parts.pixels is not None:
        tile_statistics(acc, inside, tile, o, outputs, parts)


def configuration(
    kernel: Kernel, sources: Sequence[Read], size: tuple[int, int], outputs: int, grad: bool = False
) -> Config:
    """Without having measured: tiles of 128 pixels and up to 128 outputs.

    grad: of a source with an affine, whose epilogue holds more values.
    """
    y, width = sources[0][0].y, size[1]
    assert y is not None
    # Later GPUs for desktops, 12.x, have a TMA unit too, but products and shared memory as 8.x.
    dtype, major = y.dtype, capability(y.device)[0]
    described = major in (9, 10) and kernel.stride == 1 and width >= 48 and outputs > 32
    described = described and all(can_be_described(*s, size) for s in sources)
    BK = 64 if dtype != torch.float32 else 32
    # More outputs, or fewer warps, and the sums would not fit the registers.
    most = 64 if outputs % 8 or (grad and (not described or dtype == torch.float32)) else 128
    most = min(most, most_exact(dtype))
    BN = min(most, max(16, triton.next_power_of_2(outputs)))
    if described:
        TW = 128 if width > 64 else 64
        # 32: exact products. On 10.x sums are in tensor memory, and come to registers all at once.
        num_warps = 8 if major == 10 or BN == 32 or (grad and BN == 128) else 4
        return Config(1, TW, BN, BK, num_warps, 4, True)
    num_warps = 4 if (BN == 64 and major != 10) or (BN == 128 and major == 9) else 8
    TW = 32 if width > 16 else 16
    return Config(128 // TW, TW, BN, BK, num_warps)


def most_exact(dtype: torch.dtype) -> int:
    """Channels of a block whose exact fp32 products a program's registers hold: threads keep the
    operands too, without tensor cores. Interpreted, as many as otherwise."""
    exact = precision_of(dtype) == "ieee" and not triton.knobs.runtime.interpret
    return 32 if exact else 128


def capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":  # interpreted
        return (9, 0)
    return torch.cuda.get_device_capability(device)


def can_be_described(source: Source, place: Place, size: tuple[int, int]) -> bool:
    """Whether a descriptor does for it: 16-byte strides and address, and nothing cropped."""
    assert source.y is not None
    return (
        source.scale is None
        and source.pixel >= source.channels  # not expanded
        and source.pixel * source.y.element_size() % 16 == 0
        and address(source.y) % 16 == 0
        and min(place.top, place.left) >= 0
        and place.top + place.height <= size[0]
        and place.left + place.width <= size[1]
    )


def describe(source: Source, place: Place, config: Config) -> TensorDescriptor:
    assert source.y is not None
    n, c = source.y.shape[:2]
    h, w = place.height, place.width
    strides = [h * w * source.pixel, w * source.pixel, source.pixel, 1]
    return TensorDescriptor(source.y, [n, h, w, c], strides, [1, 1, config.TW, config.BK])


def tiles(config: Config, size: tuple[int, int]) -> int:
    """Of one sample."""
    return triton.cdiv(size[0], config.TH) * triton.cdiv(size[1], config.TW)


def convolve(
    kernel: Kernel,
    config: Config,
    sources: Sequence[Read],
    weight: Tensor,
    dimension: int,
    size: tuple[int, int],
    out: Tensor,
    *,
    flip: bool = False,
    bias: Tensor | None = None,
    folded: Source = NO_SOURCE,
    target: Source = NO_SOURCE,
    parts: Parts = NO_PARTS,
    sums: Sums = NO_SUMS,
) -> None:
    """Writes out, [N, outputs, H * up, W * up], over a grid of H x W pixels.

    weight, dimension, flip: as ``pack`` takes them.
    folded: what is done to the sums. target: the source whose gradient this is, written to out.
    """
    n, outputs = out.size(0), weight.size(dimension)
    if out.numel() == 0:
        return
    channels = [source.channels for source, _ in sources]
    weight, second = pack(weight, dimension, channels, out.dtype, config.BK, flip)
    (source0, place0), (source1, place1) = [*sources, (NO_SOURCE, Place(0, 0))][:2]
    described: list[TensorDescriptor | None] = [None, None, None]
    if config.described:
        described[: len(sources)] = [describe(*s, config) for s in sources]
        described[2] = TensorDescriptor.from_tensor(weight, [1, config.BN, config.BK])
    grid = (n * tiles(config, size) * kernel.up**2 * triton.cdiv(outputs, config.BN),)
    launch(convolution_kernel, grid)(
        source0,
        described[0],
        *place0,
        source1,
        described[1],
        *place1,
        weight,
        described[2],
        weight.size(2),
        second,
        bias,
        folded,
        target,
        parts,
        sums,
        Source(out, outputs, outputs, aligned=aligned(outputs)),
        *size,
        SIZE=kernel.size,
        PADDING=kernel.padding,
        STRIDE=kernel.stride,
        UP=kernel.up,
        CHANNELS_LAST=out.stride(1) == 1 or outputs == 1,
        TH=config.TH,
        TW=config.TW,
        BN=config.BN,
        BK=config.BK,
        PRECISION=precision_of(out.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
