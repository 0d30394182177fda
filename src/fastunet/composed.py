"""conv_norm_act and conv_transpose, put together from a backend's kernels.

``kernels`` is a backend module: ``resample``, ``resample_bwd``, ``normalization``,
``normalization_bwd``; and where ``convolves(kind, sources, weight)`` says so, convolutions of its
own, which read the sources as they are: ``conv_norm_act``, ``conv_transpose`` and their backwards.
Elsewhere PyTorch's convolution reads a temporary map, made again in backward. Nothing but the
convolutions' outputs is ever saved.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastunet import aten_convolution
from fastunet.activation import Activation
from fastunet.reference.normalization import affine_bwd
from fastunet.reference.resample import accumulate_dtype, per_channel

Size = tuple[int, int]


class Norm(NamedTuple):
    """How a convolution's output is normalised.

    kind: ``none``, ``frozen`` (by running statistics), ``batch`` or ``group``.
    """

    kind: str
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    groups: int
    eps: float


class SourceGrads(NamedTuple):
    dy: Tensor | None = None
    dscale: Tensor | None = None
    dshift: Tensor | None = None


def conv_norm_act(
    kernels: ModuleType,
    sources: Sequence[Activation],
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, center, scale, shift, var."""
    if kernels.convolves("conv_norm_act", sources, weight):
        return kernels.conv_norm_act(sources, weight, bias, norm)
    y = aten_convolution.convolution(kernels, sources, weight)
    if norm.kind in ("batch", "group"):
        groups = norm.groups if norm.kind == "group" else 0
        vectors = accumulate_dtype(y.dtype)
        bias, gamma, beta = (as_dtype(t, vectors) for t in (bias, norm.gamma, norm.beta))
        return y, *kernels.normalization(y, bias, gamma, beta, groups, norm.eps)
    return y, *fixed_vectors(norm, bias, y)


def conv_norm_act_folded(
    kernels: ModuleType,
    sources: Sequence[Activation],
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    slope: float,
) -> Tensor:
    """The output with its normalisation, none or frozen, and activation done."""
    if kernels.convolves("conv_norm_act", sources, weight):
        return kernels.conv_norm_act_folded(sources, weight, bias, norm, slope)
    y = aten_convolution.convolution(kernels, sources, weight)
    center, scale, shift, _ = fixed_vectors(norm, bias, y)
    output = Activation.of(y)._replace(center=center, scale=scale, shift=shift, slope=slope)
    return kernels.resample(output)


