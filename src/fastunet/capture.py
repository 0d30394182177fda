"""Inference from a CUDA graph: no launch overhead, weights packed and norms folded once."""

import contextlib
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
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
        self.autocast = torch.is_autocast_enabled("cuda")
        self.dtype = torch.get_autocast_dtype("cuda")
        self.refresh()

    def refresh(self) -> None:
        """Records the model as it is now."""
        self.state = self.versions()
        self.kept: dict[Hashable, Any] = {}
        self.graph = torch.cuda.CUDAGraph()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.cuda.device(self.input.device))
            stack.enter_context(backends.backend(self.backend))
            stack.enter_context(keeping(self.kept))
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.output = self.run()

    def run(self) -> Tensor:
        with torch.autocast("cuda", self.dtype, enabled=self.autocast, cache_enabled=False):
            return self.model(self.input)

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
        self.input.copy_(x)
        self.graph.replay()
        return self.output.clone()


def capture(model: nn.Module, example: Tensor) -> Captured:
    """Records the model's inference as a CUDA graph, for inputs like ``example``.

    Under the caller's autocast. The kernels' weights are packed and their norms folded once, not at
    each call.

    Args:
        model: in evaluation mode, on a CUDA GPU; not moved or converted afterwards.
        example: [N, C, H, W], on the same GPU.

    Raises:
        ValueError: where the model is in training mode, or something is not on a GPU.
    """
    if model.training:
        raise ValueError("capture: the model must be in evaluation mode: call model.eval() first")
    devices = {t.device for t in (*model.parameters(), *model.buffers(), example)}
    if len(devices) != 1 or example.device.type != "cuda":
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"capture: model and example must be on one CUDA GPU, got {names}")
    return Captured(model, example)
