"""Benchmarks of FastUNet against what one would otherwise run; see cases.py."""

import os

# PyTorch's profiler, which counts the allocations, would print lines among ours. Read at its start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
