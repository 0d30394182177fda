"""What a GPU would allocate, counted on fake CPU tensors: its backends serve and launch nothing."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from fastunet import backends, cuda

H100_SMS = 132  # also H200's; for a GPU that is not here


class NoKernels:
    """Stands for a namespace of kernels."""

    def __getattr__(self, name: str) -> Any:
        return do_nothing


def do_nothing(*args: Any, **kwargs: Any) -> None: ...


@contextlib.contextmanager
def machine(device: str) -> Iterator[None]:
    """Within this context fake tensors are treated as a device's: ``cpu`` or ``cuda``."""
    if device == "cpu":
        yield
        return
    if device != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(backends.assumed(gpu_backends()))
        stack.enter_context(mock.patch.object(cuda.PASSES, "kernels", return_value=NoKernels()))
        triton = backends.module("triton")
        if not triton.MISSING:
            from triton.runtime.jit import KernelInterface

            from fastunet.triton import weight_grad

            for launcher in (KernelInterface, *KernelInterface.__subclasses__()):
                if "__getitem__" in vars(launcher):
                    stack.enter_context(
                        mock.patch.object(launcher, "__getitem__", return_value=do_nothing)
                    )
            programs = 4 * multi_processors()
            stack.enter_context(
                mock.patch.object(weight_grad, "programs_wanted", return_value=programs)
            )
        yield


def gpu_backends() -> tuple[str, ...]:
    """Those that serve on the GPU that is here; without one, those that are meant to."""
    if not torch.cuda.is_available():
        missing = backends.module("triton").MISSING
        return ("cuda", "reference") if missing else ("triton", "cuda", "reference")
    x = torch.empty(0, device="cuda")
    names = ("triton", "cuda", "reference")
    return tuple(n for n in names if not backends.why_not(n, "conv_norm_act", x))


def multi_processors() -> int:
    if not torch.cuda.is_available():
        return H100_SMS
    return torch.cuda.get_device_properties("cuda").multi_processor_count