def fixed_vectors(
    norm: Norm, bias: Tensor | None, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """center, scale, shift, var where the norm has no statistics: none or frozen."""
    vectors = accumulate_dtype(y.dtype)
    bias, gamma, beta = (as_dtype(t, vectors) for t in (bias, norm.gamma, norm.beta))
    center = torch.zeros((1, y.size(1)), dtype=vectors, device=y.device)
    if norm.kind == "none":
        shift = center.clone() if bias is None else bias.reshape(1, -1).clone()
        return center, torch.ones_like(center), shift, torch.ones_like(center)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    center += norm.running_mean
    if bias is not None:
        center -= bias
    var = norm.running_var.to(vectors, copy=True).view(1, -1)
    scale = torch.rsqrt(var + norm.eps)
    if gamma is not None:
        scale *= gamma
    shift = torch.zeros_like(center) if beta is None else beta.reshape(1, -1).clone()
    return center, scale, shift, var


def conv_norm_act_bwd(
    kernels: ModuleType,
    grads: SourceGrads,
    sources: Sequence[Activation],
    needs: Sequence[bool],
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    y: Tensor | None,
    center: Tensor,
    scale: Tensor,
    var: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, list[SourceGrads]]:
    """dweight, dbias, dgamma, dbeta, and each source's gradients.

    grads: of y, scale and shift, each None where it is zero. needs: weight, then each source.
    y: None where the normalisation's backward does not read it (kinds none and frozen).
    """
    vectors = center.dtype
    grads = SourceGrads(grads.dy, as_dtype(grads.dscale, vectors), as_dtype(grads.dshift, vectors))
    dbias = dbias_of(norm, bias, grads, y, center, scale, var)
    if kernels.convolves("conv_norm_act_bwd", sources, weight):
        dweight, dgamma, dbeta, of_sources = kernels.conv_norm_act_bwd(
            grads, sources, needs, weight, norm, y, center, scale, var
        )
        of_sources = [SourceGrads(*s) for s in of_sources]
        return like_parameter(dweight, weight), dbias, dgamma, dbeta, of_sources
    if norm.kind in ("batch", "group"):
        assert y is not None
        groups = norm.groups if norm.kind == "group" else 0
        total = torch.empty_like(y)
        dgamma, dbeta = kernels.normalization_bwd(
            *grads, y, center, scale, var, groups, norm.eps, total
        )
    else:
        dgamma, dbeta = affine_bwd(grads.dscale, grads.dshift, var, norm.eps)
        shape = (sources[0].y.size(0), weight.size(0), *sources[0].size)
        total = sources[0].y.new_zeros(shape) if grads.dy is None else grads.dy

    # Source by source, so that neither the concatenation nor its gradient need exist.
    need_weight, *need_sources = needs
    of_weight, of_sources, channel = [], [], 0
    for source, need_source in zip(sources, need_sources, strict=True):
        channels = source.y.size(1)
        part = weight.narrow(1, channel, channels)
        channel += channels
        x, grads_of_source = None, SourceGrads()
        if need_source:
            dx = aten_convolution.convolution_input_grad(total, part)
            x, grads_of_source = source_grads(kernels, source, dx, need_weight)
            del dx
        of_sources.append(grads_of_source)
        if need_weight:
            if x is None:
                x = aten_convolution.gather(kernels, [source])
            of_weight.append(aten_convolution.convolution_weight_grad(total, x, part))
    dweight = like_parameter(torch.cat(of_weight, 1), weight) if need_weight else None
    return dweight, dbias, dgamma, dbeta, of_sources


def source_grads(
    kernels: ModuleType, source: Activation, dx: Tensor, need_map: bool
) -> tuple[Tensor | None, SourceGrads]:
    """What flows back to a source; and its map, where that is needed next and one pass makes
    both."""
    if need_map and source.scale is not None and hasattr(kernels, "resample_with_bwd"):
        x, grads = kernels.resample_with_bwd(source, dx)
        return x, SourceGrads(*grads)
    return None, SourceGrads(*kernels.resample_bwd(source, dx))


def dbias_of(
    norm: Norm,
    bias: Tensor | None,
    grads: SourceGrads,
    y: Tensor | None,
    center: Tensor,
    scale: Tensor,
    var: Tensor,
) -> Tensor:
    """The gradient of the convolution's bias, [C]: exactly zero where statistics cancel it."""
    channels = center.size(1)
    cancels = norm.kind == "batch" or (norm.kind == "group" and norm.groups == channels)
    if bias is None or cancels or (grads.dscale is None and grads.dshift is None):
        return center.new_zeros(channels)
    dscale, dshift = (torch.zeros_like(scale) if t is None else t for t in grads[1:])
    if norm.kind == "none":
        return dshift.squeeze(0).clone()
    if norm.kind == "frozen":
        return (scale * dshift).sum(0)
    # GroupNorm: the bias moves y itself, and the group's statistics with every other channel.
    assert y is not None
    n, pixels = y.size(0), y.size(2) * y.size(3)
    each = (n, norm.groups, channels // norm.groups)
    count = pixels * each[2]
    deviation = (y.to(center.dtype) - per_channel(center)).sum((2, 3))
    slope = -(scale * dscale).view(each).sum(2, keepdim=True) / count
    offset = -(scale * dshift).view(each).sum(2, keepdim=True) / count
    slope, offset = (t.expand(each).reshape(n, channels) for t in (slope, offset))
    terms = scale * dshift + slope / (var + norm.eps) * deviation + offset * pixels
    return terms.sum(0)


def conv_transpose(
    kernels: ModuleType, source: Activation, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The 2x2 stride 2 transposed convolution of a source, channels_last."""
    if kernels.convolves("conv_transpose", [source], weight):
        return kernels.conv_transpose(source, weight, bias)
    return aten_convolution.transposed(kernels, source, weight, bias)


def conv_transpose_bwd(
    kernels: ModuleType, dy: Tensor, source: Activation, needs: Sequence[bool], weight: Tensor
) -> tuple[Tensor | None, Tensor, SourceGrads]:
    """dweight, dbias and the source's gradients; needs: weight, source."""
    if kernels.convolves("conv_transpose_bwd", [source], weight):
        dweight, dbias, grads = kernels.conv_transpose_bwd(dy, source, needs, weight)
        return like_parameter(dweight, weight), dbias, SourceGrads(*grads)
    need_weight, need_source = needs
    x, grads_of_source = None, SourceGrads()
    if need_source:
        dx = aten_convolution.transposed_input_grad(dy, weight)
        x, grads_of_source = source_grads(kernels, source, dx, need_weight)
        del dx
    if x is None and need_weight:
        x = aten_convolution.gather(kernels, [source])
    if x is None:
        dweight, dbias = None, dy.sum((0, 2, 3), dtype=accumulate_dtype(dy.dtype))
    else:
        dweight, dbias = aten_convolution.transposed_parameter_grads(dy, x, weight)
    return like_parameter(dweight, weight), dbias.to(accumulate_dtype(dy.dtype)), grads_of_source


def like_parameter(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient with its parameter's dtype and strides, as optimizers and DDP want it."""
    if grad is None:
        return None
    if grad.dtype == parameter.dtype and grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def as_dtype(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or (t.dtype == dtype and t.is_contiguous()):  # calls cost more than looking
        return t
    return t.to(dtype).contiguous()
