"""The operators' cases, at the shapes of U-Nets: on a CPU of base 16 and 64 on a 256x256 image.

A reader's case starts from raw convolution outputs, as inside the network: eager PyTorch normalises
(by given statistics), activates, resamples, pads, concatenates and convolves, FastUNet reads an
Activation with all of it pending. Both compute the same function with the same gradients. The
statistics themselves are in the ``batch`` cases: one whole layer from an ordinary tensor to one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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

from .contest import CHANNELS_LAST, FASTUNET, ORACLE, Case, Contender, Setting, serving


class Shapes(NamedTuple):
    bases: tuple[int, ...]
    image: int
    batch: int = 1


CPU_SHAPES, GPU_SHAPES = Shapes((16, 64), 256), Shapes((64,), 512, 4)
CLASSES = (2, 21)
EPS = 1e-5
FLOOR = 1e-5  # relative L2 per operator in fp32, see the design
KINK = 1e-3  # pre-activations nearer to 0 than this get no gradient: rounding decides their sign
RESAMPLERS = {
    "affine": (NONE, lambda z: z),
    "max_pool": (MAX_POOL, lambda z: F.max_pool2d(z, 2)),
    "bilinear": (BILINEAR, lambda z: F.interpolate(z, scale_factor=2.0, mode="bilinear")),
    "bilinear_align_corners": (
        BILINEAR_ALIGN_CORNERS,
        lambda z: F.interpolate(z, scale_factor=2.0, mode="bilinear", align_corners=True),
    ),
    "nearest": (NEAREST, lambda z: F.interpolate(z, scale_factor=2.0, mode="nearest")),
}


class Problem(NamedTuple):
    """inputs: tensors with gradients, [N, C, H, W] maps first; both functions take them all."""

    inputs: list[Tensor]
    eager: Callable[..., Tensor]
    fast: Callable[..., Tensor]
    mask: Tensor | None = None  # of the output's gradient


def normal(seed: int, *shape: int) -> Tensor:
    device = torch.get_default_device()
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device)


def raw_map(seed: int, n: int, channels: int, size: int) -> list[Tensor]:
    """y [N, C, H, W], scale [1, C], shift [1, C] whose pre-activations are never near 0, and never
    near each other within a pooling window: rounding does not decide any gradient."""
    scale = normal(seed + 1, 1, channels).abs() / 2 + 0.5
    shift = normal(seed + 2, 1, channels) / 4
    place = torch.arange(size) % 2
    place = 2 * place[:, None] + place  # 0..3 within each 2x2 window
    t = (4 * (normal(seed, n, channels, size, size) * 256).round() + place + 0.5) / 1024
    return [(t - shift[:, :, None, None]) / scale[:, :, None, None], scale, shift]


def eager_source(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    mean, var = torch.zeros_like(scale[0]), torch.full_like(scale[0], 1 - EPS)
    z = F.batch_norm(y, mean, var, scale[0], shift[0], training=False, eps=EPS)
    return F.relu(z, inplace=True)


def fast_source(y: Tensor, scale: Tensor, shift: Tensor) -> Activation:
    center = torch.zeros_like(scale)
    return Activation.of(y)._replace(center=center, scale=scale, shift=shift, slope=0.0)


def pended(x: Activation, mode: int) -> Activation:
    if mode == NONE:
        return x
    return x.pool() if mode == MAX_POOL else x.upsample(mode)


def weights(seed: int, *shape: int) -> Tensor:
    return normal(seed, *shape) / (shape[1] * shape[2] * shape[3]) ** 0.5


def conv_reader(resampler: str, cin: int, cout: int, size: int, n: int) -> Problem:
    """A convolution that reads one map with normalisation and perhaps resampling pending."""
    mode, resample = RESAMPLERS[resampler]

    def eager(y, scale, shift, weight):
        return F.conv2d(resample(eager_source(y, scale, shift)), weight, padding=1)

    def fast(y, scale, shift, weight):
        return conv_norm_act(pended(fast_source(y, scale, shift), mode), weight).output.y

    return Problem([*raw_map(0, n, cin, size), weights(9, cout, cin, 3, 3)], eager, fast)


def conv_concat(channels: int, size: int, n: int) -> Problem:
    """A decoder's first convolution: the skip beside the map from below, upsampled and padded."""
    mode, resample = RESAMPLERS["bilinear_align_corners"]

    def eager(y0, scale0, shift0, y1, scale1, shift1, weight):
        below = resample(eager_source(y1, scale1, shift1))
        dy, dx = size - below.size(2), size - below.size(3)
        below = F.pad(below, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        pair = torch.cat([eager_source(y0, scale0, shift0), below], dim=1)
        return F.conv2d(pair, weight, padding=1)

    def fast(y0, scale0, shift0, y1, scale1, shift1, weight):
        below = fast_source(y1, scale1, shift1).upsample(mode).place((size, size))
        return conv_norm_act(Concat(fast_source(y0, scale0, shift0), below), weight).output.y

    sources = [*raw_map(0, n, channels, size), *raw_map(3, n, channels, size // 2)]
    return Problem([*sources, weights(9, channels, 2 * channels, 3, 3)], eager, fast)


def conv_batch(cin: int, cout: int, size: int, n: int) -> Problem:
    """Convolution, BatchNorm in training and ReLU, from an ordinary tensor to one."""

    def layer(x, weight, gamma, beta):
        y = F.conv2d(x, weight, padding=1)
        return F.batch_norm(y, None, None, gamma, beta, training=True, eps=EPS)

    def eager(*inputs):
        return F.relu(layer(*inputs), inplace=True)

    def fast(x, weight, gamma, beta):
        y, *_ = conv_norm_act(
            Activation.of(x), weight, norm="batch", gamma=gamma, beta=beta, eps=EPS, slope=0.0
        )
        return materialize(y)

    gamma, beta = normal(1, cout).abs() / 2 + 0.5, normal(2, cout) / 4
    inputs = [normal(0, n, cin, size, size), weights(9, cout, cin, 3, 3), gamma, beta]
    return Problem(inputs, eager, fast, layer(*inputs).abs() > KINK)


def transpose(cin: int, size: int, n: int) -> Problem:
    def eager(y, scale, shift, weight, bias):
        return F.conv_transpose2d(eager_source(y, scale, shift), weight, bias, stride=2)

    def fast(y, scale, shift, weight, bias):
        return conv_transpose(fast_source(y, scale, shift), weight, bias).y

    weight, bias = normal(9, cin, cin // 2, 2, 2) / cin**0.5, normal(8, cin // 2)
    return Problem([*raw_map(0, n, cin, size), weight, bias], eager, fast)


def resampling(resampler: str, channels: int, size: int, n: int) -> Problem:
    mode, resample = RESAMPLERS[resampler]

    def eager(*source):
        return resample(eager_source(*source))

    def fast(*source):
        return materialize(pended(fast_source(*source), mode))

    return Problem(raw_map(0, n, channels, size), eager, fast)


def logits(channels: int, classes: int, size: int, n: int) -> Problem:
    def eager(y, scale, shift, weight, bias):
        return F.conv2d(eager_source(y, scale, shift), weight, bias)

    def fast(y, scale, shift, weight, bias):
        return head(fast_source(y, scale, shift), weight, bias)

    weight, bias = weights(9, classes, channels, 1, 1), normal(8, classes)
    return Problem([*raw_map(0, n, channels, size), weight, bias], eager, fast)


@functools.lru_cache(maxsize=1)
def made(problem: Callable[[], Problem], device: str) -> Problem:
    with torch.device(device):
        return problem()


def make(problem: Callable[[], Problem], phase: str, name: str, setting: Setting) -> Contender:
    data = made(problem, setting.device)
    inputs = [as_input(t, name, setting) for t in data.inputs]
    function = data.fast if name.startswith(FASTUNET) else data.eager

    def forward() -> list[Tensor]:
        with torch.inference_mode(), setting.autocast(), serving(name):
            return [function(*inputs)]

    if phase == "forward":
        return Contender(forward, reads=inputs)

    def record() -> Tensor:
        with setting.autocast(), serving(name):
            return function(*inputs)

    output = record()
    with torch.device(setting.device):
        grad = normal(7, *output.shape)
    if data.mask is not None:
        grad *= data.mask
    grad = torch.empty_like(output).copy_(grad)

    def backward() -> list[Tensor]:
        return list(torch.autograd.grad(output, inputs, grad, retain_graph=True))

    return Contender(backward, record, [t for t in inputs if not is_map(t)], [*inputs, grad])


def as_input(t: Tensor, name: str, setting: Setting) -> Tensor:
    """A leaf in the contender's layout. Maps are in the compute dtype, parameters in fp32."""
    dtype = setting.dtype if name == ORACLE or is_map(t) else t.dtype
    t = t.to(setting.device, dtype, copy=True)
    fast = name.startswith(FASTUNET)
    if t.dim() == 4 and (name == CHANNELS_LAST or (fast and is_map(t))):
        t = t.contiguous(memory_format=torch.channels_last)
    return t.requires_grad_()


def is_map(t: Tensor) -> bool:
    return t.dim() == 4 and t.size(2) > 3  # no weight is as large, no map so small


def problems(shapes: Shapes) -> list[tuple[str, str, Callable[[], Problem]]]:
    """(operator, name, problem) of every case."""
    found: list[tuple[str, str, Callable[[], Problem]]] = []

    def add(operator: str, name: str, problem: Callable[..., Problem], *args: Any) -> None:
        found.append((operator, name, functools.partial(problem, *args, n=shapes.batch)))

    for base in shapes.bases:
        width = [base << level for level in range(5)]
        size = [shapes.image >> level for level in range(5)]

        def at(kind: str, level: int, base: int = base) -> str:
            return f"base{base}-level{level}-{kind}"

        for i in (0, 2, 4):
            add("conv_norm_act", at("one", i), conv_reader, "affine", width[i], width[i], size[i])
        for i in (1, 4):
            args = "max_pool", width[i - 1], width[i], size[i - 1]
            add("conv_norm_act", at("pool", i), conv_reader, *args)
        for i in (0, 3):
            add("conv_norm_act", at("upsample-concat", i), conv_concat, width[i], size[i])
        add("conv_norm_act", at("batch-image", 0), conv_batch, 3, width[0], size[0])
        for i in (0, 2, 4):
            add("conv_norm_act", at("batch", i), conv_batch, width[i], width[i], size[i])
        for i in (0, 3):
            add("conv_transpose", at("up", i), transpose, width[i + 1], size[i + 1])
        for resampler in RESAMPLERS:
            add("resample", at(resampler, 1), resampling, resampler, width[1], size[1])
        for classes in CLASSES:
            add("head", at(f"classes{classes}", 0), logits, width[0], classes, size[0])
    return found


def operator_cases(shapes: Shapes = CPU_SHAPES) -> list[Case]:
    return [
        Case(f"operators/{operator}", name, phase, FLOOR, functools.partial(make, problem, phase))
        for operator, name, problem in problems(shapes)
        for phase in ("forward", "backward")
    ]
