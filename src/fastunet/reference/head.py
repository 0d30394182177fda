"""head in plain PyTorch: the 1x1 convolution to the logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.activation import Activation

from .resample import accumulate_dtype, gradients, resample, with_inputs


def head(source: Activation, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes the logits, [N, K, H, W]; weight: [K, C], bias: [K], both fp32 (fp64 for fp64)."""
    out.copy_(_head(source, weight, bias))


def _head(source: Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = resample(source).to(weight.dtype)
    return F.conv2d(z, weight[:, :, None, None], bias).to(source.y.dtype)


def head_bwd(
    source: Activation, weight: Tensor, dlogits: Tensor, need_source: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """dy, dscale, dshift, dweight, dbias."""
    bias = weight.new_zeros(weight.size(0), dtype=accumulate_dtype(source.y.dtype))
    inputs = [source.y, source.scale, source.shift] if source.scale is not None else [source.y]

    def function(weight: Tensor, bias: Tensor, *of_source: Tensor) -> Tensor:
        return _head(with_inputs(source, *of_source), weight, bias)

    dweight, dbias, dy, *vectors = gradients(function, [weight, bias, *inputs], dlogits)
    dscale, dshift = vectors or (None, None)
    if not need_source:
        return None, None, None, dweight, dbias
    dy = dy.contiguous(memory_format=torch.channels_last)
    return dy, dscale, dshift, dweight, dbias
