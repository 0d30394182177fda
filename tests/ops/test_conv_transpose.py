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
    check_oracles,
    check_poisoned,
    check_registration,
    check_repeats,
    check_results_stay,
)
from oracle import CHANNELS, MODE_NAMES, MODES, PLACEMENTS, SLOPES, ConvTranspose, Source, random
from sampling import sampled

from fastunet import cpu
from fastunet.activation import BILINEAR, MAX_POOL, Activation
from fastunet.compiled import flat
from fastunet.extension import kernels
from fastunet.memory import measure_allocations
from fastunet.ops import conv_transpose


def matrix():
    sizes = itertools.cycle([(9, 11), (10, 8), (8, 9)])
    channels = itertools.cycle(CHANNELS)
    axes = itertools.product(CHANNELS, MODES, ("exact", "crop"), SLOPES, ("plain", "one", "each"))
    for i, (out, mode, placement, slope, rows) in enumerate(axes):
        source = Source(next(channels), *next(sizes), mode, PLACEMENTS[placement], rows, slope)
        case = ConvTranspose(source, out, 1 + i // 3 % 2, bool(i // 5 % 2))
        name = f"c{source.channels}-k{out}-{MODE_NAMES[mode]}-{placement}-{slope}-{rows}-n{case.n}"
        yield f"{name}-bias{case.bias}", case


CASES = dict(matrix())


@pytest.mark.parametrize("name", list(CASES)[::17])  # shares no factor with the axes
def test_oracle(implementation, name):
    check_oracle(CASES[name])


@pytest.mark.slow
def test_oracle_whole_matrix(implementation):
    check_oracles(CASES)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", ["one", "each"])
def test_half(implementation, dtype, rows):
    check_oracle(ConvTranspose(Source(13, rows=rows), 8), dtype)


def test_autocast(backend):
    check_autocast(ConvTranspose(Source(8, rows="plain")))


@pytest.mark.parametrize("rows", ["plain", "one", "each"])
def test_no_samples(backend, rows):
    check_empty(ConvTranspose(Source(3, rows=rows), n=0, bias=False))


@pytest.mark.parametrize("slope", sampled(SLOPES, [0.01]))
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


def test_repeats(compiled, threads):
    check_repeats(ConvTranspose(Source(13, 33, 34, rows="each")), threads, (1, 3, 2, 1))


@pytest.mark.parametrize("rows", ["plain", "one"])
def test_results_stay(backend, rows):
    check_results_stay(ConvTranspose(Source(3, rows=rows)))


def test_poisoned(compiled, poisoned):
    check_poisoned(ConvTranspose(Source(13)), poisoned)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ["plain", "one"])
@pytest.mark.parametrize("channels", [1, 13])
def test_input_layout(compiled, layout, rows, channels):
    check_input_layout(ConvTranspose(Source(channels, rows=rows)), layout)


@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANSIONS])
def test_gradient_layout(compiled, layout):
    check_gradient_layout(ConvTranspose(Source(13)), layout)


def test_errors(backend):
    x = Activation.of(random(1, 8, 4, 4))
    with pytest.raises(ValueError, match=r"weight must be \[8, Cout, 2, 2\], got \[7, 2, 2, 2\]"):
        conv_transpose(x, random(7, 2, 2, 2))
    with pytest.raises(ValueError, match=r"must have channels, got weight \[8, 0, 2, 2\]"):
        conv_transpose(x, random(8, 0, 2, 2))
    with pytest.raises(TypeError, match=r"dtype torch\.float64, got torch\.float32"):
        conv_transpose(x, random(8, 2, 2, 2, dtype=torch.float64))
    with pytest.raises(TypeError, match="device meta, got cpu"):
        conv_transpose(x, random(8, 2, 2, 2).to("meta"))
    with pytest.raises(TypeError, match="bias must be on the weight's device cpu, got meta"):
        conv_transpose(x, random(8, 2, 2, 2), random(2).to("meta"))


def test_scratch_of_backward(compiled):
    """A source that is read pixel for pixel needs none."""
    case = ConvTranspose(Source(8, 32, 32))
    tensors = case.tensors()
    source, dy = case.source.activation(tensors), random(2, 64, 64, 3).permute(0, 3, 1, 2)
    arguments = dy, source, (True, True), tensors["weight"]
    _, live, peak = measure_allocations(lambda: cpu.conv_transpose_bwd(*arguments))
    assert peak == live


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        (Source(8, 4, 4), (4, 4), "dz must be given where a source is resampled or placed"),
        (Source(8, 8, 8, MAX_POOL), None, "dz must be given where a source is resampled or placed"),
        (Source(8, 2, 2, BILINEAR), (2, 2), r"dz must be \[2, 8, 4, 4\], got \[2, 8, 2, 2\]"),
    ],
    ids=["extra", "missing", "size"],
)
def test_kernels_refuse_wrong_scratch(compiled, source, size, message):
    case = ConvTranspose(source)
    tensors = case.tensors()
    dz = None if size is None else random(2, *size, 8).permute(0, 3, 1, 2)
    grads = torch.empty_like(tensors["y"]), None, None, dz, random(2, 8, 8, 3).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match=message):
        kernels().conv_transpose_bwd(
            None, torch.empty(3), *grads, *flat(source.activation(tensors)), tensors["weight"]
        )
