"""Inference as a recording: on GPUs a CUDA graph, on CPUs the kernels' calls one after the other.

On GPUs nothing of Python is left, weights are packed and norms folded once. On CPUs what is left is
a function that calls kernels, in memory of its own: the model's modules, checks and choices are not
run again. Python is slow there where a kernel has just taken the caches for its maps.
"""

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .maps import allocated_by_pytorch
from .ops._register import implementations_by_operator
from .prepared import keeping

WARM_UP = 3  # runs before recording: kernels compile, libraries choose algorithms


class Captured:
    """A model's inference at one input size, as ``capture`` returns it.

    Call it with a tensor like the example, from one thread at a time; it returns the logits, in
    memory of their own. It runs on the backend that was asked for when it was made, and records
    again where a parameter or buffer has changed since, which it sees by PyTorch's version
    counters; a change through ``.data`` has none: call ``refresh()`` after it.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        with torch.inference_mode(False):
            self.input = example.clone()
        self.backend = backends.requested()
        # Autocast of the caller's: it is part of what is recorded.
        self.device = example.device.type
        self.autocast = torch.is_autocast_enabled(self.device)
        self.dtype = torch.get_autocast_dtype(self.device)
        self.refresh()

    def refresh(self) -> None:
        """Records the model as it is now."""
        self.state = self.versions()
        self.kept: dict[Hashable, Any] = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(backends.backend(self.backend))
            stack.enter_context(keeping(self.kept))
            self.replay = self.graph() if self.device == "cuda" else self.trace()

    def trace(self) -> Callable[[Tensor], Tensor]:
        """What the operators and the rest of the model call, as a function."""
        from torch.fx.experimental.proxy_tensor import make_fx  # takes its time

        operators = implementations_by_operator()
        with allocated_by_pytorch():
            calls = make_fx(lambda x: self.run(x), decomposition_table=operators)(self.input)
        keep_memory(calls)
        strides = self.input.stride()

        def replay(x: Tensor) -> Tensor:
            return calls(x if x.stride() == strides else torch.empty_like(self.input).copy_(x))

        return replay

    def graph(self) -> Callable[[Tensor], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.input.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.run(self.input)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                output = self.run(self.input)

        def replay(x: Tensor) -> Tensor:
            self.input.copy_(x)
            graph.replay()
            return output.clone()

        return replay

    def run(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.autocast, cache_enabled=False):
            return self.model(x)

    def versions(self) -> list[tuple[int, int]]:
        tensors = (*self.model.parameters(), *self.model.buffers())
        return [(t.data_ptr(), t._version) for t in tensors]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        for what in ("shape", "dtype", "device"):
            got, expected = getattr(x, what), getattr(self.input, what)
            if got != expected:
                raise ValueError(
                    f"a captured model's input must have the example's {what} {expected}, got {got}"
                )
        if self.versions() != self.state:
            self.refresh()
        return self.replay(x)


def keep_memory(calls: torch.fx.GraphModule) -> None:
    """Gives what the calls allocate, but for their result, memory that is kept between runs: where
    one is not read any more, the next of its size is written. Fresh memory costs a page fault per
    page, which can take as long as the work."""
    graph = calls.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    last: dict[torch.fx.Node, int] = {}
    for node in reversed(graph.nodes):
        # What a user returns may be a view.
        last[node] = max((max(order[u], last[u]) for u in node.users), default=0)
    allocations = [n for n in graph.nodes if n.target in ALLOCATIONS and last[n] < len(order) - 1]
    buffers: list[tuple[Tensor, int]] = []  # and until when it is in use
    for node in allocations:
        like = node.meta["val"]
        free = [i for i, (b, until) in enumerate(buffers) if until < order[node] and same(b, like)]
        i = free[0] if free else len(buffers)
        buffer = (
            buffers[i][0]
            if free
            else torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        )
        buffers[i : i + 1] = [(buffer, last[node])]
        calls.register_buffer(f"buffer{i}", buffer, persistent=False)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(f"buffer{i}"))
        graph.erase_node(node)
    calls.recompile()


ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)


def same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())


def capture(model: nn.Module, example: Tensor) -> Captured:
    """Records the model's inference, for inputs like ``example``.

    On a GPU as a CUDA graph, on a CPU as the row of kernel calls that it comes down to. Under the
    caller's autocast. On GPUs the kernels' weights are packed and their norms folded once, not at
    each call. Forward hooks run while recording, not afterwards.

    Args:
        model: in evaluation mode; not moved or converted afterwards.
        example: [N, C, H, W], on the model's device.

    Raises:
        ValueError: where the model is in training mode, or not all is on one CPU or CUDA device.
    """
    if model.training:
        raise ValueError("capture: the model must be in evaluation mode: call model.eval() first")
    devices = {t.device for t in (*model.parameters(), *model.buffers(), example)}
    if len(devices) != 1 or example.device.type not in ("cpu", "cuda"):
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"capture: model and example must be on the CPU, or on one CUDA GPU, got {names}"
        )
    return Captured(model, example)
