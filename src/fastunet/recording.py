"""Passes of a model on the CPU as programs: noted when a kind of input comes for the second time.

From the third time on a forward pass is one call, and its backward pass another, which do what the
layers did, bit for bit (``program``). Wherever somebody could see the difference, the layers are
called: with hooks, modes, profilers, another backend, or a module that has changed since.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from . import backends, extension, maps
from .ops._register import differentiable_once
from .program import Layout, Program, Recorder

if TYPE_CHECKING:
    from .unet import FastUNet

# Kinds of inputs for which a model's passes are kept.
MOST = 8


class Settings(threading.local):
    on = os.environ.get("FASTUNET_RECORD", "1") != "0"


_settings = Settings()


@contextlib.contextmanager
def recording(on: bool) -> Iterator[None]:
    """Within this context, in this thread, models on the CPU are recorded or are not.

    They are from the start (unless FASTUNET_RECORD=0). Outputs, gradients and running statistics
    are the same either way.
    """
    before, _settings.on = _settings.on, on
    try:
        yield
    finally:
        _settings.on = before


class Recordings:
    """Of one model, by the kind of input."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple, Recording] = {}
        # A recording costs as much as some passes by layers: no more than pay off.
        self.credit = 4.0 * MOST

    def find(self, kind: tuple, x: Tensor) -> "Recording | None":
        """What is known of passes with this kind of input, and still holds."""
        found = self.by_kind.get(kind)
        if found is None:
            return None
        if not found.holds(x):
            self.by_kind.clear()  # they hold on to what the modules had
            return None
        self.credit += 0.1
        return found

    def begin(self, kind: tuple, model: "FastUNet", x: Tensor) -> None:
        if self.credit < 1:
            return
        self.credit -= 1
        self.by_kind[kind] = recording = Recording(model, x)
        if not model.is_plain():
            recording.why_not = "a module that is hooked, or of another kind"
        if len(self.by_kind) > MOST:
            del self.by_kind[next(iter(self.by_kind))]


_recordings: "weakref.WeakKeyDictionary[nn.Module, Recordings]" = weakref.WeakKeyDictionary()


def run(model: "FastUNet", x: Tensor) -> Tensor:
    """The model's output: by its layers, or as it was recorded."""
    kind = kind_of(model, x)
    if kind is None:
        return model.layers(x)
    recordings = _recordings.get(model)
    if recordings is None:
        recordings = _recordings.setdefault(model, Recordings())
    found = recordings.find(kind, x)
    if found is None:
        recordings.begin(kind, model, x)
        return model.layers(x)
    return found.run(model, x)


def kind_of(model: "FastUNet", x: Tensor) -> tuple | None:
    """All but the model that decides how a pass goes; None where it shall go by layers."""
    backend = backends.requested()
    if (
        not _settings.on
        or type(x) is not Tensor
        or x.device.type != "cpu"
        or backend not in (backends.AUTO, "cpu")
        or model.checkpointing == "auto"  # looks at the memory that there is
        or not extension.load()[0]
        or is_observed()
    ):
        return None
    return (
        backend,
        x.dtype,
        x.shape,
        x.stride(),
        x.requires_grad,
        model.training,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )


