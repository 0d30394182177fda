"""Which way a layer's convolution goes: a fixed sensible choice, or what tuning has measured.

on load       these kernels, the sources' affine and activation applied as they are read
materialised  these kernels, reading plain maps that a pass of its own has made
cudnn         PyTorch's convolution, these kernels around it
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastunet import cache
from fastunet.activation import NONE, Activation
from fastunet.aten_convolution import precision_of

ON_LOAD, MATERIALISED, CUDNN = CANDIDATES = ("on load", "materialised", "cudnn")

# A prologue costs instructions at each of nine taps, a pass of its own bytes: the first wins where
# a pixel has few channels.
MOST_ON_LOAD = 64
# From here on fusing saves less than the 8 % by which a library's convolution may be faster.
LEAST_CUDNN = 512
# Narrower sources, such as images, need no 16-byte loads.
MOST_UNALIGNED = 16


class Layer(NamedTuple):
    """A class of layers that share a choice: sizes count by powers of two.

    kind: conv_norm_act or conv_transpose, with _bwd for the way back. products: how those of fp32
    are formed, tf32 or ieee.
    """

    kind: str
    dtype: torch.dtype
    products: str
    channels: tuple[int, ...]
    outputs: int
    pending: tuple[bool, ...]
    pixels: int

    @staticmethod
    def of(kind: str, sources: Sequence[Activation], outputs: int) -> "Layer":
        y, (h, w) = sources[0].y, sources[0].size
        return Layer(
            kind,
            y.dtype,
            precision_of(y.dtype),
            tuple(s.y.size(1) for s in sources),
            outputs,
            tuple(s.scale is not None and s.mode == NONE for s in sources),
            (y.size(0) * h * w).bit_length(),
        )

    def key(self, device: torch.device) -> str:
        return f"{' '.join(map(str, self))} {cache.fingerprint(device, version())}"


@functools.cache
def version() -> str:
    """Of the kernels: Triton's, and their text."""
    text = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        text.update(source.read_bytes())
    interpreted = " interpreted" if triton.knobs.runtime.interpret else ""
    return f"triton {triton.__version__}{interpreted} kernels {text.hexdigest()[:16]}"


_forced: str | None = None


@contextlib.contextmanager
def forced(candidate: str) -> Iterator[None]:
    """Every layer goes this way, for tuning and tests."""
    global _forced
    before, _forced = _forced, candidate
    try:
        yield
    finally:
        _forced = before


def ways(operator: str) -> list[contextlib.AbstractContextManager]:
    """To check one by one."""
    return (
        [forced(ON_LOAD), forced(MATERIALISED)]
        if operator.startswith("conv")
        else [forced(ON_LOAD)]
    )


def choice(kind: str, sources: Sequence[Activation], outputs: int) -> str:
    if _forced is not None:
        return _forced
    layer, y = Layer.of(kind, sources, outputs), sources[0].y
    tuned = measured()
    if tuned and (found := tuned.get(layer.key(y.device))):
        return found
    return sensible(layer)


@functools.cache
def sensible(layer: Layer) -> str:
    """By the counts of bytes and instructions alone."""
    if layer.products == "ieee":  # no tensor cores, and nothing to win beside a library
        return CUDNN
    unaligned = any(c % 8 and c > MOST_UNALIGNED for c in (*layer.channels, layer.outputs))
    if unaligned or max(*layer.channels, layer.outputs) >= LEAST_CUDNN:
        return CUDNN
    return ON_LOAD if max(layer.channels) <= MOST_ON_LOAD else MATERIALISED


@functools.cache
def measured() -> dict[str, str]:
    return cache.read(cache.file("tuning"))


def keep(choices: dict[str, str]) -> None:
    measured().update(choices)
    cache.save("tuning", choices)


def convolves(kind: str, sources: Sequence[Activation], weight: Tensor) -> bool:
    """Whether the kernels convolve here, or leave that to PyTorch."""
    outputs = weight.size(1 if kind.startswith("conv_transpose") else 0)
    return choice(kind, sources, outputs) != CUDNN
