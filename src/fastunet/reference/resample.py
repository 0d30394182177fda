"""resample in plain PyTorch: the definition of an Activation's pending work."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    MAX_POOL,
    NEAREST,
    NONE,
    Activation,
)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-channel values and of arithmetic: fp32, or fp64 for fp64 maps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activate(t: Tensor, slope: float) -> Tensor:
    if slope == 0:
        return F.relu(t)
    return t if slope == 1 else F.leaky_relu(t, slope)


def per_channel(v: Tensor) -> Tensor:
    """[rows, C] -> [rows, C, 1, 1]"""
    return v[:, :, None, None]


def resample(source: Activation, out: Tensor | None = None) -> Tensor:
    """The map that ``source`` stands for, [N, C, *source.size]; written to ``out`` if given.

    Differentiable (without ``out``) with respect to y, scale and shift.
    """
    z = source.y.to(accumulate_dtype(source.y.dtype))
    if source.scale is not None:
        assert source.center is not None
        assert source.shift is not None
        z = per_channel(source.scale) * (z - per_channel(source.center))
        z = activate(z + per_channel(source.shift), source.slope)
    if source.mode == MAX_POOL:
        z = F.max_pool2d(z, 2)
    elif source.mode == NEAREST:
        z = F.interpolate(z, scale_factor=2.0, mode="nearest")
    elif source.mode in (BILINEAR, BILINEAR_ALIGN_CORNERS):
        align_corners = source.mode == BILINEAR_ALIGN_CORNERS
        z = F.interpolate(z, scale_factor=2.0, mode="bilinear", align_corners=align_corners)
    else:
        assert source.mode == NONE
    dy = source.size[0] - z.size(2)
    dx = source.size[1] - z.size(3)
    if dy or dx:
        z = F.pad(z, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
    z = z.to(source.y.dtype)
    if out is not None:
        return out.copy_(z)
    return z.contiguous(memory_format=torch.channels_last)


def resample_bwd(source: Activation, dz: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy, dscale, dshift of the reader whose input gradient is dz, [N, C, *source.size]."""
    inputs = [t for t in (source.y, source.scale, source.shift) if t is not None]
    dy, *vectors = gradients(lambda y, *v: resample(with_inputs(source, y, *v)), inputs, dz)
    dscale, dshift = vectors or (None, None)
    return dy.contiguous(memory_format=torch.channels_last), dscale, dshift


def with_inputs(source: Activation, y: Tensor, *vectors: Tensor) -> Activation:
    if not vectors:
        return source._replace(y=y)
    return source._replace(y=y, scale=vectors[0], shift=vectors[1])


def autograd_inside_operators() -> Any:
    """Lifts the exclusion of autograd that is in force while an operator's kernel runs."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradOther", "AutogradNestedTensor", "AutogradCPU", "AutogradCUDA"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The vector-Jacobian product of a plain PyTorch function, by autograd."""
    with torch.enable_grad(), autograd_inside_operators():
        leaves = [t.detach().requires_grad_() for t in inputs]
        results = torch.autograd.grad(function(*leaves), leaves, grad)
    # Outputs of operators may not alias their inputs: the sum of a single value is a view of it.
    storage = grad.untyped_storage()._cdata
    return [g.clone() if g.untyped_storage()._cdata == storage else g for g in results]
