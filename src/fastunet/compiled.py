"""What compiled kernels offer a backend around PyTorch's convolutions, on the CPU and on GPUs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activation import Activation
from .maps import as_rows, channel_adjacent, empty_map, empty_vectors
from .reference.resample import accumulate_dtype

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]  # dy, dscale, dshift
NO_GRADS: Grads = (None, None, None)


def flat(source: Activation) -> tuple:
    """y, center, scale, shift, slope, mode, as the kernels take them."""
    y, center, scale, shift, slope, mode = source[:6]
    vectors = (None if v is None else v.contiguous() for v in (center, scale, shift))
    return channel_adjacent(y), *vectors, slope, mode


def empty_grads(source: Activation) -> Grads:
    """dy, dscale, dshift of a source, to be written."""
    y = source.y
    dy = empty_map(y, y.size(1), (y.size(2), y.size(3)))
    return (dy, None, None) if source.scale is None else (dy, *empty_vectors(source.scale))


def empty_map_grad(source: Activation) -> Tensor | None:
    """Scratch for the gradient of the map that a source stands for; none where it is that of y."""
    if not source.resampling_pending:
        return None
    return empty_map(source.y, source.y.size(1), source.size)


class Passes:
    """The kernels that read and write maps once, and products by PyTorch between them.

    kernels: from a tensor to the namespace of the operators that serve it.
    """

    def __init__(self, kernels: Callable[[Tensor], Any]) -> None:
        self.kernels = kernels

    def resample(self, source: Activation, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = empty_map(source.y, source.y.size(1), source.size)
        self.kernels(out).resample(out, *flat(source))
        return out

    def resample_bwd(self, source: Activation, dz: Tensor) -> Grads:
        grads = empty_grads(source)
        self.kernels(dz).resample_bwd(*grads, channel_adjacent(dz), *flat(source))
        return grads

    def resample_with_bwd(self, source: Activation, dz: Tensor) -> tuple[Tensor, Grads]:
        """The map that a source stands for, and ``resample_bwd``."""
        return self.resample(source), self.resample_bwd(source, dz)

    def normalization(
        self,
        y: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        groups: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = (y.size(0) if groups else 1, y.size(1))
        vectors = [y.new_empty(shape, dtype=accumulate_dtype(y.dtype)) for _ in range(4)]
        self.kernels(y).normalization(y, bias, gamma, beta, groups, eps, *vectors)
        return tuple(vectors)  # type: ignore[return-value]

    def normalization_bwd(
        self,
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
        if dy is not None:
            dy = dy.contiguous(memory_format=torch.channels_last)
        dgamma, dbeta = (center.new_empty(center.size(1)) for _ in range(2))
        self.kernels(y).normalization_bwd(
            out, dgamma, dbeta, dy, dscale, dshift, y, center, scale, var, groups, eps
        )
        return dgamma, dbeta

    def head(self, source: Activation, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Writes the logits, as a product of matrices; weight: [K, C]."""
        z = self.resample(source)
        logits = torch.mm(as_rows(z), weight.to(z.dtype).T)
        if bias is not None:
            logits += bias
        n, k, h, w = out.shape
        out.copy_(logits.view(n, h, w, k).permute(0, 3, 1, 2))

    def head_bwd(
        self, source: Activation, weight: Tensor, dlogits: Tensor, need_source: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
        """dy, dscale, dshift, dweight, dbias."""
        rows = as_rows(dlogits)
        if need_source:
            n, c, h, w = source.y.shape
            dz = torch.mm(rows, weight.to(rows.dtype)).view(n, h, w, c).permute(0, 3, 1, 2)
            z, of_source = self.resample_with_bwd(source, dz)
        else:
            z, of_source = self.resample(source), NO_GRADS
        dweight = torch.mm(rows.T, as_rows(z)).to(weight.dtype)
        return *of_source, dweight, rows.sum(0, dtype=weight.dtype)
