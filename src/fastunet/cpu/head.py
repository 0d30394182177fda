"""head by the compiled kernels (csrc/head)."""

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.compiled import NO_GRADS, empty_grads, flat
from fastunet.extension import kernels


def head(source: Activation, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    kernels().head(out, *flat(source)[:-1], weight, bias)


def head_bwd(
    source: Activation, weight: Tensor, dlogits: Tensor, need_source: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.size(0))
    of_source = empty_grads(source) if need_source else NO_GRADS
    kernels().head_bwd(*of_source, dweight, dbias, dlogits, *flat(source)[:-1], weight)
    return *of_source, dweight, dbias
