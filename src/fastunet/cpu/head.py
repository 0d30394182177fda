"""head by the compiled kernels (csrc/head); with many classes, as a matrix product."""

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.extension import kernels
from fastunet.maps import as_rows, empty_map, empty_vectors

from .resample import kernel_arguments, resample, resample_bwd

MAX_CLASSES = 8  # kMaxClasses of csrc/head


def head(source: Activation, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if weight.size(0) <= MAX_CLASSES:
        kernels().head(out, *kernel_arguments(source), weight, bias)
        return
    z = resample(source)
    logits = torch.mm(as_rows(z), weight.to(z.dtype).T)
    if bias is not None:
        logits += bias
    n, k, h, w = out.shape
    out.copy_(logits.view(n, h, w, k).permute(0, 3, 1, 2))


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
            dscale, dshift = empty_vectors(source.scale)
    kernels().head_bwd(dy, dscale, dshift, dweight, dbias, dlogits, y, *rest, weight)
    return dy, dscale, dshift, dweight, dbias


def _head_bwd_gemm(source: Activation, weight: Tensor, dlogits: Tensor, need_source: bool):
    z = resample(source)
    rows = as_rows(dlogits)
    dweight = torch.mm(rows.T, as_rows(z)).to(weight.dtype)
    dbias = rows.sum(0, dtype=weight.dtype)
    of_source: tuple = (None, None, None)
    if need_source:
        n, c, h, w = z.shape
        dz = torch.mm(rows, weight.to(z.dtype)).view(n, h, w, c).permute(0, 3, 1, 2)
        of_source = resample_bwd(source, dz)
    return *of_source, dweight, dbias
