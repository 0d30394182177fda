"""A stage's work: in its time, and with what it has found kept whatever happens."""

import contextlib
import gc
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import results
from benchmarks.contest import AUTOTUNED, BUDGETED, COMPILED, Setting

# The least time (seconds) that a work is begun with, before one of its kind has been seen.
EXPECTED = {COMPILED: 60.0, BUDGETED: 60.0, AUTOTUNED: 180.0}


class TimeUp(BaseException):
    """The stage's time is up. No Exception: nothing on the way shall take it for a failure of its
    own, and go on."""


class Budget:
    """The seconds of a stage, and the most that one work of each kind has taken of them."""

    def __init__(self, total: float, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.end = clock() + total
        self.most: dict[str, float] = {}

    def left(self) -> float:
        return self.end - self.clock()

    def allows(self, kind: str) -> bool:
        return self.left() > 1.2 * self.most.get(kind, EXPECTED.get(kind, 15.0))

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            self.most[kind] = max(self.most.get(kind, 0.0), self.clock() - start)

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Raises TimeUp once no time is left."""

        def stop(*_: Any) -> None:
            raise TimeUp("the stage's time is up")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(1e-3, self.left()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@dataclass
class Job:
    """One stage: all it finds goes into ``result``, and for people into ``rows``."""

    path: Path
    setting: Setting
    budget: Budget
    pattern: str = ""
    rounds: int = 12
    min_time: float = 0.03  # seconds
    result: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.result |= {"results": [], "skipped": [], "failures": []}

    def save(self) -> None:
        results.write(self.path, self.result)

    def fail(self, what: str, error: object) -> None:
        raised = isinstance(error, BaseException)
        text = f"{type(error).__name__}: {error}" if raised else str(error)
        self.result["failures"].append({"what": what, "error": text[-4000:]})
        click.echo(f"failed: {what}: {text[-400:]}", err=True)

    def do(self, what: str, kind: str, work: Callable[[], None]) -> None:
        """The work, if it matches the pattern and there is time. Its failure is noted, no more;
        but after an error that has cost us the GPU this raises."""
        if not re.search(self.pattern, what):
            return
        if not self.budget.allows(kind):
            why = f"{self.budget.left():.0f} s were left"
            self.result["skipped"].append({"what": what, "why": why})
            self.save()
            return
        try:
            with self.budget.spend(kind):
                work()
        except TimeUp as error:  # what follows is skipped, and named
            self.fail(what, error)
        except Exception as error:
            self.fail(what, error)
            self.synchronize()
        self.save()
        gc.collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.setting.device == "cuda":
            torch.cuda.synchronize()
