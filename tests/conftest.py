"""Without a GPU, Triton's kernels are interpreted. That is decided when they are imported."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from interpreter import quicken

        quicken()
