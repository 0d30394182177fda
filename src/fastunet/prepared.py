"""Packed weights and folded vectors: made anew for each use, unless somebody keeps them.

A parameter can change without a trace (through ``.data``), so only who promises to notice keeps
them: ``fastunet.capture``.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class State(threading.local):
    kept: dict[Hashable, Any] | None = None


_state = State()


@contextlib.contextmanager
def keeping(kept: dict[Hashable, Any] | None) -> Iterator[None]:
    """What this thread prepares in this context goes to ``kept``, and is not prepared again; None:
    nothing is kept."""
    before, _state.kept = _state.kept, kept
    try:
        yield
    finally:
        _state.kept = before


def is_keeping() -> bool:
    """Whether what this thread prepares is kept."""
    return _state.kept is not None


def prepared(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` returns; key: names it and the tensors it is made of, which must stay alive."""
    kept = _state.kept
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]
