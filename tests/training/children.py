"""What runs in processes of its own, to be killed or to train together."""

import faulthandler
import multiprocessing
import os
import signal
import sys

import torch
import torch.distributed as dist
from networks import end_process
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastunet import FastUNet, checkpoints
from fastunet.cli import main
from fastunet.training.loop import objective


def run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """The command line; what it prints is in the file ``log``."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a program of its own
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
    faulthandler.dump_traceback_later(50, exit=True)  # where it hangs
    main(arguments)


def die_while_saving(path: str, moment: str) -> None:
    """Is killed as the file is whole but not yet on disk, or not yet in its place."""
    checkpoint = checkpoints.load(path)
    setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    checkpoints.save(path, checkpoint | {"classes": ["not", "saved"]})


def gradients(rank: int, environment: dict[str, str], out: str) -> None:
    """Of a joint batch that two processes share, with nothing normalised by its statistics."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for norm in ("none", "batch"):
        model = frozen(norm)
        images, masks = (part.chunk(2)[rank] for part in batch())
        backward(DistributedDataParallel(model), images, masks)
        found[norm] = {name: p.grad for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(found, out)
    end_process()


def frozen(norm: str) -> FastUNet:
    torch.manual_seed(0)
    return FastUNet(3, 2, base_channels=4, depth=2, norm=norm, checkpointing="light").eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 21, 34, generator=generator)
    return images, torch.randint(0, 2, (4, 1, 21, 34), generator=generator)


def backward(model: nn.Module, images: Tensor, masks: Tensor) -> None:
    objective(model(images), masks).backward()
