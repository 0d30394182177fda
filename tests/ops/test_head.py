"""head: the 1x1 convolution of an Activation to the classes."""

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
    evaluate,
)
from oracle import CHANNELS, SLOPES, Head, Source, random
from sampling import sampled

from fastunet.activation import NEAREST, Activation
from fastunet.ops import head

CLASSES = (1, 2, 8, 9, 21)
FORMATS = (torch.channels_last, torch.contiguous_format)


def matrix():
    sizes = itertools.cycle([(9, 11), (10, 7), (1, 5), (5, 1)])
    axes = itertools.product(CHANNELS, CLASSES, SLOPES, ("plain", "one", "each"), (1, 2), FORMATS)
    for i, (channels, classes, slope, rows, n, memory_format) in enumerate(axes):
        size = next(sizes)
        source = Source(channels, *size, rows=rows, slope=slope)
        case = Head(source, classes, n, bool(i // 5 % 2), memory_format)
        name = f"c{channels}-k{classes}-{slope}-{rows}-n{n}-{size}-bias{case.bias}-{memory_format}"
        yield name, case


CASES = dict(matrix())


@pytest.mark.parametrize("name", list(CASES)[::17])  # shares no factor with the axes
def test_oracle(implementation, name):
    check_oracle(CASES[name])


@pytest.mark.slow
def test_oracle_whole_matrix(implementation):
    check_oracles(CASES)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("rows", ["one", "each"])
def test_half(implementation, dtype, classes, rows):
    check_oracle(Head(Source(13, rows=rows), classes), dtype)


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("rows", ["plain", "one", "each"])
def test_no_samples(backend, classes, rows):
    check_empty(Head(Source(3, rows=rows), classes, n=0))


@pytest.mark.parametrize("classes", [3, 9])
@pytest.mark.parametrize("slope", sampled(SLOPES, [0.01]))
@pytest.mark.parametrize("rows", ["one", "each"])
def test_gradcheck(backend, classes, slope, rows):
    check_gradients(Head(Source(3, 3, 4, rows=rows, slope=slope), classes))


@pytest.mark.parametrize(
    "case",
    [
        Head(Source(3), memory_format=torch.contiguous_format),
        Head(Source(8, rows="each"), classes=9),
        Head(Source(8, rows="plain"), classes=1, bias=False),
        Head(Source(1, 1, 1, slope=1.0), n=1),
    ],
    ids=["few", "many", "plain", "single"],
)
def test_registration(backend, case):
    check_registration("head", case)


@pytest.mark.parametrize("classes", [2, 8, 21])
def test_threads(compiled, threads, classes):
    check_repeats(Head(Source(13, 41, 67, rows="each"), classes), threads, (1, 2, 1))


@pytest.mark.parametrize("rows", ["plain", "one"])
@pytest.mark.parametrize("classes", [2, 9])
def test_results_stay(backend, classes, rows):
    check_results_stay(Head(Source(3, rows=rows), classes))


@pytest.mark.parametrize("case", [Head(Source(13), 2), Head(Source(13, rows="each"), 9)], ids=str)
def test_poisoned(compiled, poisoned, case):
    check_poisoned(case, poisoned)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("classes", [2, 9])
def test_input_layout(compiled, layout, channels, classes):
    check_input_layout(Head(Source(channels), classes), layout)


@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANSIONS])
@pytest.mark.parametrize("classes", [1, 3, 9])
def test_gradient_layout(compiled, layout, classes):
    check_gradient_layout(Head(Source(13), classes), layout)


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_memory_format(backend, classes, memory_format):
    case = Head(Source(8), classes, memory_format=memory_format)
    assert case.fast(**case.tensors()).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("classes", [2, 9])
def test_special_values(implementation, classes):
    """NaN and Inf stay in their pixel, and ReLU makes 0 of -Inf."""
    source = Source(9, 4, 4, rows="one")
    t = source.tensors(1)
    t["scale"], t["shift"] = torch.ones_like(t["scale"]), torch.zeros_like(t["shift"])
    pixels = t["y"][0].permute(1, 2, 0)
    pixels[0, 0, 2], pixels[1, 1, 3], pixels[2, 2] = float("nan"), float("inf"), -float("inf")
    weight = random(classes, 9, 1, 1)
    logits = head(source.activation(t), weight)
    want = torch.conv2d(source.plain(t), weight)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert logits[0, :, 0, 0].isnan().all()
    assert logits[0, :, 1, 1].isinf().all()
    assert not logits[0, :, 2, 2].any()


def test_source_frozen(backend):
    """Where only the parameters are trained, they get the same gradients."""
    case = Head(Source(13), 3)
    tensors = case.tensors()
    want = evaluate(case.fast, tensors)
    weight, bias = (tensors.pop(name) for name in ("weight", "bias"))
    got = evaluate(
        lambda weight, bias: case.fast(weight, bias, **tensors), {"weight": weight, "bias": bias}
    )
    assert all(torch.equal(got[name], want[name]) for name in got)


def test_errors(backend):
    x = Activation.of(random(1, 8, 4, 4))
    with pytest.raises(ValueError, match=r"weight must be \[K, 8, 1, 1\], got \[2, 7, 1, 1\]"):
        head(x, random(2, 7, 1, 1))
    with pytest.raises(TypeError, match=r"dtype torch\.float64, got torch\.float32"):
        head(x, random(2, 8, 1, 1, dtype=torch.float64))
    for pending in (x.pool(), x.upsample(NEAREST).place((4, 4)), x.place((5, 4))):
        with pytest.raises(ValueError, match="no resampling may be pending"):
            head(pending, random(2, 8, 1, 1))
    with pytest.raises(TypeError, match="device meta, got cpu"):
        head(x, random(2, 8, 1, 1).to("meta"))
    with pytest.raises(TypeError, match="bias must be on the weight's device cpu, got meta"):
        head(x, random(2, 8, 1, 1), random(2).to("meta"))


def test_autocast(backend):
    check_autocast(Head(Source(8, rows="plain"), 2))