def is_observed() -> bool:
    """Whether anybody looks on who expects to see layers and operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch._C._current_graph_task_id() != -1
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch.is_anomaly_enabled()
        or nn.modules.module._has_any_global_hook()
        or maps.are_allocated_by_pytorch()
        or backends.elsewhere()
        # DistributedDataParallel sums gradients while backward goes on from layer to layer.
        or (dist.is_available() and dist.is_initialized())
    )


class Recording:
    """The passes of a model with inputs of one kind, as programs once they are there.

    given: the input, all parameters and buffers, then what was ``prepared`` of them. By their
    numbers:
    trained: what has a gradient. written: what a forward pass changes. read: what backward reads.
    """

    def __init__(self, model: nn.Module, x: Tensor, prepared: Iterable[Tensor] = ()) -> None:
        self.prepared = list(prepared)
        modules = [module.__dict__ for module in model.modules()]
        self.modules = [(now, snapshot(now)) for now in modules]
        self.tensors = [m[name] for m in modules for name in ("_parameters", "_buffers")]
        given = self.given(x)
        self.traits = traits(self.seen(x))
        self.trained = [i for i, t in enumerate(given) if t.requires_grad]
        self.why_not = ""
        self.forward: Program | None = None
        self.backward: Program | None = None
        self.written: list[int] = []
        self.read: list[int] = []
        self.found: list[bool] = []  # of what is trained, whether backward comes to it
        self.output: Layout  # of the logits

    def seen(self, x: Tensor) -> list[Tensor]:
        """What others may change."""
        found = (t for tensors in self.tensors for t in tensors.values() if t is not None)
        return [x, *found]

    def given(self, x: Tensor) -> list[Tensor]:
        return [*self.seen(x), *self.prepared]

    def holds(self, x: Tensor) -> bool:
        """Whether all modules are as they were."""
        try:
            same = all(now == before for now, before in self.modules)
        except (RuntimeError, TypeError, ValueError):  # something that compares value by value
            return False
        return same and traits(self.seen(x)) == self.traits

    def run(self, model: "FastUNet", x: Tensor) -> Tensor:
        if self.why_not:
            return model.layers(x)
        given = self.given(x)
        if not (torch.is_grad_enabled() and self.trained):
            return self.infer(model.layers, given)
        tensors = [given[i] for i in self.trained]
        if self.backward is not None:
            return Replay.apply(self, given, *tensors)
        if all(t is x or (t.is_leaf and not t._backward_hooks) for t in tensors):
            return Record.apply(self, model, given, *tensors)
        return model.layers(x)

    def infer(self, call: Callable[[Tensor], Tensor], given: list[Tensor]) -> Tensor:
        """Without gradients. call: what is recorded the first time."""
        if self.forward is not None:
            return self.replay(given)[0]
        recorder = Recorder(given)
        with recorder:
            output = call(given[0])
        returned = recorder.slot_of(output)
        self.why_not = recorder.why_not
        if not self.why_not:
            self.written = recorder.changed()
            self.forward = Program(recorder, recorder.steps, [returned])
        return output

    def replay(self, given: list[Tensor]) -> list[Tensor]:
        assert self.forward is not None
        outputs = self.forward.run([given[i] for i in self.forward.inputs])
        maps.note_changes([given[i] for i in self.written])
        return outputs


def snapshot(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.copy() if isinstance(value, dict | set | list) else value
        for name, value in attributes.items()
    }


def traits(tensors: list[Tensor]) -> list[tuple]:
    return [(t.requires_grad, t.dtype, t.device, t.shape, t.stride()) for t in tensors]


class Record(torch.autograd.Function):
    """A training step by layers, in a graph of its own, on which a recorder looks."""

    @staticmethod
    def forward(
        ctx: Any, recording: Recording, model: "FastUNet", given: list[Tensor], *tensors: Tensor
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        x = given[0].detach().requires_grad_(given[0].requires_grad)
        recorder = Recorder(given)
        with torch.enable_grad(), recorder:
            output = model.layers(x)
        ctx.step = RecordedForward(recording, recorder, output)
        ctx.tensors = [x if t is given[0] else t for t in tensors]
        return output.detach()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dlogits: Tensor | None) -> Any:
        if dlogits is None:
            return (None,) * (3 + len(ctx.tensors))
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        step = ctx.step
        if not keep:
            ctx.step = None
        return None, None, None, *step.backward(ctx.tensors, dlogits, keep)


class RecordedForward:
    """A forward pass that was recorded, whose backward pass is to come."""

    def __init__(self, recording: Recording, recorder: Recorder, output: Tensor) -> None:
        self.recording, self.recorder, self.output = recording, recorder, output
        self.logits = recorder.slot_of(output)
        self.steps = len(recorder.steps)
        self.recorded = False

    def backward(self, tensors: list[Tensor], dlogits: Tensor, keep: bool) -> tuple:
        dlogits = in_layout(dlogits, Layout.of(self.output))  # there is no slot after a failure

        def gradients() -> tuple:
            # torch.autograd.grad imports a package for symbolic shapes first.
            return _engine_run_backward(
                (self.output,), (dlogits,), keep, False, tuple(tensors), True, accumulate_grad=False
            )

        if self.recorded:
            return gradients()
        self.recorded = True
        dlogits = dlogits.clone()  # nobody else's memory
        first = self.recorder.new_base(dlogits)
        with self.recorder:
            grads = gradients()
        self.write(first, grads)
        return grads

    def write(self, dlogits: int, grads: tuple[Tensor | None, ...]) -> None:
        recording, recorder = self.recording, self.recorder
        returned = [recorder.slot_of(g) for g in grads if g is not None]
        forward, backward = recorder.steps[: self.steps], recorder.steps[self.steps :]
        made = {step.slots[0] for step in forward if step.what == "empty"}
        if not recorder.why_not:
            way_back = Program(recorder, backward, returned, first=[dlogits], own=made)
            if {recorder.bases[slot] for slot in returned} & {*way_back.inputs}:
                recorder.fail("a gradient that is an input")
        recording.why_not = recorder.why_not
        if recording.why_not:
            return
        maps = [slot for slot in way_back.inputs if slot in made]
        recording.output = recorder.layouts[self.logits]
        recording.written = recorder.changed()
        recording.read = [slot for slot in way_back.inputs if slot < recorder.given]
        recording.found = [g is not None for g in grads]
        recording.forward = Program(recorder, forward, [self.logits, *maps])
        recording.backward = way_back


def in_layout(t: Tensor, layout: Layout) -> Tensor:
    if t.stride() == layout.strides:
        return t
    return torch.empty_strided(layout.sizes, layout.strides, dtype=t.dtype).copy_(t)


class Replay(torch.autograd.Function):
    """A training step by programs."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, given: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.recording = recording
        logits, *maps = recording.replay(given)
        ctx.save_for_backward(*(given[i] for i in recording.read), *maps)
        return logits

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dlogits: Tensor | None) -> Any:
        recording: Recording = ctx.recording
        if dlogits is None:
            return (None,) * (2 + len(recording.found))
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        read, maps = saved[: len(recording.read)], saved[len(recording.read) :]
        del saved
        assert recording.backward is not None
        grads = iter(recording.backward.run([in_layout(dlogits, recording.output), *read], maps))
        return None, None, *(next(grads) if found else None for found in recording.found)
