"""The backend ``cuda``: PyTorch's convolutions, and compiled CUDA C++ kernels around them.

Where the CUDA kernels were also compiled for the CPU, as for the tests, it serves CPU tensors,
slowly: so the kernels can be checked anywhere.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunet import backends, extension, self_check
from fastunet.activation import MAX_POOL, NONE, Activation
from fastunet.compiled import Grads, Passes, empty_grads, flat
from fastunet.maps import channel_adjacent, empty_map

__all__ = [
    "convolves",
    "distrusted",
    "head",
    "head_bwd",
    "normalization",
    "normalization_bwd",
    "resample",
    "resample_bwd",
    "resample_with_bwd",
    "version",
    "why_not",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def library_for(x: Tensor) -> str:
    return "cuda_host" if x.device.type == "cpu" else "cuda"


class NoKernels:
    """Stands for their namespace where nothing is launched."""

    def __getattr__(self, name: str) -> Any:
        return backends.do_nothing


def kernels(x: Tensor) -> Any:
    if backends.elsewhere():
        return NoKernels()
    return getattr(torch.ops, f"fastunet_{library_for(x)}")


class CudaPasses(Passes):
    def resample_with_bwd(self, source: Activation, dz: Tensor) -> tuple[Tensor, Grads]:
        """The map that a source stands for, and ``resample_bwd``: one pass unless it is upsampled
        or placed."""
        h, w = source.y.shape[2:]
        sizes = {NONE: (h, w), MAX_POOL: (h // 2, w // 2)}
        if sizes.get(source.mode) != tuple(source.size):
            return super().resample_with_bwd(source, dz)
        z, grads = empty_map(source.y, source.y.size(1), source.size), empty_grads(source)
        self.kernels(dz).resample_bwd(*grads, channel_adjacent(dz), *flat(source), z)
        return z, grads


PASSES = CudaPasses(kernels)

resample, resample_bwd = PASSES.resample, PASSES.resample_bwd
resample_with_bwd = PASSES.resample_with_bwd
normalization, normalization_bwd = PASSES.normalization, PASSES.normalization_bwd
head, head_bwd = PASSES.head, PASSES.head_bwd


def convolves(kind: str, sources: Sequence[Activation], weight: Tensor) -> bool:
    """Whether this backend has convolutions of its own: no, PyTorch's are used."""
    return False


def why_not(x: Tensor) -> str:
    """Why this backend cannot serve operators on ``x``; empty where it can."""
    if x.dtype not in DTYPES:
        return f"the dtype must be float32, float64, bfloat16 or float16, got {x.dtype}"
    if x.device.type not in ("cuda", "cpu"):
        return f"the tensors must be on a CUDA GPU, got {x.device}"
    if x.device.type == "cuda" and (why := self_check.too_old(x.device)):
        return why
    why = extension.load_cuda(library_for(x))
    if why and x.device.type == "cpu":
        return f"the tensors must be on a CUDA GPU, got {x.device}"
    return why


def distrusted(operator: str, x: Tensor) -> str:
    """Why the kernels are not to be chosen by themselves; empty where they are."""
    if x.device.type == "cpu":
        return "CUDA kernels on the CPU are never chosen automatically"
    return self_check.distrusted("cuda", operator, x)


@functools.cache
def version() -> str:
    """Of the kernels: their sources, whatever compiled them."""
    found = set()
    for library in extension.PACKAGE.glob("_cuda*"):
        found |= {*re.findall(rb"fastunet sources ([0-9a-f]{16})", library.read_bytes())}
    return f"kernels {' '.join(sorted(name.decode() for name in found))}"
