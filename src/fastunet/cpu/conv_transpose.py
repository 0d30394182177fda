"""Transposed convolution by the compiled kernels (csrc/conv_transpose)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.compiled import NO_GRADS, empty_grads, empty_map_grad, flat
from fastunet.composed import as_dtype
from fastunet.extension import kernels
from fastunet.maps import channel_adjacent, empty_map, empty_parameter_grad


def conv_transpose(source: Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
    height, width = source.size
    y = empty_map(source.y, weight.size(1), (2 * height, 2 * width))
    bias = as_dtype(bias, torch.float32)
    kernels().conv_transpose(y, *flat(source), weight.float().contiguous(), bias)
    return y


def conv_transpose_bwd(
    dy: Tensor, source: Activation, needs: Sequence[bool], weight: Tensor
) -> tuple[Tensor | None, Tensor, tuple[Tensor | None, ...]]:
    """dweight, dbias and the source's dy, dscale, dshift; needs: weight, source."""
    dweight = empty_parameter_grad(weight) if needs[0] else None
    dbias = torch.empty(weight.size(1))
    of_source = empty_grads(source) if needs[1] else NO_GRADS
    kernels().conv_transpose_bwd(
        dweight,
        dbias,
        *of_source,
        empty_map_grad(source) if needs[1] else None,
        channel_adjacent(dy),
        *flat(source),
        weight.float().contiguous(),
    )
    return dweight, dbias, of_source
