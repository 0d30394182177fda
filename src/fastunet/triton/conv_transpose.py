"""Transposed convolution by the Triton kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.composed import as_dtype
from fastunet.maps import empty_map

from . import convolution, selection
from .conv_norm_act import readable, source_grad, sum_weight_grad
from .convolution import TRANSPOSED, TRANSPOSED_GRAD, Place, convolve
from .language import as_source
from .resample import resample
from .selection import ON_LOAD


def conv_transpose(source: Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
    height, width = source.size
    y = empty_map(source.y, weight.size(1), (2 * height, 2 * width))
    on_load = selection.choice("conv_transpose", [source], weight.size(1)) == ON_LOAD
    read = [readable(source, on_load)]
    config = convolution.configuration(TRANSPOSED, read, source.size, y.size(1))
    bias = as_dtype(bias, torch.float32)
    convolve(TRANSPOSED, config, read, weight, 1, source.size, y, bias=bias)
    return y


def conv_transpose_bwd(
    dy: Tensor, source: Activation, needs: Sequence[bool], weight: Tensor
) -> tuple[Tensor | None, Tensor, tuple[Tensor | None, ...]]:
    """dweight, dbias and the source's dy, dscale, dshift; needs: weight, source."""
    need_weight, need_source = needs
    dweight = None
    if need_weight:
        dweight = weight.new_empty(weight.shape, dtype=torch.float32)
        # The kernel reads this operand at its own pixels: nothing may be placed elsewhere.
        on_load = selection.choice("conv_transpose_bwd", [source], weight.size(1)) == ON_LOAD
        if source.resampling_pending:
            centre = as_source(resample(source))
        else:
            centre, _ = readable(source, on_load)
        grid = dy[:, :, ::2, ::2]
        tapped = as_source(dy), Place(*dy.shape[2:])
        sum_weight_grad(TRANSPOSED_GRAD, tapped, centre, grid, dweight)
    of_source: tuple[Tensor | None, ...] = (None, None, None)
    if need_source:
        of_source = source_grad(TRANSPOSED_GRAD, dy, source, weight, 0)
    return dweight, dy.sum((0, 2, 3), dtype=torch.float32), of_source
