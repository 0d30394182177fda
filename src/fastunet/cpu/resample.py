"""resample by the compiled kernels (csrc/resample)."""

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.extension import kernels
from fastunet.maps import channel_adjacent, empty_map, empty_vectors
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
