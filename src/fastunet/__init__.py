"""FastUNet: the fastest and leanest way to train and run a U-Net in PyTorch."""

import importlib

from . import reference
from .activation import Activation
from .backends import backend
from .capture import capture
from .tiling import predict
from .unet import FastUNet
from .weights import load_weights

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "FastUNet",
    "backend",
    "capture",
    "load_weights",
    "memory",
    "predict",
    "reference",
    "tune",
]


def __getattr__(name: str):
    if name == "memory":
        return importlib.import_module("fastunet.memory")
    if name == "tune":  # it takes Triton with it
        from .triton.tuning import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
