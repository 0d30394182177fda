"""conv_transpose in plain PyTorch: the 2x2 stride 2 transposed convolution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunet.activation import Activation

from .resample import resample, resample_bwd

GEOMETRY = ([2, 2], [0, 0], [1, 1], True, [0, 0], 1)  # stride, padding, ..., transposed


def conv_transpose(source: Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N, Cout, 2H, 2W], channels_last; weight: [Cin, Cout, 2, 2], bias: [Cout] in y's dtype."""
    y = torch.ops.aten.convolution(resample(source), weight, bias, *GEOMETRY)
    return y.contiguous(memory_format=torch.channels_last)


def conv_transpose_bwd(
    source: Activation, weight: Tensor, dy: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dweight, dbias, then dy, dscale, dshift of the source; needs: weight, source."""
    need_weight, need_source = needs
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy.contiguous(memory_format=torch.channels_last),
        resample(source),
        weight,
        [weight.size(1)],
        *GEOMETRY,
        [need_source, need_weight, True],
    )
    return dweight, dbias, *(resample_bwd(source, dx) if need_source else (None, None, None))
