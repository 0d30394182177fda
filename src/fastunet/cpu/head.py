"""head by the compiled kernels (csrc/head); with many classes, as a matrix product."""

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.compiled import NO_GRADS, empty_grads, flat
from fastunet.extension import kernels

from .passes import PASSES

MAX_CLASSES = 8  # kMaxClasses of csrc/head


def head(source: Activation, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if weight.size(0) > MAX_CLASSES:
        return PASSES.head(source, weight, bias, out)
    kernels().head(out, *flat(source)[:-1], weight, bias)


def head_bwd(
    source: Activation, weight: Tensor, dlogits: Tensor, need_source: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    if weight.size(0) > MAX_CLASSES:
        return PASSES.head_bwd(source, weight, dlogits, need_source)
    dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.size(0))
    of_source = empty_grads(source) if need_source else NO_GRADS
    kernels().head_bwd(*of_source, dweight, dbias, dlogits, *flat(source)[:-1], weight)
    return *of_source, dweight, dbias
