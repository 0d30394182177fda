"""Interleaved timing, and the statistics of it.

Machines are noisy and drift: contenders take turns within each round, in rotating order, so that a
slow second hits them alike, and ratios are of medians with an interval resampled by whole rounds.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

RESAMPLES, COVERAGE = 2000, 0.95


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def seconds(work: Callable[[], Any], calls: int, device: str) -> float:
    """Seconds per call of ``calls`` calls in a row; on a GPU by its own clock."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def interleave(
    works: dict[str, Callable[[], Any]], rounds: int, min_time: float, device: str
) -> dict[str, list[float]]:
    """Seconds per call in each round, by contender; at least ``min_time`` a measurement."""
    times: dict[str, list[float]] = {name: [] for name in works}
    with without_gc():
        calls = {}
        for name, work in works.items():
            seconds(work, 1, device)  # warm-up
            calls[name] = max(1, math.ceil(min_time / max(1e-9, seconds(work, 1, device))))
        names = list(works)
        for i in range(rounds):
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                times[name].append(seconds(works[name], calls[name], device))
    return times


def quantile(values: list[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def ratio_interval(times: list[float], baseline: list[float]) -> tuple[float, float]:
    """The bootstrap interval of median(times) / median(baseline); entries pair up by round."""
    pair = torch.tensor([times, baseline], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    pick = torch.randint(len(times), (RESAMPLES, len(times)), generator=generator)
    medians = pair[:, pick].quantile(0.5, dim=2)  # [2, resamples]
    tail = (1 - COVERAGE) / 2
    low, high = (medians[0] / medians[1]).quantile(torch.tensor([tail, 1 - tail]).double())
    return float(low), float(high)


def summary(times: dict[str, list[float]], eager: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Per contender: raw seconds, median, quartiles, and the ratio to the best eager layout."""
    medians = {name: quantile(values, 0.5) for name, values in times.items()}
    best = min(eager, key=medians.__getitem__)
    return {
        name: {
            "seconds": values,
            "median": medians[name],
            "quartiles": [quantile(values, 0.25), quantile(values, 0.75)],
            "baseline": best,
            "ratio": medians[name] / medians[best],
            "ratio_interval": ratio_interval(values, times[best]),
        }
        for name, values in times.items()
    }
