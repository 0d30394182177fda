"""FastUNet: the fastest and leanest way to train and run a U-Net in PyTorch."""

from . import reference
from .activation import Activation
from .backends import backend
from .unet import FastUNet
from .weights import load_weights

__version__ = "0.1.0"
__all__ = ["Activation", "FastUNet", "backend", "load_weights", "reference"]
