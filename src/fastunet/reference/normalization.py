"""Normalisation in plain PyTorch: center, scale and shift from a convolution's output."""

import torch
from torch import Tensor

from .resample import accumulate_dtype, gradients, per_channel


def normalization(
    y: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """center, scale, shift, var of y, each [rows, C].

    ``z = scale * (y - center) + shift`` is the normalised ``y + bias``. groups = 0: statistics over
    the batch (one row); otherwise per sample over groups of channels (a row per sample; as many
    groups as channels is InstanceNorm). var is biased, without eps.
    """
    t = y.to(accumulate_dtype(y.dtype))
    n, c = t.shape[:2]
    offset = 0 if bias is None or groups in (0, c) else bias  # elsewhere it moves the mean alone
    if t.numel() == 0:
        mean = var = t.new_zeros((n if groups else 1, c))
    elif groups in (0, c):
        dims = (0, 2, 3) if groups == 0 else (2, 3)
        mean = t.mean(dims).view(-1, c)
        var = t.var(dims, unbiased=False).view(-1, c)
    else:
        shifted = t if bias is None else t + bias[:, None, None]
        grouped = shifted.reshape(n, groups, -1)
        each = (n, groups, c // groups)
        mean = grouped.mean(2, keepdim=True)
        var = grouped.var(2, unbiased=False, keepdim=True)
        # One group expands to a view that is not contiguous.
        mean, var = (s.expand(each).reshape(n, c).contiguous() for s in (mean, var))
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = torch.zeros_like(scale) if beta is None else beta.expand_as(scale).clone()
    return mean - offset, scale, shift, var


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
    """Writes to ``out`` the gradient of y: what its readers returned at fixed center, scale and
    shift, plus what flows through the statistics (dshift stands for -dcenter / scale).
    Returns dgamma, dbeta, [C]."""
    if y.numel() == 0 or (dscale is None and dshift is None):
        out.zero_() if dy is None else out.copy_(dy)
        return affine_bwd(dscale, dshift, var, eps)
    gamma = scale * torch.sqrt(var + eps)

    def statistics(t: Tensor) -> Tensor:
        # Rows that share statistics share the mean of y - center too, which is 0 at this y.
        mean, s, _, _ = normalization(t, None, None, None, groups, eps)
        loss = t.new_zeros((), dtype=scale.dtype)
        if dscale is not None:
            loss = loss + (dscale * s * gamma).sum()
        if dshift is not None:
            loss = loss - (dshift * scale * mean).sum()
        return loss

    # A convolution's bias moves group statistics: take them of y - center, where it is undone.
    t = y.to(scale.dtype) - per_channel(center)
    (through,) = gradients(statistics, [t], torch.ones((), dtype=scale.dtype, device=y.device))
    total = through if dy is None else through + dy
    out.copy_(total)
    return affine_bwd(dscale, dshift, var, eps)


def statistics_bwd(
    dscale: Tensor,
    dshift: Tensor,
    y: Tensor,
    center: Tensor,
    scale: Tensor,
    var: Tensor,
    eps: float,
) -> Tensor:
    """What flows to y through the statistics of a batch, center and var, of which y may be a part:
    the formula of docs/design.md."""
    count = y.numel() // y.size(1)
    deviation = y.to(scale.dtype) - per_channel(center)
    slope = per_channel(scale * dscale / (var + eps) / count)
    return -slope * deviation - per_channel(scale * dshift / count)


def affine_bwd(
    dscale: Tensor | None, dshift: Tensor | None, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """dgamma, dbeta: scale = gamma / sqrt(var + eps), shift = beta."""
    zero = var.new_zeros(var.size(1))
    dgamma = zero if dscale is None else (dscale * torch.rsqrt(var + eps)).sum(0)
    return dgamma, zero.clone() if dshift is None else dshift.sum(0)
