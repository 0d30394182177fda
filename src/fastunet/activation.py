"""What flows between the layers of FastUNet: raw convolution outputs and their pending work."""

from typing import NamedTuple

import torch
from torch import Tensor

# Pending resampling, by number because operators carry it. The same numbers as in csrc/resample.
NONE, MAX_POOL, BILINEAR, BILINEAR_ALIGN_CORNERS, NEAREST = range(5)


class Activation(NamedTuple):
    """A map that is not there yet: ``resample(act(scale * (y - center) + shift))``.

    y: raw convolution output without its bias, [N, C, h, w], channels_last, compute dtype.
    center, scale, shift: [1 or N, C], fp32 (fp64 for fp64 maps); all None for a plain map.
    slope: act'(t) for negative t: 0 ReLU, 1 no activation, else LeakyReLU.
    mode: pending resampling, one of the numbers above.
    size: (H, W) of the map after resampling and placement (centred zero padding or cropping).
    memory_format: of the tensor when it must be shown to anyone outside.
    """

    y: Tensor
    center: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    slope: float
    mode: int
    size: tuple[int, int]
    memory_format: torch.memory_format

    @staticmethod
    def of(x: Tensor, memory_format: torch.memory_format | None = None) -> "Activation":
        """A plain map with nothing pending."""
        if memory_format is None:
            memory_format = suggested_format(x)
        return Activation(x, None, None, None, 1.0, NONE, (x.size(2), x.size(3)), memory_format)

    @property
    def pending(self) -> bool:
        """Whether anything has to be computed before this is an ordinary tensor."""
        return self.scale is not None or self.resampling_pending

    @property
    def resampling_pending(self) -> bool:
        """Whether a pooling, an upsampling or a placement is still to be done."""
        return self.mode != NONE or self.size != (self.y.size(2), self.y.size(3))

    def pool(self) -> "Activation":
        """With a 2x2 max-pool (floor) pending."""
        h, w = self.unresampled_size()
        return self._replace(mode=MAX_POOL, size=(h // 2, w // 2))

    def upsample(self, mode: int) -> "Activation":
        """With x2 upsampling pending."""
        h, w = self.unresampled_size()
        return self._replace(mode=mode, size=(2 * h, 2 * w))

    def unresampled_size(self) -> tuple[int, int]:
        """(H, W), where no resampling is pending yet: there can be one only."""
        if self.resampling_pending:
            raise ValueError("a resampling or placement is pending already: materialize() it first")
        return self.size

    def place(self, size: tuple[int, int]) -> "Activation":
        """Padded or cropped to (H, W): diff // 2 left and top, the rest right and bottom."""
        return self._replace(size=size)


class Concat(NamedTuple):
    """Two activations of one size, side by side in the channels; the map itself never exists."""

    first: Activation
    second: Activation


def suggested_format(x: Tensor) -> torch.memory_format:
    """The memory format that PyTorch's convolutions derive from a 4-D tensor's strides.

    The rules of c10's is_channels_last_strides_2d: a size-1 dimension counts by its stride.
    """
    least = 0
    if x.stride(1) == 0:
        return torch.contiguous_format
    for d in (1, 3, 2, 0):
        if x.size(d) == 0 or x.stride(d) < least:
            return torch.contiguous_format
        if d == 0 and least == x.stride(1):
            return torch.contiguous_format
        least = x.stride(d) * (x.size(d) if x.size(d) > 1 else 1)
    return torch.channels_last
