"""resample by the compiled kernels (csrc/resample)."""

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.extension import kernels
from fastunet.reference.resample import accumulate_dtype


def kernel_arguments(source: Activation) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """y, center, scale, shift, slope; a plain map becomes an identity affine."""
    y = channel_adjacent(source.y)
    if source.scale is not None:
        assert source.center is not None
        assert source.shift is not None
        vectors = (source.center, source.scale, source.shift)
        center, scale, shift = (v.contiguous() for v in vectors)
        return y, center, scale, shift, source.slope
    zero = y.new_zeros((1, y.size(1)), dtype=accumulate_dtype(y.dtype))
    return y, zero, torch.ones_like(zero), zero, 1.0


def channel_adjacent(x: Tensor) -> Tensor:
    """x itself where its channel stride is 1 (a channel slice of a channels_last map has that)."""
    if x.stride(1) == 1 or x.size(1) == 1 or x.numel() == 0:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def empty_vectors(scale: Tensor) -> tuple[Tensor, Tensor]:
    """dscale and dshift, dense; storages of their own, as operators' outputs may not alias."""
    return scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def empty_map(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.empty(
        (like.size(0), channels, *size),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def as_rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C], a view where channels are adjacent"""
    return x.permute(0, 2, 3, 1).reshape(-1, x.size(1))


def resample(source: Activation, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = empty_map(source.y, source.y.size(1), source.size)
    kernels().resample(out, *kernel_arguments(source), source.mode)
    return out


def resample_bwd(source: Activation, dz: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    y, *rest = kernel_arguments(source)
    dy = empty_map(y, y.size(1), (y.size(2), y.size(3)))
    dscale = dshift = None
    if source.scale is not None:
        dscale, dshift = empty_vectors(source.scale)
    kernels().resample_bwd(dy, dscale, dshift, channel_adjacent(dz), y, *rest, source.mode)
    return dy, dscale, dshift
