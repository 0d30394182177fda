"""resample: every pending work, materialised, and its backward."""

import itertools

import pytest
import torch
from checks import (
    EXPANSIONS,
    HALVES,
    LAYOUTS,
    assert_identical,
    assert_within,
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
from conftest import all_builds
from oracle import CHANNELS, MODE_NAMES, MODES, PLACEMENTS, SLOPES, Resample, Source, random
from sampling import sampled

from fastunet.activation import BILINEAR, MAX_POOL, NEAREST, NONE, Activation
from fastunet.ops import materialize

every_mode = pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)


def matrix():
    """Every structure; channels and sizes vary along with it."""
    sizes = itertools.cycle([(9, 11), (10, 7), (7, 8), (12, 12)])
    channels = itertools.cycle(CHANNELS)
    axes = itertools.product(MODES, PLACEMENTS, SLOPES, ("plain", "one", "each"), (1, 2))
    for mode, placement, slope, rows, n in axes:
        source = Source(next(channels), *next(sizes), mode, PLACEMENTS[placement], rows, slope)
        name = f"{MODE_NAMES[mode]}-{placement}-{slope}-{rows}-c{source.channels}-n{n}"
        yield name, Resample(source, n)


CASES = dict(matrix())


@pytest.mark.parametrize("name", list(CASES)[::7])  # shares no factor with the axes
def test_oracle(implementation, name):
    check_oracle(CASES[name])


@pytest.mark.slow
def test_oracle_whole_matrix(implementation):
    check_oracles(CASES)


@every_mode
@every_half
@pytest.mark.parametrize("rows", ["one", "each"])
def test_half(implementation, mode, dtype, rows):
    check_oracle(Resample(Source(13, mode=mode, placement=(1, -1), rows=rows, slope=0.01)), dtype)


@every_mode
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("channels", [1, 8])
def test_small(backend, mode, size, channels):
    """Maps of one row or column, whose strides are ambiguous."""
    if mode == MAX_POOL:
        size = tuple(2 * s for s in size)
    check_oracle(Resample(Source(channels, *size, mode=mode, placement=(2, 3))))


@every_mode
def test_cropped_away(backend, mode):
    """A target without any of the map's pixels along one axis, or without pixels at all."""
    source = Source(3, 4, 4, mode)
    for size in ((0, 3), (3, 0)):
        placement = (size[0] - source.resampled[0], size[1] - source.resampled[1])
        check_empty(Resample(source._replace(placement=placement)))


@every_mode
@pytest.mark.parametrize("rows", ["plain", "one", "each"])
def test_no_samples(backend, mode, rows):
    check_empty(Resample(Source(3, mode=mode, placement=(1, 1), rows=rows), n=0))


@every_mode
@pytest.mark.parametrize("slope", sampled(SLOPES, [0.01]))
@pytest.mark.parametrize("rows", sampled(["one", "each"], ["each"]))
def test_gradcheck(backend, mode, slope, rows):
    """At fixed center, which is what a reader differentiates."""
    source = Source(3, 5, 4, mode, (1, -1), rows, slope)
    check_gradients(Resample(source))


@pytest.mark.parametrize(
    "case",
    [
        Resample(Source(3, mode=MAX_POOL)),
        Resample(Source(8, mode=BILINEAR, placement=(1, -1), rows="each")),
        Resample(Source(3, mode=NEAREST, rows="plain")),
        Resample(Source(1, 1, 1, slope=1.0), n=1),
    ],
    ids=["pool", "bilinear", "nearest", "single"],
)
def test_registration(backend, case):
    check_registration("resample", case)


@every_mode
def test_threads(compiled, threads, mode):
    case = Resample(Source(13, 41, 67, mode, (1, -1), "each", 0.01))
    check_repeats(case, threads, (1, 2, 1))


@every_mode
@pytest.mark.parametrize("rows", ["plain", "one"])
def test_results_stay(backend, mode, rows):
    check_results_stay(Resample(Source(3, mode=mode, placement=(1, -1), rows=rows)))


@every_mode
@pytest.mark.parametrize("placement", ["pad", "crop"])
@pytest.mark.parametrize("size", [(9, 11), (8, 6), (1, 1)], ids=str)
def test_poisoned(compiled, poisoned, mode, placement, size):
    placement = PLACEMENTS[placement] if size != (1, 1) else (2, 3)
    check_poisoned(Resample(Source(13, *size, mode, placement)), poisoned)


@every_mode
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 13])
def test_input_layout(compiled, mode, layout, channels):
    check_input_layout(Resample(Source(channels, mode=mode, placement=(1, -1))), layout)


@every_mode
@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANSIONS])
@pytest.mark.parametrize("channels", [1, 13])
def test_gradient_layout(compiled, mode, layout, channels):
    check_gradient_layout(Resample(Source(channels, mode=mode, placement=(1, -1))), layout)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_shown_in_its_memory_format(backend, memory_format):
    source = Source(3, mode=MAX_POOL)
    x = source.activation(source.tensors(2))._replace(memory_format=memory_format)
    assert materialize(x).is_contiguous(memory_format=memory_format)
    assert materialize(Activation.of(x.y, memory_format)).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("rows", ["plain", "one"])
