"""The processes of a run: which device each has, and what they agree on."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .settings import Settings


@dataclass(frozen=True)
class Place:
    """One process among those that train together."""

    rank: int
    world: int
    device: torch.device
    # One for all reductions, which outlives the group: gloo's thread lets go of a tensor a moment
    # later, and would wait for the GIL to delete it while the group's destructor waits for it.
    number: Tensor

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> float:
        """Of all processes' numbers."""
        return self.reduced(value, dist.ReduceOp.SUM) / self.world

    def largest(self, value: int) -> int:
        """Of all processes' numbers."""
        return int(self.reduced(torch.tensor(value), dist.ReduceOp.MAX))

    def reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> float:
        if self.world == 1:
            return value.item()
        self.number.copy_(value)
        dist.all_reduce(self.number, how)
        return self.number.item()

    def share_buffers(self, model: nn.Module) -> None:
        """Gives all the first process's running statistics, which are those in checkpoints."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextlib.contextmanager
def process_group(settings: Settings) -> Iterator[Place]:
    """This process's place, under ``torchrun`` among the others; nccl on GPUs, gloo on CPUs."""
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = choose_device(settings.device, local if world > 1 else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    place = Place(rank, world, device, torch.zeros((), dtype=torch.float64, device=device))
    try:
        yield place
    finally:
        if world > 1:
            dist.destroy_process_group()


def choose_device(name: str | None, local: int) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    index = local if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name} must be a GPU that PyTorch sees, number {index} is none")
    return torch.device("cuda", index)


class Signals:
    """Inside, SIGINT and SIGTERM are noted, for the loop to stop between two steps."""

    got = 0  # the newest signal's number

    def __enter__(self) -> "Signals":
        try:
            self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, which alone may handle signals
            self.before = {}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.got = number


def ignore_signals(worker: int) -> None:
    """In processes that read images: Ctrl-C reaches them too, and the loop tells them to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
