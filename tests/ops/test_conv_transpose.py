"""conv_transpose: the 2x2 stride 2 transposed convolution of an Activation."""

import itertools

import pytest
import torch
from checks import (
    EXPANSIONS,
    HALVES,
    LAYOUTS,
    check_autocast,
    check_empty,
    check_gradient_layout,
    check_gradients,
    check_input_layout,
    check_oracle,
    check_poisoned,
    check_registration,
    check_repeats,
)
from oracle import CHANNELS, MODE_NAMES, MODES, PLACEMENTS, SLOPES, ConvTranspose, Source, random

from fastunet.activation import Activation
from fastunet.ops import conv_transpose


def matrix():
    sizes = itertools.cycle([(9, 11), (10, 7), (7, 8)])
    channels = itertools.cycle(CHANNELS)
    axes = itertools.product(CHANNELS, MODES, ("exact", "crop"), SLOPES, ("plain", "one", "each"))
    for i, (out, mode, placement, slope, rows) in enumerate(axes):
        source = Source(next(channels), *next(sizes), mode, PLACEMENTS[placement], rows, slope)
        case = ConvTranspose(source, out, 1 + i // 3 % 2, bool(i // 5 % 2))
        name = f"c{source.channels}-k{out}-{MODE_NAMES[mode]}-{placement}-{slope}-{rows}-n{case.n}"
        marks = () if i % 17 == 0 else pytest.mark.slow
        yield pytest.param(case, id=f"{name}-bias{case.bias}", marks=marks)


@pytest.mark.parametrize("case", list(matrix()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_oracle(backend, case, dtype):
    check_oracle(case, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", ["one", "each"])
def test_half(backend, dtype, rows):
    check_oracle(ConvTranspose(Source(13, rows=rows), 8), dtype)


def test_autocast(backend):
    check_autocast(ConvTranspose(Source(8)))


@pytest.mark.parametrize("rows", ["plain", "one", "each"])
def test_no_samples(backend, rows):
    check_empty(ConvTranspose(Source(3, rows=rows), n=0, bias=False))


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("rows", ["plain", "one", "each"])
def test_gradcheck(backend, slope, rows):
    check_gradients(ConvTranspose(Source(3, 3, 4, rows=rows, slope=slope), 2))


@pytest.mark.parametrize(
    "case",
    [
        ConvTranspose(Source(3, rows="each")),
        ConvTranspose(Source(8, rows="plain"), bias=False),
        ConvTranspose(Source(1, 1, 1, slope=1.0), 1, n=1),
    ],
    ids=["each", "plain", "single"],
)
def test_registration(backend, case):
    check_registration("conv_transpose", case)


def test_repeats(build, threads):
    """Its sums are PyTorch's, so the number of threads stays."""
    check_repeats(ConvTranspose(Source(13, 33, 34, rows="each")), threads, (1, 1))


def test_poisoned(build, poisoned):
    check_poisoned(ConvTranspose(Source(13)), poisoned)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ["plain", "one"])
@pytest.mark.parametrize("channels", [1, 13])
def test_input_layout(build, layout, rows, channels):
    check_input_layout(ConvTranspose(Source(channels, rows=rows)), layout)


@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANSIONS])
def test_gradient_layout(build, layout):
    check_gradient_layout(ConvTranspose(Source(13)), layout)


def test_errors(backend):
    x = Activation.of(random(1, 8, 4, 4))
    with pytest.raises(ValueError, match=r"weight must be \[8, Cout, 2, 2\], got \[7, 2, 2, 2\]"):
        conv_transpose(x, random(7, 2, 2, 2))
    with pytest.raises(TypeError, match="dtype torch.float64, got torch.float32"):
        conv_transpose(x, random(8, 2, 2, 2, dtype=torch.float64))
    with pytest.raises(TypeError, match="device meta, got cpu"):
        conv_transpose(x, random(8, 2, 2, 2).to("meta"))
