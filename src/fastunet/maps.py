"""Maps as kernels want them: channels_last tensors, and the vectors beside them."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from . import extension

# Bytes from which a map on the CPU comes from the kernels' own memory (csrc/maps).
LEAST_KEPT = 64 << 10
_by_pytorch = False


def channel_adjacent(x: Tensor) -> Tensor:
    """x itself where its channel stride is 1 (a channel slice of a channels_last map has that)."""
    if x.stride(1) == 1 or x.size(1) == 1 or x.numel() == 0:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def empty_map(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """A map to be written, of the samples, dtype and device of ``like``."""
    height, width = size
    if in_map_memory(like, like.size(0) * channels * height * width):
        return extension.kernels().empty_map(like, channels, height, width)
    return torch.empty(
        (like.size(0), channels, *size),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def empty_parameter_grad(parameter: Tensor) -> Tensor:
    """The gradient of a weight on the CPU to be written, contiguous, fp32."""
    if parameter.dtype == torch.float32 and in_map_memory(parameter, parameter.numel()):
        return extension.kernels().empty_contiguous(parameter)
    return torch.empty(parameter.shape, dtype=torch.float32)


def in_map_memory(like: Tensor, count: int) -> bool:
    """Whether so many elements like these come from the memory for maps."""
    return (
        like.device.type == "cpu"
        and type(like) in (Tensor, nn.Parameter)
        and count * like.element_size() >= LEAST_KEPT
        and not _by_pytorch
        and not torch.are_deterministic_algorithms_enabled()  # which may fill what is empty
        and extension.load()[0] is not None
    )


@contextlib.contextmanager
def allocated_by_pytorch() -> Iterator[None]:
    """Within this context PyTorch allocates all maps, and so can count them."""
    global _by_pytorch
    before, _by_pytorch = _by_pytorch, True
    try:
        yield
    finally:
        _by_pytorch = before


def are_allocated_by_pytorch() -> bool:
    return _by_pytorch


def note_changes(tensors: Sequence[Tensor]) -> None:
    """Kernels wrote to these: who counts versions shall know."""
    if counted := [t for t in tensors if not t.is_inference()]:
        torch.autograd.graph.increment_version(counted)


def kept_map_memory() -> int:
    """Bytes that are kept for the next maps on the CPU."""
    return extension.kernels().kept_map_memory() if extension.load()[0] else 0


def release_map_memory() -> None:
    """Gives what is kept for the next maps back to the system."""
    if extension.load()[0]:
        extension.kernels().release_map_memory()


def empty_vectors(scale: Tensor) -> tuple[Tensor, Tensor]:
    """dscale and dshift, dense; storages of their own, as operators' outputs may not alias."""
    return scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def as_rows(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N * H * W, C], a view where channels are adjacent"""
    return x.permute(0, 2, 3, 1).reshape(-1, x.size(1))
