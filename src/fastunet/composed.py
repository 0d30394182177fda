"""conv_norm_act and conv_transpose from PyTorch's own convolution and a backend's kernels.

``kernels`` is a backend module: resample, resample_bwd, normalization, normalization_bwd. The
sources are materialised into one temporary map and again in backward: nothing but the
convolutions' outputs is ever saved.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.reference.normalization import affine_bwd
from fastunet.reference.resample import accumulate_dtype, per_channel
from fastunet.workspace import release_after_backward, temporary

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
    x = gather(kernels, sources)
    y = convolution(x, weight.to(x.dtype))
    vectors = accumulate_dtype(y.dtype)
    bias, gamma, beta = (as_dtype(t, vectors) for t in (bias, norm.gamma, norm.beta))
    if norm.kind in ("batch", "group"):
        groups = norm.groups if norm.kind == "group" else 0
        return y, *kernels.normalization(y, bias, gamma, beta, groups, norm.eps)
    center = torch.zeros((1, y.size(1)), dtype=vectors, device=y.device)
    if norm.kind == "none":
        shift = center.clone() if bias is None else bias.reshape(1, -1).clone()
        return y, center, torch.ones_like(center), shift, torch.ones_like(center)
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
    return y, center, scale, shift, var


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
    release_after_backward()
    if norm.kind in ("batch", "group"):
        assert y is not None
        groups = norm.groups if norm.kind == "group" else 0
        total = temporary("gradient", y, y.size(1), (y.size(2), y.size(3)))
        dgamma, dbeta = kernels.normalization_bwd(
            *grads, y, center, scale, var, groups, norm.eps, total
        )
    else:
        dgamma, dbeta = affine_bwd(grads.dscale, grads.dshift, var, norm.eps)
        shape = (sources[0].y.size(0), weight.size(0), *sources[0].size)
        total = sources[0].y.new_zeros(shape) if grads.dy is None else grads.dy
    dbias = dbias_of(norm, bias, grads, y, center, scale, var)

    of_sources = [SourceGrads() for _ in sources]
    dweight = None
    if any(needs):
        need_weight, *need_sources = needs
        # Built again only for dweight; the data gradient reads the size alone.
        x = gather(kernels, sources) if need_weight else placeholder(sources)
        dx, dweight = convolution_bwd(total, x, weight, any(need_sources), need_weight)
        channel = 0
        for i, source in enumerate(sources):
            channels = source.y.size(1)
            if need_sources[i]:
                assert dx is not None
                part = dx.narrow(1, channel, channels)
                of_sources[i] = SourceGrads(*kernels.resample_bwd(source, part))
            channel += channels
    return dweight, dbias, dgamma, dbeta, of_sources


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
        return dshift.sum(0)
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
    """The 2x2 stride 2 transposed convolution of a source."""
    x = gather(kernels, [source])
    y = torch.ops.aten.convolution(
        x, weight.to(x.dtype), as_dtype(bias, x.dtype), [2, 2], [0, 0], [1, 1], True, [0, 0], 1
    )
    return y.contiguous(memory_format=torch.channels_last)


def conv_transpose_bwd(
    kernels: ModuleType, dy: Tensor, source: Activation, needs: Sequence[bool], weight: Tensor
) -> tuple[Tensor | None, Tensor, SourceGrads]:
    """dweight, dbias and the source's gradients; needs: weight, source."""
    release_after_backward()
    need_weight, need_source = needs
    x = gather(kernels, [source]) if need_weight else placeholder([source])
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy.contiguous(memory_format=torch.channels_last),
        x,
        weight.to(x.dtype),
        [weight.size(1)],
        [2, 2],
        [0, 0],
        [1, 1],
        True,
        [0, 0],
        1,
        [need_source, need_weight, True],
    )
    of_source = SourceGrads(*kernels.resample_bwd(source, dx)) if need_source else SourceGrads()
    return like_parameter(dweight, weight), dbias.to(accumulate_dtype(dy.dtype)), of_source


def gather(kernels: ModuleType, sources: Sequence[Activation]) -> Tensor:
    """The convolution's input, channels_last: the sources' maps side by side."""
    if len(sources) == 1 and not sources[0].pending:
        return sources[0].y.contiguous(memory_format=torch.channels_last)
    x = placeholder(sources)
    channel = 0
    for source in sources:
        channels = source.y.size(1)
        kernels.resample(source, out=x.narrow(1, channel, channels))
        channel += channels
    return x


def placeholder(sources: Sequence[Activation]) -> Tensor:
    """An uninitialised map of the convolution's input's size."""
    channels = sum(s.y.size(1) for s in sources)
    return temporary("input", sources[0].y, channels, sources[0].size)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """3x3, padding 1, without bias; the result is channels_last."""
    x, weight = favoured_layout(x, x, weight)
    y = torch.ops.aten.convolution(x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return y.contiguous(memory_format=torch.channels_last)


def convolution_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    low = weight.to(x.dtype)
    dy, x, low = favoured_layout(x, dy, x, low)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy,
        x,
        low,
        None,
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
        [need_x, need_weight, False],
    )
    if dx is not None:
        dx = dx.contiguous(memory_format=torch.channels_last)
    return dx, like_parameter(dweight, weight)


def like_parameter(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient with its parameter's dtype and strides, as optimizers and DDP want it."""
    if grad is None:
        return None
    if grad.dtype == parameter.dtype and grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def favoured_layout(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The memory format in which PyTorch's convolution is fastest, on the CPU.

    Channels_last, but where the weight is larger than the maps (the deepest levels) oneDNN is up
    to 4x faster on contiguous maps, and converting those costs next to nothing.
    """
    weight = tensors[-1]
    maps = x.numel() // max(1, x.size(1)) * (weight.size(0) + weight.size(1))
    deep = x.device.type == "cpu" and weight.numel() > 2 * maps
    memory_format = torch.contiguous_format if deep else torch.channels_last
    return tuple(t.contiguous(memory_format=memory_format) for t in tensors)


def as_dtype(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)
