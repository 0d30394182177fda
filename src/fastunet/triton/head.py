"""head by the Triton kernels: a convolution of one tap."""

import torch
from torch import Tensor

from fastunet.activation import Activation

from . import convolution
from .conv_norm_act import readable, source_grad, sum_weight_grad
from .convolution import POINTWISE, convolve
from .language import as_source
from .selection import MOST_ON_LOAD


def on_load(source: Activation) -> bool:
    return source.y.size(1) <= MOST_ON_LOAD


def head(source: Activation, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes the logits, [N, K, H, W], in either memory format; weight: [K, C]."""
    read = [readable(source, on_load(source))]
    config = convolution.configuration(POINTWISE, read, source.size, out.size(1))
    convolve(POINTWISE, config, read, weight[:, :, None], 0, source.size, out, bias=bias)


def head_bwd(
    source: Activation, weight: Tensor, dlogits: Tensor, need_source: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """dy, dscale, dshift, dweight, dbias."""
    dweight = torch.empty_like(weight)
    grad = as_source(dlogits)
    sum_weight_grad(
        POINTWISE, readable(source, on_load(source)), grad, dlogits, dweight[:, :, None]
    )
    of_source: tuple[Tensor | None, ...] = (None, None, None)
    if need_source:
        of_source = source_grad(POINTWISE, dlogits, source, weight[:, :, None], 1)
    return *of_source, dweight, dlogits.sum((0, 2, 3), dtype=torch.float32)  # type: ignore[return-value]
