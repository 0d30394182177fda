"""How an Activation crosses an operator's boundary: as flat arguments."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastunet.activation import Activation

# y, center, scale, shift, slope, mode
SOURCE = (
    "Tensor {0}, Tensor? center{1}, Tensor? scale{1}, Tensor? shift{1}, float slope{1}, int mode{1}"
)
COUNT = 6
FIRST = SOURCE.format("y0", "0")
# The second source, absent where y1 is None.
SECOND = SOURCE.format("y1", "1").replace("Tensor y1", "Tensor? y1")


def flatten(source: Activation | None) -> tuple:
    if source is None:
        return None, None, None, None, 1.0, 0
    return source[:COUNT]


def unflatten(args: tuple, size: list[int] | tuple[int, int]) -> Activation:
    y, center, scale, shift, slope, mode = args
    height, width = size
    return Activation(y, center, scale, shift, slope, mode, (height, width), torch.channels_last)


def cast(source: Activation, dtype: torch.dtype) -> Activation:
    return source if source.y.dtype == dtype else source._replace(y=source.y.to(dtype))


def compute_dtype(
    x: Tensor, weight: Tensor, name: str, vectors: Mapping[str, Tensor | None]
) -> torch.dtype:
    """The dtype in which a layer computes: autocast's where that is on, else the weight's.

    vectors: the layer's others, by name.

    Raises:
        TypeError: where the input's dtype, or the device of any, is not the weight's.
    """
    for other, t in (("the input", x), *vectors.items()):
        if t is not None and t.device != weight.device:
            raise TypeError(
                f"{name}: {other} must be on the weight's device {weight.device}, got {t.device}"
            )
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"{name}: the input must have the weight's dtype {weight.dtype}, got {x.dtype}"
        )
    return weight.dtype


def require_channels(weight: Tensor, name: str) -> None:
    """Raises a ValueError where a convolution has no inputs or outputs: kernels count on both."""
    if weight.numel() == 0:
        shape = list(weight.shape)
        raise ValueError(f"{name}: input and output must have channels, got weight {shape}")


def fake_source_grads(y: Tensor, scale: Tensor | None, needed: bool) -> list[Tensor]:
    """dy, dscale, dshift as the backward operators return them."""
    if not needed:
        return [y.new_empty(0) for _ in range(3)]
    dy = torch.empty_like(y, memory_format=torch.channels_last)
    if scale is None:
        return [dy, y.new_empty(0), y.new_empty(0)]
    return [dy, torch.empty_like(scale), torch.empty_like(scale)]
