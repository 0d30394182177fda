"""A GPU whose allocations are counted on fake CPU tensors: its backends launch nothing."""

import contextlib

import torch

from fastunet import backends

H100_SMS = 132  # also H200's; for a GPU that is not here


def machine(device: str, dtype: torch.dtype = torch.float32) -> contextlib.AbstractContextManager:
    """Within this context fake tensors are treated as a device's: ``cpu`` or ``cuda``; dtype: of
    the maps."""
    if device == "cpu":
        return contextlib.nullcontext()
    if device != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    names = ("triton", "cuda", "reference")
    if not torch.cuda.is_available():
        missing = backends.module("triton").MISSING
        return backends.assumed(names[1:] if missing else names, H100_SMS)
    x = torch.empty(0, dtype=dtype, device="cuda")
    if backends.requested() == backends.AUTO:
        serving = [n for n in names if not backends.why_not(n, "conv_norm_act", x)]
    else:  # without a self-check, as when it is run
        serving = [n for n in names if not backends.module(n).why_not(x)]
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    return backends.assumed(tuple(serving), processors)