def test_padding_is_zero_after_activation(backend, rows):
    source = Source(3, 2, 2, NONE, (2, 2), rows, 1.0)
    z = materialize(source.activation(source.tensors(1)))
    assert z[:, :, 1:3, 1:3].all()
    z[:, :, 1:3, 1:3] = 0
    assert not z.any()


SPECIAL = (float("nan"), float("inf"), -float("inf"))


@every_mode
@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("where", ["corner", "region", "everywhere"])
def test_special_values(implementation, mode, slope, special, where):
    """NaN and Inf come out where plain PyTorch has them (0 * Inf included: see PyTorch's taps)."""
    source = Source(9, 5, 6, mode, (1, 1), "one", slope)
    t = source.tensors(2)
    t["scale"] = t["scale"].abs() + 0.1
    height, width = {
        "corner": (slice(0, 1), slice(0, 1)),
        "region": (slice(1, 4), slice(2, 5)),
        "everywhere": (slice(None), slice(None)),
    }[where]
    t["y"][0, :, height, width] = special
    got, want = materialize(source.activation(t)), source.plain(t)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("position", range(4))
def test_pool_of_nan(implementation, position):
    """NaN wins wherever it stands in the window, and it gets the gradient."""
    y = torch.arange(4.0).view(1, 1, 2, 2).repeat(1, 9, 1, 1)
    y.view(1, 9, 4)[:, :, position] = float("nan")
    y.requires_grad_()
    z = materialize(Activation.of(y).pool())
    assert z.isnan().all()
    z.backward(torch.ones_like(z))
    want = torch.zeros(4)
    want[position] = 1
    assert torch.equal(y.grad.view(9, 4), want.expand(9, 4))


def test_pool_ties_go_to_the_first(backend):
    y = torch.tensor([[1.0, 1, 0, 2], [1, 1, 2, 2]])[None, None].requires_grad_()
    z = materialize(Activation.of(y).pool())
    z.backward(torch.ones_like(z))
    assert y.grad.view(2, 4).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("slope", SLOPES)
def test_slope_at_zero(backend, slope):
    """The derivative at exactly zero is the negative side's, as PyTorch has it."""
    y = torch.zeros(1, 9, 3, 3, requires_grad=True)
    one, zero = torch.ones(1, 9), torch.zeros(1, 9)
    z = materialize(Activation(y, zero, one, zero, slope, NONE, (3, 3), torch.channels_last))
    z.sum().backward()
    assert torch.equal(y.grad, torch.full_like(y, slope))


@every_half
def test_conversions(build, dtype):
    """All 65536 values survive being loaded and stored, by whole vectors and by partial ones."""
    y = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for channels in (8, 1, 4):
        x = y.view(4, -1, channels, 64).permute(0, 2, 1, 3)
        x = x.contiguous(memory_format=torch.channels_last)
        z = materialize(Activation.of(x)._replace(mode=NEAREST, size=(2 * x.size(2), 128)))
        torch.testing.assert_close(z[:, :, ::2, ::2], x, rtol=0, atol=0, equal_nan=True)


@every_half
def test_rounding(build, dtype):
    """fp32 values are stored as torch rounds them: ties, overflow, subnormals, NaN."""
    bits = torch.arange(-(2**31), 2**31, 2**13 - 1, dtype=torch.int64).to(torch.int32)
    halfway = torch.arange(2**15, dtype=torch.int16).view(dtype).float()
    halfway = (halfway[1:] + halfway[:-1]) / 2
    neighbours = (halfway.view(torch.int32) + d for d in (-1, 0, 1))
    values = torch.cat([bits, *neighbours]).view(torch.float32)
    values = torch.cat([values, -values])
    values = values[: values.numel() // 8 * 8].view(1, -1)
    # 0 * scale + shift, with slope 1: each channel stores its shift.
    zero = torch.zeros_like(values)
    y = torch.zeros(1, values.size(1), 1, 1, dtype=dtype)
    z = materialize(Activation(y, zero, zero, values, 1.0, NONE, (1, 1), torch.channels_last))
    torch.testing.assert_close(
        z.view(-1), values.view(-1).to(dtype), rtol=0, atol=0, equal_nan=True
    )


def test_builds_agree(monkeypatch):
    case = Resample(Source(13, mode=BILINEAR, placement=(1, -1), rows="each"))
    first, *others = all_builds(lambda: evaluate(case.fast, case.tensors()), monkeypatch)
    for other in others:
        assert_within(other, first, 1e-6)


def test_no_derivative_wanted(backend):
    """Without gradients the operator leaves no graph; the plain map is the tensor itself."""
    x = Activation.of(random(1, 8, 4, 4)).pool()
    assert materialize(x).grad_fn is None
    with torch.inference_mode():
        assert_identical({"z": materialize(x)}, {"z": torch.max_pool2d(x.y, 2)})
    assert materialize(x.y) is x.y
