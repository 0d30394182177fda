"""conv_norm_act by the Triton kernels."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastunet.activation import NONE, Activation
from fastunet.composed import Norm, SourceGrads, as_dtype, fixed_vectors
from fastunet.maps import empty_map
from fastunet.prepared import prepared

from . import convolution, selection, weight_grad
from .convolution import CONV3X3, NO_SOURCE, Kernel, Place, Sums, can_be_described, convolve
from .language import Source
from .normalization import normalization_bwd
from .resample import add_tiles, as_source, place_of, resample, resample_bwd, source_of
from .selection import ON_LOAD
from .statistics import Parts, empty_parts, statistics
from .weight import pack


def conv_norm_act(
    sources: Sequence[Activation], weight: Tensor, bias: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, center, scale, shift, var."""
    if norm.kind not in ("batch", "group"):
        y = convolution_of(sources, weight)
        return y, *fixed_vectors(norm, bias, y)
    rows, groups = (sources[0].y.size(0), norm.groups) if norm.kind == "group" else (1, 0)
    y, parts = convolution_and_parts(sources, weight)
    bias, gamma, beta = (as_dtype(v, torch.float32) for v in (bias, norm.gamma, norm.beta))
    return y, *statistics(parts, rows, groups, bias, gamma, beta, norm.eps)


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
    return convolution_of(sources, weight, folded=folded)


def convolution_of(
    sources: Sequence[Activation], weight: Tensor, folded: Source = NO_SOURCE
) -> Tensor:
    y, _, run = prepare(sources, weight)
    run(folded=folded)
    return y


def convolution_and_parts(sources: Sequence[Activation], weight: Tensor) -> tuple[Tensor, Parts]:
    """y, and what its statistics are made of."""
    y, config, run = prepare(sources, weight)
    tiles = y.size(0) * convolution.tiles(config, sources[0].size)
    parts = empty_parts(y, tiles, y.size(1))
    run(parts=parts)
    return y, parts


def prepare(
    sources: Sequence[Activation], weight: Tensor
) -> tuple[Tensor, convolution.Config, Callable[..., None]]:
    """The map to write, how, and what writes it."""
    size = sources[0].size
    y = empty_map(sources[0].y, weight.size(0), size)
    on_load = selection.choice("conv_norm_act", sources, weight.size(0)) == ON_LOAD
    read = [readable(s, on_load) for s in sources]
    config = convolution.configuration(
        *(CONV3X3, y.dtype, size, y.size(1)),
        device=y.device,
        described=all(can_be_described(*s, size) for s in read),
    )
    packed, second = pack(weight, 0, [s.y.size(1) for s in sources], y.dtype, config)
    return y, config, functools.partial(convolve, CONV3X3, config, read, packed, second, size, y)


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


def readable(source: Activation, on_load: bool) -> tuple[Source, Place]:
    """The source as the convolution reads it: as it is, or with its pending work done."""
    if source.mode == NONE and (on_load or source.scale is None):
        height, width = source.y.shape[2:]
        return source_of(source), Place(height, width, *place_of(source))
    return as_source(resample(source)), Place(*source.size)


def sum_weight_grad(
    kernel: Kernel, tapped: tuple[Source, Place], centre: Source, grid: Tensor, out: Tensor
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
    inputs = [(as_source(dy), Place(*dy.shape[2:]))]
    scale = None if source.resampling_pending else source.scale
    config = convolution.configuration(
        *(kernel, y.dtype, (h, w), y.size(1)),
        device=y.device,
        described=can_be_described(*inputs[0], (h, w)),
        grad=scale is not None,
    )
    packed, second = pack(weight, dimension, [dy.size(1)], y.dtype, config, flip)
    if scale is None:
        convolve(kernel, config, inputs, packed, second, (h, w), out)
        return resample_bwd(source, out) if source.resampling_pending else (out, None, None)
    tiles = y.size(0) * convolution.tiles(config, (h, w))
    dscale, dshift = (y.new_empty((tiles, y.size(1)), dtype=torch.float32) for _ in range(2))
    target, sums = source_of(source), Sums(dscale, dshift)
    convolve(kernel, config, inputs, packed, second, (h, w), out, target=target, sums=sums)
    return out, *add_tiles(scale, dscale, dshift)
