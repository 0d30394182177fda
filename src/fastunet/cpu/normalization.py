"""Statistics of a convolution's output and the normalisation's backward (csrc/conv_norm_act)."""

import torch
from torch import Tensor

from fastunet.extension import kernels
from fastunet.reference.resample import accumulate_dtype


def normalization(
    y: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = y.size(0) if groups else 1
    vectors = [y.new_empty((rows, y.size(1)), dtype=accumulate_dtype(y.dtype)) for _ in range(4)]
    kernels().normalization(y, bias, gamma, beta, groups, eps, *vectors)
    return tuple(vectors)  # type: ignore


def normalization_bwd(
    dy: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
    y: Tensor,
    center: Tensor,
    scale: Tensor,
    var: Tensor,
    groups: int,
    eps: float,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    if dy is not None:
        dy = dy.contiguous(memory_format=torch.channels_last)
    dgamma, dbeta = (center.new_empty(center.size(1)) for _ in range(2))
    kernels().normalization_bwd(
        out, dgamma, dbeta, dy, dscale, dshift, y, center, scale, var, groups, eps
    )
    return dgamma, dbeta
