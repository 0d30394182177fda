"""conv_norm_act by the Triton kernels."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastunet.activation import NONE, Activation
from fastunet.composed import Norm, SourceGrads, as_dtype, fixed_vectors
from fastunet.maps import empty_map
from fastunet.prepared import prepared

from . import convolution, selection, weight_grad
from .convolution import CONV3X3, NO_SOURCE, Kernel, Place, Read, Sums, convolve
from .language import Source, as_source, source_of
from .normalization import normalization_bwd
from .resample import add_tiles, place_of, resample, resample_bwd
from .selection import ON_LOAD
from .statistics import Parts, empty_parts, finish


def conv_norm_act(
    sources: Sequence[Activation], weight: Tensor, bias: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, center, scale, shift, var."""
    fixed = norm.kind not in ("batch", "group")
    y, parts = convolution_of(sources, weight, statistics=not fixed)
    if fixed:
        return y, *fixed_vectors(norm, bias, y)
    rows, groups = (y.size(0), norm.groups) if norm.kind == "group" else (1, 0)
    bias, gamma, beta = (as_dtype(v, torch.float32) for v in (bias, norm.gamma, norm.beta))
    return y, *finish(parts, rows, groups, bias, gamma, beta, norm.eps)


def conv_norm_act_folded(
    sources: Sequence[Activation], weight: Tensor, bias: Tensor | None, norm: Norm, slope: float
) -> Tensor:
    """act(scale * (y - center) + shift), where the norm has no statistics."""
    vectors = (bias, *norm[1:5])
    outputs = weight.size(0)
    made_of = [None if v is None else (v.data_ptr(), v.stride()) for v in vectors]
    key = ("folded", outputs, norm.kind, norm.eps, *made_of)
    like = sources[0].y.new_empty((1, outputs, 1, 1))
    center, scale, shift, _ = prepared(key, lambda: fixed_vectors(norm, bias, like))
    folded = Source(None, 0, outputs, center, scale, shift, 0, slope)
    return convolution_of(sources, weight, folded=folded)[0]


def convolution_of(
    sources: Sequence[Activation],
    weight: Tensor,
    statistics: bool = False,
    folded: Source = NO_SOURCE,
) -> tuple[Tensor, Parts]:
    """y, and what its statistics are made of, where they are wanted."""
    size = sources[0].size
    y = empty_map(sources[0].y, weight.size(0), size)
    on_load = selection.choice("conv_norm_act", sources, weight.size(0)) == ON_LOAD
    read = [readable(s, on_load) for s in sources]
    config = convolution.configuration(CONV3X3, read, size, y.size(1))
    tiles = y.size(0) * convolution.tiles(config, size)
    parts = empty_parts(y, tiles, y.size(1)) if statistics else Parts()
    convolve(CONV3X3, config, read, weight, 0, size, y, folded=folded, parts=parts)
    return y, parts


def conv_norm_act_bwd(
    grads: SourceGrads,
    sources: Sequence[Activation],
    needs: Sequence[bool],
    weight: Tensor,
    norm: Norm,
    y: Tensor | None,
    center: Tensor,
    scale: Tensor,
    var: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor, list[tuple[Tensor | None, ...]]]:
    """dweight, dgamma, dbeta, and each source's dy, dscale, dshift."""
    dy, dscale, dshift = grads
    size = sources[0].size
    total = None
    if norm.kind in ("batch", "group") and not (dscale is None and dshift is None):
        assert y is not None
        total = empty_map(y, y.size(1), size)
    groups = norm.groups if norm.kind == "group" else 0
    dgamma, dbeta = normalization_bwd(
        dy, dscale, dshift, y, center, scale, var, groups, norm.eps, total
    )
    if total is None:
        total = dy
    if total is None:
        total = empty_map(sources[0].y, weight.size(0), size).zero_()
    of_output = as_source(total)

    need_weight, *need_sources = needs
    dweight = None
    if need_weight:
        dweight = weight.new_empty(weight.shape, dtype=torch.float32)
    on_load = selection.choice("conv_norm_act_bwd", sources, weight.size(0)) == ON_LOAD
    of_sources: list[tuple[Tensor | None, ...]] = []
    first = 0
    for source, need in zip(sources, need_sources, strict=True):
        last = first + source.y.size(1)
        if dweight is not None:
            part = dweight[:, first:last]
            sum_weight_grad(CONV3X3, readable(source, on_load), of_output, total, part)
        grads_of_source: tuple[Tensor | None, ...] = (None, None, None)
        if need:
            part = weight[:, first:last]
            grads_of_source = source_grad(CONV3X3, total, source, part, 1, flip=True)
        of_sources.append(grads_of_source)
        first = last
    return dweight, dgamma, dbeta, of_sources


def readable(source: Activation, on_load: bool) -> Read:
    """The source as the convolution reads it: as it is, or with its pending work done."""
    if source.mode == NONE and (on_load or source.scale is None):
        height, width = source.y.shape[2:]
        return source_of(source), Place(height, width, *place_of(source))
    return as_source(resample(source)), Place(*source.size)


def sum_weight_grad(
    kernel: Kernel, tapped: Read, centre: Source, grid: Tensor, out: Tensor
) -> None:
    """Writes out, [channels of centre, channels tapped, taps...]; grid: a map of centre's size."""
    n, _, h, w = grid.shape
    source, place = tapped
    config = weight_grad.configuration(kernel, grid.dtype, (h, w), source.channels, centre.channels)
    weight_grad.weight_grad(kernel, config, source, place, centre, n, (h, w), grid.dtype, out)


def source_grad(
    kernel: Kernel,
    dy: Tensor,
    source: Activation,
    weight: Tensor,
    dimension: int,
    flip: bool = False,
) -> tuple[Tensor | None, ...]:
    """dy, dscale, dshift of a source, from the gradient of what the kernel made of it.

    weight, dimension, flip: as ``pack`` takes them, for the kernel that goes back.
    """
    y, (h, w) = source.y, source.size
    out = empty_map(y, y.size(1), (h, w))
    if out.numel() == 0:
        return resample_bwd(source, out)
    read = [(as_source(dy), Place(*dy.shape[2:]))]
    scale = None if source.resampling_pending else source.scale
    config = convolution.configuration(kernel, read, (h, w), y.size(1), scale is not None)
    write = functools.partial(
        convolve, kernel, config, read, weight, dimension, (h, w), out, flip=flip
    )
    if scale is None:
        write()
        return resample_bwd(source, out) if source.resampling_pending else (out, None, None)
    tiles = y.size(0) * convolution.tiles(config, (h, w))
    dscale, dshift = (y.new_empty((tiles, y.size(1)), dtype=torch.float32) for _ in range(2))
    write(target=source_of(source), sums=Sums(dscale, dshift))
    return out, *add_tiles(scale, dscale, dshift)
