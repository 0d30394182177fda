"""What a computation takes, counted as it runs: what autograd keeps, what the allocator hands out.

All figures are in bytes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _EventType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from fastunet.maps import allocated_by_pytorch


class Allocations(NamedTuple):
    """What one call allocated, as ``measure_allocations`` returns it.

    Attributes:
        result: what the function returned.
        live_bytes: of the call's allocations, those still held after it (its result included).
        peak_bytes: the most that its allocations came to at any one moment.
    """

    result: Any
    live_bytes: int
    peak_bytes: int


def saved_for_backward(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of ``forward()``.

    Each storage counts once and as a whole, however many views of it are saved. The network's
    input counts too, where a layer saves it. Saved-tensor hooks do not see what a checkpoint or
    a custom function keeps by other means than ``save_for_backward``.

    Args:
        forward: runs the forward pass; its result is dropped.
        exclude: tensors whose storages do not count: the parameters and buffers.
    """
    excluded = {tensor.untyped_storage()._cdata for tensor in exclude}
    saved: dict[int, torch.UntypedStorage] = {}  # holds each storage, so no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for address, storage in saved.items() if address not in excluded)


def measure_allocations(
    function: Callable[[], Any], device: torch.device | str = "cpu"
) -> Allocations:
    """Runs ``function()`` and counts its allocations on ``device``, temporaries included.

    On the CPU every event of PyTorch's allocator in the calling thread is counted, to the byte;
    it serves FastUNet's maps too meanwhile.
    Memory that was there before and is freed by the call is not subtracted, and memory that an
    extension takes by itself (``malloc``, ``std::vector``) is not seen. On CUDA the figures are
    the caching allocator's, relative to before the call; its peak statistics are reset.

    Raises:
        ValueError: for a device that is neither a CPU nor a CUDA device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _measure_cuda(function, device)
    if device.type != "cpu":
        raise ValueError(f"device must be a cpu or cuda device, got {str(device)!r}")

    with (
        allocated_by_pytorch(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        result = function()
    live: dict[int, int] = {}  # address -> bytes
    total = peak = 0
    for address, nbytes in _allocator_events(profiler):
        if nbytes > 0:
            live[address] = nbytes
            total += nbytes
            peak = max(peak, total)
        else:  # 0 for memory from before the call
            total -= live.pop(address, 0)
    return Allocations(result, total, peak)


def _allocator_events(profiler: profile) -> Iterator[tuple[int, int]]:
    """(address, bytes) of each allocation, with negative bytes for a free, in time order."""

    def flatten(nodes: Iterable[Any]) -> Iterator[Any]:
        for node in nodes:
            yield node
            yield from flatten(node.children)

    assert profiler.profiler is not None, "the profiler must have run"
    results = profiler.profiler.kineto_results
    assert results is not None, "the profiler must have run to its end"
    tree = results.experimental_event_tree()
    events = [node for node in flatten(tree) if node.tag == _EventType.Allocation]
    for event in sorted(events, key=lambda event: event.start_time_ns):
        fields = event.extra_fields
        if fields.device.type == "cpu":
            yield fields.ptr, fields.alloc_size


def _measure_cuda(function: Callable[[], Any], device: torch.device) -> Allocations:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    live = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    return Allocations(result, live, peak)
