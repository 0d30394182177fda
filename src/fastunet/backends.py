"""Which backend serves an operator: an explicit choice, or the fastest one that can.

A backend is a module of plain functions (``reference``, ``cpu``, ``triton``, ``cuda``), one per
operator and one per operator's backward, and a predicate ``why_not(tensor)``.
"""

import contextlib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from .activation import Activation

# In the order of preference: for what has products, and for passes over memory alone.
BACKENDS = ("cpu", "triton", "cuda", "reference")
AROUND = ("cpu", "cuda", "triton", "reference")
PRODUCTS = ("conv_norm_act", "conv_transpose", "head")
AUTO = "auto"
Convolves = Callable[[ModuleType], bool]


def _checked(name: str, origin: str) -> str:
    if name not in (AUTO, *BACKENDS):
        raise ValueError(f"{origin} must be one of {', '.join((AUTO, *BACKENDS))}, got {name!r}")
    return name


_requested = _checked(os.environ.get("FASTUNET_BACKEND", AUTO), "FASTUNET_BACKEND")


def requested() -> str:
    """The backend that new operator calls ask for: ``auto`` or an explicit one."""
    return _requested


@contextlib.contextmanager
def backend(name: str):
    """Within this context, forward and backward of new operator calls run on one backend.

    An explicit choice never falls back: where the backend cannot serve, it raises with the reason.

    Args:
        name: ``reference`` (plain PyTorch, any device), ``cpu`` (compiled C++), ``triton`` or
            ``cuda`` (GPUs; the second with PyTorch's convolutions) or ``auto``.
    """
    global _requested
    previous = _requested
    _requested = _checked(name, "the backend")
    try:
        yield
    finally:
        _requested = previous


@functools.cache
def module(name: str) -> ModuleType:
    return importlib.import_module(f"fastunet.{name}")


class Machine(threading.local):
    """The machine that is assumed in this thread, if one is."""

    backends: tuple[str, ...] = ()
    processors = 0  # of its GPU


machine = Machine()


@contextlib.contextmanager
def assumed(names: tuple[str, ...], processors: int):
    """Within this context, in this thread, these backends can serve, no others, and no kernel is
    launched: as on a machine that is not here, to see what it would allocate."""
    previous = machine.backends, machine.processors
    machine.backends, machine.processors = names, processors
    try:
        yield
    finally:
        machine.backends, machine.processors = previous


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a kernel."""


def elsewhere() -> bool:
    """Whether another machine is assumed: tensors have no memory then."""
    return bool(machine.backends)


def why_not(name: str, operator: str, x: Tensor) -> str:
    """Why a backend is not chosen automatically for an operator on ``x``; empty where it can be."""
    if elsewhere():
        return "" if name in machine.backends else f"{name} is not on the machine that is assumed"
    candidate = module(name)
    why = candidate.why_not(x)
    if not why and hasattr(candidate, "distrusted"):
        why = candidate.distrusted(operator, x)
    return why


def choose(
    operator: str, x: Tensor, convolves: Convolves | None = None
) -> tuple[str, dict[str, str]]:
    """The backend that is chosen automatically, and why not those before it.

    convolves: whether a backend has a convolution for the layer. Where none has, PyTorch's is
    used, and the backend is chosen for the passes around it.
    """
    refused: dict[str, str] = {}

    def serves(name: str) -> bool:
        if name not in refused:
            refused[name] = why_not(name, operator, x)
        return not refused[name]

    def first(order: tuple[str, ...], suits: Convolves | None) -> str | None:
        candidates = (name for name in order if serves(name))
        return next((n for n in candidates if suits is None or suits(module(n))), None)

    order = BACKENDS if operator in PRODUCTS else AROUND
    name = first(order, convolves)
    if name is None:
        order = AROUND
        name = first(order, None)
    if name is None:
        raise RuntimeError(f"no backend can serve this: {refused}")
    before = order[: order.index(name)]
    return name, {other: refused[other] for other in before if refused[other]}


def select(name: str, operator: str, x: Tensor, convolves: Convolves | None = None) -> ModuleType:
    """The backend for an operator on ``x``; convolves: as ``choose`` takes it.

    Raises:
        RuntimeError: where the explicitly chosen backend cannot serve, with the reason.
    """
    if name != AUTO:
        chosen = module(name)
        if not elsewhere() and (why := chosen.why_not(x)):
            raise RuntimeError(f"backend {name!r} cannot serve this: {why}")
        return chosen
    return module(choose(operator, x, convolves)[0])


def select_convolution(
    name: str, kind: str, sources: Sequence[Activation], weight: Tensor
) -> ModuleType:
    """The backend for a layer; kind: the operator, with ``_bwd`` for the way back."""

    def convolves(kernels: ModuleType) -> bool:
        return kernels.convolves(kind, sources, weight)

    return select(name, kind.removesuffix("_bwd"), sources[0].y, convolves)
