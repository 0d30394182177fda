"""head by the compiled kernels (csrc/head); with many classes, as a matrix product."""

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.extension import kernels

from .resample import empty_map, kernel_arguments, resample, resample_bwd

MAX_CLASSES = 8  # kMaxClasses of csrc/head


def head(source: Activation, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if weight.size(0) <= MAX_CLASSES:
        kernels().head(out, *kernel_arguments(source), weight, bias)
        return
    z = resample(source)
    low_bias = None if bias is None else bias.to(z.dtype)
    out.copy_(torch.conv2d(z, weight.to(z.dtype)[:, :, None, None], low_bias))


def head_bwd(
    source: Activation, weight: Tensor, dlogits: Tensor, need_source: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    if weight.size(0) > MAX_CLASSES:
        return _head_bwd_gemm(source, weight, dlogits, need_source)
    y, *rest = kernel_arguments(source)
    dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.size(0))
    dy = dscale = dshift = None
    if need_source:
        dy = empty_map(y, y.size(1), (y.size(2), y.size(3)))
        if source.scale is not None:
            dscale, dshift = torch.empty_like(source.scale), torch.empty_like(source.scale)
    kernels().head_bwd(dy, dscale, dshift, dweight, dbias, dlogits, y, *rest, weight)
    return dy, dscale, dshift, dweight, dbias


def _head_bwd_gemm(source: Activation, weight: Tensor, dlogits: Tensor, need_source: bool):
    z = resample(source)
    dz, dweight, dbias = torch.ops.aten.convolution_backward(
        dlogits,
        z,
        weight.to(z.dtype)[:, :, None, None],
        [weight.size(0)],
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [need_source, True, True],
    )
    of_source = resample_bwd(source, dz) if need_source else (None, None, None)
    return *of_source, dweight.view_as(weight).to(weight.dtype), dbias.to(weight.dtype)
