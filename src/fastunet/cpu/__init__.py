"""The backend ``cpu``: compiled C++ kernels."""

import torch
from torch import Tensor

from fastunet import extension

from .conv_norm_act import (
    conv_norm_act,
    conv_norm_act_bwd,
    conv_norm_act_folded,
    convolves,
)
from .conv_transpose import conv_transpose, conv_transpose_bwd
from .head import head, head_bwd
from .passes import (
    normalization,
    normalization_bwd,
    resample,
    resample_bwd,
    running_statistics,
)

__all__ = [
    "conv_norm_act",
    "conv_norm_act_bwd",
    "conv_norm_act_folded",
    "conv_transpose",
    "conv_transpose_bwd",
    "convolves",
    "head",
    "head_bwd",
    "normalization",
    "normalization_bwd",
    "resample",
    "resample_bwd",
    "running_statistics",
    "why_not",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not(x: Tensor) -> str:
    """Why this backend cannot serve operators on ``x``; empty where it can."""
    if x.device.type != "cpu":
        return f"the tensors must be on the CPU, got {x.device}"
    if x.dtype not in DTYPES:
        return f"the dtype must be float32, float64, bfloat16 or float16, got {x.dtype}"
    return extension.load()[1]
