"""A convolution's weight turned around, for the input's gradient (csrc/conv_norm_act)."""

from torch import Tensor

from fastunet.extension import kernels


def turn_weight(weight: Tensor) -> Tensor:
    o, i, kh, kw = weight.shape
    out = weight.new_empty((i, kh, kw, o)).permute(0, 3, 1, 2)
    kernels().turn_weight(out, weight.contiguous())
    return out
