"""Convolutions by the compiled Winograd kernels (csrc/conv_norm_act)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastunet.activation import Activation
from fastunet.compiled import NO_GRADS, Grads, empty_grads, empty_map_grad, flat
from fastunet.composed import as_dtype
from fastunet.extension import kernels
from fastunet.maps import empty_map, empty_parameter_grad
from fastunet.prepared import is_keeping, prepared

if TYPE_CHECKING:
    from fastunet.composed import Norm, SourceGrads

NO_SOURCE = (None, None, None, None, 1.0, 0)
NO_SOURCE_GRADS = (*NO_GRADS, None)  # dy, dscale, dshift and scratch


def convolves(kind: str, sources: Sequence[Activation], weight: Tensor) -> bool:
    """Whether the kernels convolve here, or leave that to PyTorch.

    They compute in fp32 by Winograd's algorithm, whose error is two to five times that of summing
    directly. For fp64, and where a user asks for ``ieee`` precision
    (``torch.backends.mkldnn.conv.fp32_precision``), PyTorch's convolution does the work.
    """
    if sources[0].y.dtype == torch.float64:
        return False
    return torch.backends.mkldnn.conv.fp32_precision != "ieee"  # type: ignore[attr-defined]


def conv_norm_act(
    sources: Sequence[Activation], weight: Tensor, bias: Tensor | None, norm: "Norm"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, center, scale, shift, var."""
    source = sources[0]
    channels = weight.size(0)
    y = empty_map(source.y, channels, source.size)
    rows = y.size(0) if norm.kind == "group" else 1
    center, scale, shift, var = (
        weight.new_empty((rows, channels), dtype=torch.float32) for _ in range(4)
    )
    kernels().conv_norm_act(
        y,
        *flatten(sources),
        as_kernel_weight(weight),
        norm.kind,
        *vectors(bias, norm),
        norm.groups,
        norm.eps,
        center,
        scale,
        shift,
        var,
    )
    return y, center, scale, shift, var


# Pixels for whose products a packed weight, four times as large, comes from memory in time; for
# 16x16 it does not: captured inference of a 128x128 image at base 64 took 1.08 of the time.
FEWEST_PACKED = 512


def conv_norm_act_folded(
    sources: Sequence[Activation],
    weight: Tensor,
    bias: Tensor | None,
    norm: "Norm",
    slope: float,
) -> Tensor:
    """The output with its normalisation and activation done."""
    z = empty_map(sources[0].y, weight.size(0), sources[0].size)
    kernels().conv_norm_act_folded(
        z,
        *flatten(sources),
        as_kernel_weight(weight),
        packed(weight, z.size(0), sources[0].size),
        norm.kind,
        *vectors(bias, norm),
        norm.eps,
        slope,
    )
    return z


def packed(weight: Tensor, samples: int, size: tuple[int, int]) -> Tensor | None:
    """A parameter in Winograd's domain, for so many maps of this size; None where nobody keeps it,
    or where it is faster transformed each time."""
    if not is_keeping() or not isinstance(weight, nn.Parameter) or weight.is_inference():
        return None
    if samples * size[0] * size[1] < FEWEST_PACKED:
        return None
    key = ("winograd", weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, size)
    return prepared(key, lambda: kernels().pack_weight(as_kernel_weight(weight), *size))


def vectors(bias: Tensor | None, norm: "Norm") -> list[Tensor | None]:
    """bias, gamma, beta and the running statistics, as the kernels take them."""
    return [as_dtype(t, torch.float32) for t in (bias, *norm[1:5])]


def conv_norm_act_bwd(
    grads: "SourceGrads",
    sources: Sequence[Activation],
    needs: Sequence[bool],
    weight: Tensor,
    norm: "Norm",
    y: Tensor | None,
    center: Tensor,
    scale: Tensor,
    var: Tensor,
) -> tuple[Tensor | None, Tensor, Tensor, list[Grads]]:
    """dweight, dgamma, dbeta, and each source's dy, dscale, dshift."""
    dy, dscale, dshift = grads
    if dy is None:
        dy = empty_map(sources[0].y, weight.size(0), sources[0].size).zero_()
    dweight = empty_parameter_grad(weight) if needs[0] else None
    dgamma, dbeta = (center.new_empty(center.size(1)) for _ in range(2))
    to_sources = [
        (*empty_grads(source), empty_map_grad(source)) if need else NO_SOURCE_GRADS
        for source, need in zip(sources, needs[1:], strict=True)
    ]
    kernels().conv_norm_act_bwd(
        dweight,
        dgamma,
        dbeta,
        *to_sources[0],
        *(to_sources[1] if len(sources) == 2 else NO_SOURCE_GRADS),
        dy.contiguous(memory_format=torch.channels_last),
        dscale,
        dshift,
        *flatten(sources),
        as_kernel_weight(weight),
        norm.kind,
        norm.groups,
        norm.eps,
        y,
        center,
        scale,
        var,
        False,
    )
    return dweight, dgamma, dbeta, [to[:3] for to in to_sources]


def as_kernel_weight(weight: Tensor) -> Tensor:
    """fp32, taps and input channels adjacent: so a slice of a contiguous weight is not copied."""
    if weight.dtype != torch.float32:
        weight = weight.float()
    return weight if weight.stride()[1:] == (9, 3, 1) else weight.contiguous()


def flatten(sources: Sequence[Activation]) -> tuple:
    return sum(map(flat, sources), ()) + NO_SOURCE * (2 - len(sources))
