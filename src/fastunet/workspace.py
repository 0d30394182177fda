"""Reused buffers for the large temporaries of composed operators on the CPU.

Memory that is freed and allocated again for every layer costs a page fault per 4 KB when it is
written, several times as much as the writing itself. One buffer per role and thread, kept between
the layers of one forward or backward pass and released at its end, is touched once. On a GPU
PyTorch's caching allocator does the same.
"""

import threading

import torch
from torch import Tensor

_local = threading.local()


def temporary(role: str, like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """An uninitialised channels_last map [N, channels, *size] with the dtype of ``like``.

    Valid until the next request for the same role in this thread.
    """
    n, (h, w) = like.size(0), size
    numel = n * channels * h * w
    if like.device.type != "cpu" or poisoned():
        return torch.empty(
            (n, channels, h, w),
            dtype=like.dtype,
            device=like.device,
            memory_format=torch.channels_last,
        )
    buffers = _buffers()
    key = role, like.dtype
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        buffers.pop(key, None)
        buffer = buffers[key] = torch.empty(numel, dtype=like.dtype)
    return buffer.as_strided((n, channels, h, w), (h * w * channels, 1, w * channels, channels))


def release() -> None:
    """Frees this thread's buffers: at the end of a network's forward."""
    _buffers().clear()


def release_after_backward() -> None:
    """Frees them at the end of the backward pass that is running, if one is."""
    task = torch._C._current_graph_task_id()
    if task != -1 and task != getattr(_local, "task", None):
        _local.task = task
        torch.autograd.Variable._execution_engine.queue_callback(release)


def _buffers() -> dict:
    if not hasattr(_local, "buffers"):
        _local.buffers = {}
    return _local.buffers


def poisoned() -> bool:
    """Whether PyTorch is asked to fill new memory with NaN; a reused buffer would hide mistakes."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    )
