"""Measures the ways that a model's layers can go, and keeps the fastest of each class."""

import copy
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import backends
from fastunet.ops.source import COUNT, unflatten

from .selection import CANDIDATES, Layer, forced, keep

KINDS = ("conv_norm_act", "conv_transpose")

# Cycles that the GPU waits before each pass, a tenth of a second or so: the host then launches far
# ahead, and what is measured is kernels, not how long it takes to launch them.
HEAD_START = 200_000_000


class Stopwatch(TorchDispatchMode):
    """Takes the time of each call of an operator that has a choice."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.marks: list[tuple[Layer, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        layer = layer_of(func.name(), args)
        if layer is None:
            return func(*args, **(kwargs or {}))
        begin = self.mark()
        result = func(*args, **(kwargs or {}))
        self.marks.append((layer, begin, self.mark()))
        return result

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[Layer, float]:
        """Of all layers of a class."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total: dict[Layer, float] = defaultdict(float)
        for layer, begin, end in self.marks:
            cuda = self.device.type == "cuda"
            total[layer] += begin.elapsed_time(end) / 1e3 if cuda else end - begin
        return total


def layer_of(name: str, args: tuple) -> Layer | None:
    """The class of an operator's call, where there is a choice."""
    kind = name.removeprefix("fastunet::").removesuffix("_folded")
    if kind.removesuffix("_bwd") not in KINDS or not name.startswith("fastunet::"):
        return None
    args = args[{"conv_norm_act_bwd": 3, "conv_transpose_bwd": 1}.get(kind, 0) :]
    if kind.startswith("conv_transpose"):
        return Layer.of(kind, [unflatten(args[:COUNT], args[COUNT])], args[COUNT + 1].size(1))
    first, second, size = args[:COUNT], args[COUNT : 2 * COUNT], args[2 * COUNT]
    sources = [unflatten(s, size) for s in (first, second) if s[0] is not None]
    return Layer.of(kind, sources, args[2 * COUNT + 1].size(0))


def check_serving(model: nn.Module, example: Tensor) -> None:
    device = example.device.type
    dtype = next(model.parameters()).dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    x = example.new_empty(1, dtype=dtype)
    backend = backends.requested()
    why = f"the backend is {backend!r}"
    if backend == "triton":
        why = backends.module("triton").why_not(x)
    elif backend == backends.AUTO:
        whys = (backends.why_not("triton", kind, x) for kind in KINDS)
        why = next(filter(None, whys), "")
    if why:
        raise RuntimeError(f"tune: the Triton kernels do not serve this model: {why}")


def seconds_of_pass(model: nn.Module, example: Tensor, candidate: str) -> dict[Layer, float]:
    """Of all layers of a class, going one way."""
    with forced(candidate), Stopwatch(example.device) as stopwatch:
        if example.is_cuda:
            torch.cuda._sleep(HEAD_START)
        if model.training:
            model(example).float().square().mean().backward()
        else:
            with torch.no_grad():
                model(example)
    return stopwatch.seconds()


def tune(model: nn.Module, example: Tensor, rounds: int = 7) -> dict[str, str]:
    """Measures the model's layers on the example's size and keeps the fastest way of each class.

    Runs a copy of the model under the caller's autocast: forward, and backward where the model is
    in training mode, ``rounds`` times each way in turns, after one round to warm up. What counts is
    the GPU's own time, as with a busy stream or in a CUDA graph, not that of launching. The choices
    hold for this GPU, these versions and sizes up to the next power of two, in this process and,
    through a file, in later ones.

    Args:
        model: on the example's device.
        example: [N, C, H, W], as in use.

    Returns:
        The choices, by class of layer.

    Raises:
        RuntimeError: where these kernels do not serve, with the reason.
    """
    check_serving(model, example)
    model = copy.deepcopy(model)
    taken: dict[Layer, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in range(rounds + 1):
        for candidate in CANDIDATES:
            with torch.cuda.device_of(example):  # whose stream the events are in
                found = seconds_of_pass(model, example, candidate)
            for layer, seconds in found.items():
                if turn:
                    taken[layer][candidate].append(seconds)
    choices = {}
    for layer, times in taken.items():
        medians = {candidate: statistics.median(t) for candidate, t in times.items()}
        choices[layer.key(example.device)] = min(medians, key=medians.__getitem__)
    keep(choices)
    return choices
