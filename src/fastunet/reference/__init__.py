"""The definitions in plain PyTorch: the U-Net, and what each fused operator computes.

Also the backend ``reference``: every operator on any device, with the memory of the fused
operators (backward is autograd through the definition) and the speed of plain PyTorch.
"""

from collections.abc import Sequence

from torch import Tensor

from fastunet.activation import Activation

from .head import head, head_bwd
from .normalization import normalization, normalization_bwd
from .resample import resample, resample_bwd
from .unet import DoubleConv, Down, OutConv, UNet, Up

__all__ = [
    "DoubleConv",
    "Down",
    "OutConv",
    "UNet",
    "Up",
    "convolves",
    "head",
    "head_bwd",
    "normalization",
    "normalization_bwd",
    "resample",
    "resample_bwd",
    "why_not",
]


def why_not(x: Tensor) -> str:
    """Why this backend cannot serve operators on ``x``; empty where it can."""
    return "" if x.dtype.is_floating_point else f"the dtype must be floating point, got {x.dtype}"


def convolves(kind: str, sources: Sequence[Activation], weight: Tensor) -> bool:
    """Whether this backend has convolutions of its own: no, PyTorch's are used."""
    return False
