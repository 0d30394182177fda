"""BatchNorm over the batches of all processes: the statistics of what a convolution returned."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastunet import backends, reference
from fastunet.activation import Activation
from fastunet.reference.normalization import affine_bwd, statistics_bwd


def sync_norm(
    x: Activation,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    slope: float,
    group: Any,
) -> tuple[Activation, Tensor, Tensor, Tensor]:
    """The same map with the joint statistics' normalisation and an activation pending.

    Every process of the group calls it, and backward, at the same place. The processes may have
    batches of different sizes, none empty.

    Args:
        x: a convolution's output without its bias, [N, C, H, W], nothing pending.
        bias, gamma, beta: [C]; the convolution's bias, which the statistics cancel.
        group: the process group.

    Returns:
        The Activation; mean and var (biased), [C], of all processes' outputs with their bias, and
        how many values they are of, a number: for running statistics.
    """
    center, scale, shift, var, count = SyncNorm.apply(
        x.y, bias, gamma, beta, eps, group, backends.requested()
    )
    output = x._replace(center=center, scale=scale, shift=shift, slope=slope)
    mean = center[0] if bias is None else center[0] + bias.detach()
    return output, mean, var[0], count


class SyncNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        group: Any,
        backend: str,
    ) -> tuple[Tensor, ...]:
        kernels = backends.select(backend, "resample", y)
        with torch.cuda.device_of(y):  # Triton launches on the current device
            mean, _, _, var = kernels.normalization(y, None, None, None, 0, eps)  # of this process
        own = torch.full_like(mean, y.numel() // y.size(1))
        ours = torch.cat([mean, var, own])
        gathered = [torch.empty_like(ours) for _ in range(group.size())]
        dist.all_gather(gathered, ours, group)
        means, variances, counts = torch.stack(gathered).double().unbind(1)  # [processes, C]
        # Merged about the joint mean (Chan, Golub, LeVeque 1979).
        total = counts.sum(0)
        joint = (counts * means).sum(0) / total
        spread = (counts * (variances + (means - joint).square())).sum(0) / total
        center, var = (t.to(mean.dtype)[None] for t in (joint, spread))
        scale = torch.rsqrt(var + eps)
        if gamma is not None:
            scale = scale * gamma
        shift = torch.zeros_like(scale) if beta is None else beta.to(scale.dtype)[None].clone()
        ctx.save_for_backward(y, center, scale, var, own[0] / total)
        count = total[0]
        ctx.mark_non_differentiable(center, var, count)
        ctx.rest = kernels, eps, group
        ctx.like = bias, gamma, beta
        return center, scale, shift, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        _, dscale, dshift, _, _ = grads
        y, center, scale, var, share = ctx.saved_tensors
        kernels, eps, group = ctx.rest
        sums = torch.stack([dscale, dshift])
        dist.all_reduce(sums, group=group)
        # The kernel divides by this process's count.
        joint = (sums * share).to(scale.dtype)
        dy = torch.empty_like(y)
        if kernels is reference:  # which takes statistics of this y alone
            dy.copy_(statistics_bwd(joint[0], joint[1], y, center, scale, var, eps))
        else:
            with torch.cuda.device_of(y):
                kernels.normalization_bwd(None, *joint, y, center, scale, var, 0, eps, dy)
        dgamma, dbeta = affine_bwd(dscale, dshift, var, eps)
        bias, gamma, beta = ctx.like
        return (
            dy,
            None if bias is None else torch.zeros_like(bias),
            None if gamma is None else dgamma.to(gamma.dtype),
            None if beta is None else dbeta.to(beta.dtype),
            *[None] * 3,
        )
