"""conv_norm_act and conv_transpose: PyTorch's own convolutions, a backend's kernels around them.

``kernels`` is a backend module: resample, resample_bwd, normalization, normalization_bwd. The
sources are materialised into a temporary map, and again in backward: nothing but the convolutions'
outputs is ever saved.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

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
    vectors = center.dtype
    grads = SourceGrads(grads.dy, as_dtype(grads.dscale, vectors), as_dtype(grads.dshift, vectors))
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
    dbias = dbias_of(norm, bias, grads, y, center, scale, var)

    # Source by source, so that neither the concatenation nor its gradient exists.
    dweights, of_sources, channel = [], [], 0
    need_weight, *need_sources = needs
    for source, need_source in zip(sources, need_sources, strict=True):
        part = weight.narrow(1, channel, source.y.size(1))
        channel += source.y.size(1)
        if need_weight:
            dweights.append(conv_weight_grad(total, gather(kernels, [source]), part))
        grads_of_source = SourceGrads()
        if need_source:
            dx = conv_input_grad(kernels, total, part)
            grads_of_source = SourceGrads(*kernels.resample_bwd(source, dx))
        of_sources.append(grads_of_source)
    dweight = like_parameter(torch.cat(dweights, 1), weight) if need_weight else None
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


# stride, padding, dilation, transposed, output padding, groups
CONVOLUTION = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
TRANSPOSED = ([2, 2], [0, 0], [1, 1], True, [0, 0], 1)


def conv_transpose(
    kernels: ModuleType, source: Activation, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The 2x2 stride 2 transposed convolution of a source, channels_last."""
    x = gather(kernels, [source])
    low, low_bias = weight.to(x.dtype), as_dtype(bias, x.dtype)
    y = torch.ops.aten.convolution(x, low, low_bias, *TRANSPOSED)
    return y.contiguous(memory_format=torch.channels_last)


def conv_transpose_bwd(
    kernels: ModuleType, dy: Tensor, source: Activation, needs: Sequence[bool], weight: Tensor
) -> tuple[Tensor | None, Tensor, SourceGrads]:
    """dweight, dbias and the source's gradients; needs: weight, source."""
    need_weight, need_source = needs
    x = gather(kernels, [source])
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        x,
        weight.to(x.dtype),
        [weight.size(1)],
        *TRANSPOSED,
        [need_source, need_weight, True],
    )
    of_source = SourceGrads(*kernels.resample_bwd(source, dx)) if need_source else SourceGrads()
    return like_parameter(dweight, weight), dbias.to(accumulate_dtype(dy.dtype)), of_source


def gather(kernels: ModuleType, sources: Sequence[Activation]) -> Tensor:
    """The convolution's input, channels_last: the sources' maps side by side."""
    if len(sources) == 1 and not sources[0].pending:
        return sources[0].y.contiguous(memory_format=torch.channels_last)
    y, channel = sources[0].y, 0
    x = torch.empty(
        (y.size(0), sum(s.y.size(1) for s in sources), *sources[0].size),
        dtype=y.dtype,
        device=y.device,
        memory_format=torch.channels_last,
    )
    for source in sources:
        channels = source.y.size(1)
        kernels.resample(source, out=x.narrow(1, channel, channels))
        channel += channels
    return x


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """3x3, padding 1, without bias; the result is channels_last."""
    (x,) = favoured_layout(weight, x, deep=16)
    y = torch.ops.aten.convolution(x, weight, None, *CONVOLUTION)
    return y.contiguous(memory_format=torch.channels_last)


def conv_input_grad(kernels: ModuleType, dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the convolution's input, channels_last."""
    channels = weight.size(1)
    low = weight.to(dy.dtype)
    if low.numel() < dy.numel():
        # A convolution with the weight turned around. convolution_backward does the same, but it
        # wants the input in memory, although it does not read it.
        return convolution(dy, kernels.turn_weight(low))
    unread = dy.new_empty((dy.size(0), channels, dy.size(2), dy.size(3)))
    dy, unread = favoured_layout(low, dy, unread, deep=2.5)
    dx = torch.ops.aten.convolution_backward(
        dy, unread, low, None, *CONVOLUTION, [True, False, False]
    )[0]
    return dx.contiguous(memory_format=torch.channels_last)


def conv_weight_grad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    low = weight.to(x.dtype)
    dy, x = favoured_layout(low, dy, x, deep=2.5)
    return torch.ops.aten.convolution_backward(
        dy, x, low, None, *CONVOLUTION, [False, True, False]
    )[1]


def like_parameter(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient with its parameter's dtype and strides, as optimizers and DDP want it."""
    if grad is None:
        return None
    if grad.dtype == parameter.dtype and grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def favoured_layout(weight: Tensor, *maps: Tensor, deep: float) -> tuple[Tensor, ...]:
    """The maps in the memory format in which PyTorch's convolution is fastest.

    Channels_last, but on the CPU contiguous where the weight is more than ``deep`` times larger
    than the maps (the lowest levels of wide networks): there oneDNN is up to 4x faster on
    contiguous maps, and converting those costs next to nothing.
    """
    pixels = maps[0].numel() // max(1, maps[0].size(1))
    contiguous = (
        weight.device.type == "cpu"
        and weight.numel() > deep * (weight.size(0) + weight.size(1)) * pixels
    )
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    return tuple(t.contiguous(memory_format=memory_format) for t in maps)


def as_dtype(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()
