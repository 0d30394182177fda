"""A GPU whose allocations are counted on fake CPU tensors: its backends launch nothing."""

import contextlib

import torch

from fastunet import backends

H100_SMS = 132  # also H200's; for a GPU that is not here


def machine(device: str) -> contextlib.AbstractContextManager:
    """Within this context fake tensors are treated as a device's: ``cpu`` or ``cuda``."""
    if device == "cpu":
        return contextlib.nullcontext()
    if device != "cuda":
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    names = ("triton", "cuda", "reference")
    if not torch.cuda.is_available():
        missing = backends.module("triton").MISSING
        return backends.assumed(names[1:] if missing else names, H100_SMS)
    x = torch.empty(0, device="cuda")
    serving = tuple(n for n in names if not backends.why_not(n, "conv_norm_act", x))
    return backends.assumed(serving, torch.cuda.get_device_properties("cuda").multi_processor_count)
