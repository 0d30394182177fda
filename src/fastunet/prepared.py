"""Packed weights and folded vectors: made anew for each use, unless somebody keeps them.

A parameter can change without a trace (through ``.data``), so only who promises to notice keeps
them: ``fastunet.capture``.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_kept: dict[Hashable, Any] | None = None


@contextlib.contextmanager
def keeping(kept: dict[Hashable, Any]) -> Iterator[None]:
    """What is prepared in this context goes to ``kept``, and is not prepared again."""
    global _kept
    before, _kept = _kept, kept
    try:
        yield
    finally:
        _kept = before


def prepared(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` returns; key: names it and the tensors it is made of, which must stay alive."""
    if _kept is None:
        return make()
    if key not in _kept:
        _kept[key] = make()
    return _kept[key]
