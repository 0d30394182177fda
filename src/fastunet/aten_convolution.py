"""PyTorch's own convolutions over Activations, for devices, dtypes and shapes without faster ones.

``kernels`` is a backend module, which has ``resample`` to materialise the sources.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastunet.activation import Activation
from fastunet.maps import empty_map

# stride, padding, dilation, transposed, output padding, groups
CONVOLUTION = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
STRIDED = ([2, 2], [0, 0], [1, 1], False, [0, 0], 1)
TRANSPOSED = ([2, 2], [0, 0], [1, 1], True, [0, 0], 1)


def precision_of(dtype: torch.dtype) -> str:
    """How a product of fp32 values is formed: as PyTorch's convolutions are asked to."""
    if dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    return "ieee"


@contextlib.contextmanager
def deterministic(x: Tensor) -> Iterator[None]:
    """On GPUs cuDNN may else choose algorithms that add up in another order every time."""
    before = torch.backends.cudnn.deterministic
    if before or not x.is_cuda:
        yield
        return
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def convolution(kernels: ModuleType, sources: Sequence[Activation], weight: Tensor) -> Tensor:
    """3x3, padding 1, without bias; the result is channels_last."""
    x = gather(kernels, sources)
    low = weight.to(x.dtype)
    (x,) = favoured_layout(low, x, deep=16)
    with deterministic(x):
        y = torch.ops.aten.convolution(x, low, None, *CONVOLUTION)
    return y.contiguous(memory_format=torch.channels_last)


def convolution_input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the convolution's input, channels_last."""
    low = weight.to(dy.dtype)
    # convolution_backward wants the input in memory, although it does not read it.
    unread = empty_map(dy, weight.size(1), (dy.size(2), dy.size(3)))
    dy, unread = favoured_layout(low, dy, unread, deep=2.5)
    with deterministic(dy):
        dx = torch.ops.aten.convolution_backward(
            dy, unread, low, None, *CONVOLUTION, [True, False, False]
        )[0]
    return dx.contiguous(memory_format=torch.channels_last)


def convolution_weight_grad(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The weight's gradient; only its shape counts."""
    low = weight.to(x.dtype)
    dy, x = favoured_layout(low, dy, x, deep=2.5)
    with deterministic(x):
        return torch.ops.aten.convolution_backward(
            dy, x, low, None, *CONVOLUTION, [False, True, False]
        )[1]


def transposed(
    kernels: ModuleType, source: Activation, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """2x2, stride 2; the result is channels_last."""
    x = gather(kernels, [source])
    low, low_bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    with deterministic(x):
        y = torch.ops.aten.convolution(x, low, low_bias, *TRANSPOSED)
    return y.contiguous(memory_format=torch.channels_last)


def transposed_input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the transposed convolution's input, channels_last: an ordinary convolution
    of stride 2."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    with deterministic(dy):
        dx = torch.ops.aten.convolution(dy, weight.to(dy.dtype), None, *STRIDED)
    return dx.contiguous(memory_format=torch.channels_last)


def transposed_parameter_grads(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """dweight, dbias."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    with deterministic(x):
        _, dweight, dbias = torch.ops.aten.convolution_backward(
            *(dy, x, weight.to(x.dtype), [weight.size(1)], *TRANSPOSED),
            [False, True, True],
        )
    return dweight, dbias


def gather(kernels: ModuleType, sources: Sequence[Activation]) -> Tensor:
    """The convolution's input, channels_last: the sources' maps side by side."""
    if len(sources) == 1 and not sources[0].pending:
        return sources[0].y.contiguous(memory_format=torch.channels_last)
    y, channel = sources[0].y, 0
    x = empty_map(y, sum(s.y.size(1) for s in sources), sources[0].size)
    for source in sources:
        channels = source.y.size(1)
        kernels.resample(source, out=x.narrow(1, channel, channels))
        channel += channels
    return x


def favoured_layout(weight: Tensor, *maps: Tensor, deep: float) -> tuple[Tensor, ...]:
    """The maps in the memory format in which PyTorch's convolution is fastest.

    Channels_last, but on the CPU contiguous where the weight is more than ``deep`` times larger
    than the maps (the lowest levels of wide networks): there oneDNN is up to 4x faster on
    contiguous maps, and converting those costs next to nothing.
    """
    pixels = maps[0].numel() // max(1, maps[0].size(1))
    contiguous = (
        weight.device.type == "cpu"
        and weight.numel() > deep * (weight.size(0) + weight.size(1)) * pixels
    )
    memory_format = torch.contiguous_format if contiguous else torch.channels_last
    return tuple(t.contiguous(memory_format=memory_format) for t in maps)
