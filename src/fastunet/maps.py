"""Maps as kernels want them: channels_last tensors, and the vectors beside them."""

import torch
from torch import Tensor


def channel_adjacent(x: Tensor) -> Tensor:
    """x itself where its channel stride is 1 (a channel slice of a channels_last map has that)."""
    if x.stride(1) == 1 or x.size(1) == 1 or x.numel() == 0:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.empty(
        (like.size(0), channels, *size),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def empty_vectors(scale: Tensor) -> tuple[Tensor, Tensor]:
    """dscale and dshift, dense; storages of their own, as operators' outputs may not alias."""
    return scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def as_rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C], a view where channels are adjacent"""
    return x.permute(0, 2, 3, 1).reshape(-1, x.size(1))
