"""The backend ``triton``: Triton kernels for NVIDIA GPUs from compute capability 8.0 up.

Under ``TRITON_INTERPRET=1`` it serves CPU tensors, slowly: so the kernels can be checked anywhere.
"""

import torch
from torch import Tensor

from fastunet import self_check

try:
    import triton

    from .conv_norm_act import conv_norm_act, conv_norm_act_bwd, conv_norm_act_folded
    from .conv_transpose import conv_transpose, conv_transpose_bwd
    from .head import head, head_bwd
    from .language import compile_ahead
    from .normalization import normalization, normalization_bwd
    from .resample import resample, resample_bwd
    from .selection import convolves, version, ways
except ImportError as error:
    MISSING = f"Triton is missing, or an old one ({error})"
else:
    MISSING = ""

__all__ = [
    "compile_ahead",
    "conv_norm_act",
    "conv_norm_act_bwd",
    "conv_norm_act_folded",
    "conv_transpose",
    "conv_transpose_bwd",
    "convolves",
    "distrusted",
    "head",
    "head_bwd",
    "normalization",
    "normalization_bwd",
    "resample",
    "resample_bwd",
    "version",
    "ways",
    "why_not",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(x: Tensor) -> str:
    """Why this backend cannot serve operators on ``x``; empty where it can."""
    if MISSING:
        return MISSING
    if x.dtype not in DTYPES:
        return f"the dtype must be float32, bfloat16 or float16, got {x.dtype}"
    if x.device.type == "cuda":
        return self_check.too_old(x.device)
    if x.device.type != "cpu" or not triton.knobs.runtime.interpret:
        return f"the tensors must be on a CUDA GPU, got {x.device}"
    if x.dtype == torch.bfloat16:
        return "Triton's interpreter takes float32 and float16, got torch.bfloat16"
    return ""


def distrusted(operator: str, x: Tensor) -> str:
    """Why the kernels are not to be chosen by themselves; empty where they are."""
    if x.device.type != "cuda":
        return "interpreted kernels are never chosen automatically"
    return self_check.distrusted("triton", operator, x)
