"""Weights as the convolution reads them: [taps, O, K] in the maps' dtype, input channels adjacent,
each source's padded with zeros to whole blocks."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastunet.prepared import prepared

from .language import address, launch


@triton.jit
def pack_kernel(
    weight,
    stride_o,
    stride_k,
    stride_tap,
    packed,
    outputs,
    K,  # of this source
    width,  # of a packed row
    first,  # where this source begins in it
    TAPS: tl.constexpr,
    FLIP: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
):
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    known = (o < outputs)[:, None] & (k < K)[None, :]
    start = weight + o[:, None].to(tl.int64) * stride_o + k[None, :] * stride_k
    for tap in tl.static_range(TAPS):
        values = tl.load(
            start + (TAPS - 1 - tap if FLIP else tap) * stride_tap, mask=known, other=0.0
        )
        at = (tap * outputs + o[:, None]) * width + first + k[None, :]
        tl.store(packed + at, values.to(packed.dtype.element_ty), mask=(o < outputs)[:, None])


def pack(
    weight: Tensor,
    dimension: int,
    channels: Sequence[int],
    dtype: torch.dtype,
    BK: int,
    flip: bool = False,
) -> tuple[Tensor, int]:
    """The packed weight, and where the second source's channels begin.

    weight: outputs x inputs x taps, dimension: that of the outputs, 0 or 1.
    channels: of each source; BK: those of a block. flip: the taps in reverse
    order, for the input's gradient.
    """
    key = ("weight", address(weight), weight.shape, weight.stride(), dimension, *channels)
    return prepared(
        (*key, dtype, BK, flip),
        lambda: packed(weight, dimension, channels, dtype, BK, flip),
    )


def packed(
    weight: Tensor,
    dimension: int,
    channels: Sequence[int],
    dtype: torch.dtype,
    BK: int,
    flip: bool,
) -> tuple[Tensor, int]:
    weight = weight.flatten(2)
    taps = weight.size(2)
    widths = [triton.cdiv(c, BK) * BK for c in channels]
    out = weight.new_empty((taps, weight.size(dimension), sum(widths)), dtype=dtype)
    stride_o, stride_k = weight.stride(dimension), weight.stride(1 - dimension)
    first = start = 0
    for count, width in zip(channels, widths, strict=True):
        part = weight.narrow(1 - dimension, start, count)
        grid = (triton.cdiv(out.size(1), 32), width // BK)
        launch(pack_kernel, grid)(
            part,
            stride_o,
            stride_k,
            weight.stride(2),
            out,
            out.size(1),
            count,
            out.size(2),
            first,
            TAPS=taps,
            FLIP=flip,
            BO=32,
            BK=BK,
        )
        first, start = first + width, start + count
    return out, widths[0]
