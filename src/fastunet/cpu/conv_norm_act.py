"""Convolutions by the compiled Winograd kernels (csrc/conv_norm_act)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.extension import kernels

from .resample import channel_adjacent, empty_map

if TYPE_CHECKING:
    from fastunet.composed import Norm

NO_SOURCE = (None, None, None, None, 1.0, 0)


def convolves(x: Tensor) -> bool:
    """Whether the kernels serve maps like ``x``.

    They compute in fp32 by Winograd's algorithm, whose error is about twice that of summing
    directly. For fp64, and where a user asks for ``ieee`` precision
    (``torch.backends.mkldnn.conv.fp32_precision``), PyTorch's convolution does the work.
    """
    if x.dtype == torch.float64:
        return False
    return torch.backends.mkldnn.conv.fp32_precision != "ieee"  # type: ignore[attr-defined]


def conv_norm_act(
    sources: Sequence[Activation], weight: Tensor, bias: Tensor | None, norm: "Norm"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, center, scale, shift, var."""
    source = sources[0]
    channels = weight.size(0)
    y = empty_map(source.y, channels, source.size)
    rows = y.size(0) if norm.kind == "group" else 1
    center, scale, shift, var = (
        weight.new_empty((rows, channels), dtype=torch.float32) for _ in range(4)
    )
    kernels().conv_norm_act(
        y,
        *flatten(sources),
        as_kernel_weight(weight),
        norm.kind,
        *(None if t is None else t.float().contiguous() for t in (bias, *norm[1:5])),
        norm.groups,
        norm.eps,
        center,
        scale,
        shift,
        var,
    )
    return y, center, scale, shift, var


def convolution_input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    dy = channel_adjacent(dy)
    dx = empty_map(dy, weight.size(1), (dy.size(2), dy.size(3)))
    kernels().convolution_input_grad(dx, dy, as_kernel_weight(weight))
    return dx


def convolution_weight_grad(dy: Tensor, sources: Sequence[Activation], weight: Tensor) -> Tensor:
    dweight = torch.empty(weight.shape, dtype=torch.float32)
    kernels().convolution_weight_grad(dweight, channel_adjacent(dy), *flatten(sources))
    return dweight


def as_kernel_weight(weight: Tensor) -> Tensor:
    """fp32, taps and input channels adjacent: so a slice of a contiguous weight is not copied."""
    weight = weight.float()
    return weight if weight.stride()[1:] == (9, 3, 1) else weight.contiguous()


def flatten(sources: Sequence[Activation]) -> tuple:
    return sum(map(flat, sources), ()) + NO_SOURCE * (2 - len(sources))


def flat(source: Activation) -> tuple:
    y, center, scale, shift, slope, mode = source[:6]
    vectors = (None if v is None else v.contiguous() for v in (center, scale, shift))
    return channel_adjacent(y), *vectors, slope, mode
