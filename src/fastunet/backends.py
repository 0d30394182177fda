"""Which backend serves an operator: an explicit choice, or the fastest one that can.

A backend is a module of plain functions (``reference``, ``cpu``, ``triton``), one per operator and
one per operator's backward, and a predicate ``why_not(tensor)``.
"""

import contextlib
import functools
import importlib
import os
from types import ModuleType

from torch import Tensor

# In the order of preference.
BACKENDS = ("cpu", "triton", "reference")
AUTO = "auto"


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
        name: ``reference`` (plain PyTorch, any device), ``cpu`` (compiled C++), ``triton`` (GPUs)
            or ``auto``.
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


def why_not(name: str, operator: str, x: Tensor) -> str:
    """Why a backend is not chosen automatically for an operator on ``x``; empty where it can be."""
    candidate = module(name)
    why = candidate.why_not(x)
    if not why and hasattr(candidate, "distrusted"):
        why = candidate.distrusted(operator, x)
    return why


def choose(operator: str, x: Tensor) -> tuple[str, dict[str, str]]:
    """The backend that is chosen automatically, and why not those before it."""
    refused: dict[str, str] = {}
    for name in BACKENDS:
        why = why_not(name, operator, x)
        if not why:
            return name, refused
        refused[name] = why
    raise RuntimeError(f"no backend can serve this: {refused}")


def select(name: str, operator: str, x: Tensor) -> ModuleType:
    """The backend for an operator on ``x``.

    Raises:
        RuntimeError: where the explicitly chosen backend cannot serve, with the reason.
    """
    if name != AUTO:
        chosen = module(name)
        if why := chosen.why_not(x):
            raise RuntimeError(f"backend {name!r} cannot serve this: {why}")
        return chosen
    return module(choose(operator, x)[0])
