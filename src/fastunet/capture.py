"""Inference as a recording: on GPUs a CUDA graph, on CPUs a program of kernel calls.

Nothing of Python is left between kernels, nor any choice or check of the model's. Weights are
packed once; on GPUs norms are folded once, too.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, extension
from .prepared import keeping
from .program import Layout
from .recording import Recording, in_layout
from .recording import recording as recording_is

# What does it, and whether what was recorded is still right.
Replay = tuple[Callable[[Tensor], Tensor], Callable[[], bool]]
WARM_UP = 3  # runs before recording: kernels compile, libraries choose algorithms


class Captured:
    """A model's inference at one input size, as ``capture`` returns it.

    Call it with a tensor like the example, from one thread at a time; it returns the logits, in
    memory of their own. It runs on the backend that was asked for when it was made. It records
    again where a parameter (on a GPU, or a buffer) has changed since, which it sees by PyTorch's
    version counters; a change through ``.data`` has none: call ``refresh()`` after it. On a CPU
    also where a module has changed.
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
        self.kept: dict[Hashable, Any] = {}
        with self.conditions(), keeping(self.kept):
            self.replay, self.holds = self.graph() if self.device == "cuda" else self.program()

    @contextlib.contextmanager
    def conditions(self) -> Iterator[None]:
        """Under which it was captured."""
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            backends.backend(self.backend),
            torch.autocast(self.device, self.dtype, enabled=self.autocast, cache_enabled=False),
        ):
            yield

    def by_layers(self, x: Tensor) -> Tensor:
        with self.conditions():
            return self.model(x)

    def program(self) -> Replay:
        with recording_is(False):
            check_output(self.model(self.input))  # prepares what the program is given
        if not extension.load()[0]:  # no kernels, nothing to record
            return self.by_layers, lambda: True
        kept = [value for value in self.kept.values() if isinstance(value, Tensor)]
        recording = Recording(self.model, self.input, kept)
        recording.infer(self.model, recording.given(self.input))
        if recording.why_not:  # nothing reads what was prepared
            self.kept.clear()
            recording.prepared.clear()
        layout = Layout.of(self.input)
        read = self.model.parameters() if self.kept else ()
        weights = [p for p in read if p.dim() == 4]
        state = versions(weights)

        def replay(x: Tensor) -> Tensor:
            if recording.why_not:  # something else than kernels is called
                return self.by_layers(x)
            return recording.infer(self.model, recording.given(in_layout(x, layout)))

        return replay, lambda: recording.holds(self.input) and versions(weights) == state

    def graph(self) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.input.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    check_output(self.model(self.input))
            torch.cuda.current_stream().wait_stream(side)
            # Its own default stream is one for the process, of whichever device came first.
            with torch.cuda.graph(graph, stream=side):
                output = self.model(self.input)

        def replay(x: Tensor) -> Tensor:
            self.input.copy_(x)
            graph.replay()
            return output.clone()

        def now() -> list[tuple[int, int]]:
            return versions((*self.model.parameters(), *self.model.buffers()))

        state = now()
        return replay, lambda: now() == state

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        for what in ("shape", "dtype", "device"):
            got, expected = getattr(x, what), getattr(self.input, what)
            if got != expected:
                raise ValueError(
                    f"a captured model's input must have the example's {what} {expected}, got {got}"
                )
        if not self.holds():
            self.refresh()
        return self.replay(x)


def check_output(output: Any) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(f"capture: the model must return a tensor, got {type(output).__name__}")


def versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in tensors if not t.is_inference()]


def capture(model: nn.Module, example: Tensor) -> Captured:
    """Records the model's inference, for inputs like ``example``.

    On a GPU as a CUDA graph: weights are packed and norms folded once, not at each call. On a CPU
    as a program of the kernel calls that it comes down to, with the 3x3 weights (but for the
    smallest maps') transformed once, which takes four times their memory (seven times for few
    channels and large maps); where the model calls anything else, it runs as always. Under the
    caller's autocast. Forward hooks may run while recording only.

    Args:
        model: in evaluation mode; not moved or converted afterwards.
        example: [N, C, H, W], on the model's device.

    Raises:
        ValueError: where the model is in training mode, does not return a tensor, or not all is on
            one CPU or CUDA device.
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
