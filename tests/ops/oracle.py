"""What the operators must compute, in plain differentiable PyTorch.

A case knows its tensors, the operator under test (``fast``) and the definition (``plain``). The
definition runs in any dtype: in float64 it is the oracle, in 16 bit it is what a 16-bit operator's
error is measured against. Nothing here uses the package's own definitions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    MAX_POOL,
    NEAREST,
    NONE,
    Activation,
    Concat,
)
from fastunet.ops import conv_norm_act, conv_transpose, head, materialize

MODES = (NONE, MAX_POOL, BILINEAR, BILINEAR_ALIGN_CORNERS, NEAREST)
MODE_NAMES = ("none", "max_pool", "bilinear", "align_corners", "nearest")
PLACEMENTS = {"exact": (0, 0), "pad": (3, 1), "crop": (-1, -3), "pad_crop": (1, -2)}
SLOPES = (0.0, 0.01, 1.0)
CHANNELS = (1, 3, 8, 13, 16, 24)
FP32_BUDGET = 1e-5  # relative L2 per operator
FP64_BUDGET = 1e-11


def random(*shape, seed=0, dtype=torch.float32, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + offset).to(
        dtype
    )


def vector_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def like(t, other):
    return None if t is None else t.to(other.dtype)


class Source(NamedTuple):
    """An Activation to be read. rows: of center, scale and shift; "plain" where there are none."""

    channels: int
    height: int = 9
    width: int = 11
    mode: int = NONE
    placement: tuple[int, int] = (0, 0)  # how much larger than the resampled map
    rows: str = "one"
    slope: float = 0.0

    @property
    def resampled(self):
        h, w = self.height, self.width
        return (
            (h, w) if self.mode == NONE else (h // 2, w // 2) if self.mode == 1 else (2 * h, 2 * w)
        )

    @property
    def size(self):
        (h, w), (dh, dw) = self.resampled, self.placement
        return h + dh, w + dw

    def tensors(self, n, dtype=torch.float32, seed=1, number=""):
        """y and, unless the source is plain, center, scale and shift, their names numbered."""
        y = random(n, self.channels, self.height, self.width, seed=seed, dtype=dtype)
        found = {"y": y.contiguous(memory_format=torch.channels_last)}
        if self.rows != "plain":
            shape = (1 if self.rows == "one" else n, self.channels)
            vectors = vector_dtype(dtype)
            found["center"] = random(*shape, seed=seed + 1, dtype=vectors, scale=0.5)
            found["scale"] = random(*shape, seed=seed + 2, dtype=vectors)
            found["shift"] = random(*shape, seed=seed + 3, dtype=vectors, offset=0.2)
        return {name + number: t for name, t in found.items()}

    def activation(self, t, number=""):
        vectors = (t.get(name + number) for name in ("center", "scale", "shift"))
        slope = 1.0 if self.rows == "plain" else self.slope
        y = t["y" + number]
        return Activation(y, *vectors, slope, self.mode, self.size, torch.channels_last)

    def plain(self, t, number=""):
        """The map that the Activation stands for."""
        y = z = t["y" + number]
        if self.rows != "plain":
            center, scale, shift = (
                t[name + number][:, :, None, None] for name in ("center", "scale", "shift")
            )
            z = plain_activation((scale * (y - center) + shift).to(y.dtype), self.slope)
        if self.mode == MAX_POOL:
            z = F.max_pool2d(z, 2)
        elif self.mode == NEAREST:
            z = z.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif self.mode != NONE:
            corners = self.mode == BILINEAR_ALIGN_CORNERS
            z = F.interpolate(z, size=self.resampled, mode="bilinear", align_corners=corners)
        dh, dw = self.placement
        return F.pad(z, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2))


def plain_activation(t, slope):
    return F.relu(t) if slope == 0 else t if slope == 1 else F.leaky_relu(t, slope)


class Resample(NamedTuple):
    source: Source
    n: int = 2

    def tensors(self, dtype=torch.float32):
        return self.source.tensors(self.n, dtype)

    def fast(self, **t):
        return materialize(self.source.activation(t))

    def plain(self, **t):
        return self.source.plain(t)


class Head(NamedTuple):
    source: Source
    classes: int = 2
    n: int = 2
    bias: bool = True
    memory_format: torch.memory_format = torch.channels_last

    def tensors(self, dtype=torch.float32):
        t = self.source.tensors(self.n, dtype)
        t["weight"] = random(self.classes, self.source.channels, 1, 1, seed=11, dtype=dtype)
        if self.bias:
            t["bias"] = random(self.classes, seed=12, dtype=vector_dtype(dtype))
        return t

    def fast(self, weight, bias=None, **t):
        return head(self.source.activation(t), weight, bias, self.memory_format)

    def plain(self, weight, bias=None, **t):
        return F.conv2d(self.source.plain(t), weight, like(bias, weight))


class ConvTranspose(NamedTuple):
    source: Source
    out_channels: int = 3
    n: int = 2
    bias: bool = True

    def tensors(self, dtype=torch.float32):
        t = self.source.tensors(self.n, dtype)
        shape = (self.source.channels, self.out_channels, 2, 2)
        t["weight"] = random(*shape, seed=11, dtype=dtype)
        if self.bias:
            t["bias"] = random(self.out_channels, seed=12, dtype=vector_dtype(dtype))
        return t

    def fast(self, weight, bias=None, **t):
        return materialize(conv_transpose(self.source.activation(t), weight, bias))

    def plain(self, weight, bias=None, **t):
        return F.conv_transpose2d(self.source.plain(t), weight, like(bias, weight), stride=2)


class Conv(NamedTuple):
    """conv_norm_act and the reading of its output (resample, checked by itself).

    groups: 0 where the norm is not "group".
    """

    sources: tuple[Source, ...]
    out_channels: int = 8
    norm: str = "batch"
    groups: int = 0
    n: int = 2
    parameters: tuple[str, ...] = ("gamma", "beta")  # which of bias, gamma, beta there are
    slope: float = 0.0
    eps: float = 1e-5

    def tensors(self, dtype=torch.float32):
        t = {}
        for i, source in enumerate(self.sources):
            t |= source.tensors(self.n, dtype, seed=1 + 4 * i, number=str(i))
        channels = sum(s.channels for s in self.sources)
        std = (9 * channels) ** -0.5
        t["weight"] = random(self.out_channels, channels, 3, 3, seed=11, dtype=dtype, scale=std)
        # gamma and beta of no normalisation would be unused.
        names = [n for n in self.parameters if self.norm != "none" or n == "bias"]
        for i, name in enumerate(names):
            t[name] = random(self.out_channels, seed=12 + i, dtype=vector_dtype(dtype))
        if self.norm == "frozen":
            t["running_mean"] = random(self.out_channels, seed=15, dtype=vector_dtype(dtype))
            t["running_var"] = (
                0.5 + random(self.out_channels, seed=16, dtype=vector_dtype(dtype)) ** 2
            )
        return t

    def layer(self, **t):
        activations = [s.activation(t, str(i)) for i, s in enumerate(self.sources)]
        return self.of(*activations, **parameters_of(t))

    def of(self, *activations, weight, **parameters):
        return conv_norm_act(
            Concat(*activations) if len(activations) == 2 else activations[0],
            weight,
            norm=self.norm,
            groups=self.groups or 1,
            eps=self.eps,
            slope=self.slope,
            **parameters,
        )

    def fast(self, **t):
        return materialize(self.layer(**t).output)

    def plain(self, **t):
        maps = [s.plain(t, str(i)) for i, s in enumerate(self.sources)]
        return self.plain_of(torch.cat(maps, 1), **parameters_of(t))

    def plain_of(
        self, x, weight, bias=None, gamma=None, beta=None, running_mean=None, running_var=None
    ):
        cancelled = self.norm == "batch" or self.groups == self.out_channels
        bias = like(bias, weight)
        y = F.conv2d(x, weight, None if cancelled else bias, padding=1)
        if cancelled and bias is not None:
            y = y + 0 * bias[:, None, None]  # its gradient is exactly zero
        if self.norm == "batch":
            y = F.batch_norm(y, None, None, gamma, beta, training=True, eps=self.eps)
        elif self.norm == "frozen":
            y = F.batch_norm(y, running_mean, running_var, gamma, beta, eps=self.eps)
        elif self.norm == "group":
            if gamma is None and beta is not None:
                gamma = torch.ones_like(beta)  # PyTorch's backward needs both or neither
            y = F.group_norm(y, self.groups, gamma, beta, self.eps)
        return plain_activation(y, self.slope)


PARAMETERS = ("weight", "bias", "gamma", "beta", "running_mean", "running_var")


def parameters_of(tensors):
    return {name: t for name, t in tensors.items() if name in PARAMETERS}
