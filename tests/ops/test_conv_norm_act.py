"""conv_norm_act: the 3x3 convolution of one or two Activations and what normalises its output.

Its outputs are read by resample, which test_resample checks by itself.
"""

import itertools
import random as pyrandom

import pytest
import torch
import torch.nn.functional as F
from checks import (
    EXPANSIONS,
    FP32_BUDGET,
    FP64_BUDGET,
    HALVES,
    LAYOUTS,
    assert_identical,
    assert_no_worse,
    assert_within,
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
    oracle,
)
from conftest import all_builds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    CHANNELS,
    MODE_NAMES,
    MODES,
    PLACEMENTS,
    SLOPES,
    Conv,
    Source,
    parameters_of,
    random,
)
from sampling import sampled
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from fastunet import backends, cpu
from fastunet.activation import BILINEAR, MAX_POOL, Activation, Concat
from fastunet.ops import conv_norm_act, conv_transpose, head, materialize

# norm, groups of 24 channels
NORMS = {
    "none": ("none", 0),
    "frozen": ("frozen", 0),
    "batch": ("batch", 0),
    "group": ("group", 4),
    "layer": ("group", 1),
    "instance": ("group", 24),
}
ALL = ("bias", "gamma", "beta")
SETS = ((), ("bias",), ("gamma", "beta"), ("bias", "beta"), ALL)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


every_norm = pytest.mark.parametrize("norm", NORMS)


def conv(norm, *sources, out_channels=24, **options):
    kind, groups = NORMS[norm]
    if norm == "instance":
        groups = out_channels
    return Conv(sources or (Source(3),), out_channels, kind, groups, **options)


def matrix():
    """Every structure; channels, rows, sizes, samples and parameters are drawn."""
    draw = pyrandom.Random(0)
    axes = itertools.product(
        NORMS, ("one", "skip_first", "skip_second"), MODES, ("exact", "pad", "crop"), SLOPES
    )
    for norm, order, mode, placement, slope in axes:
        size = draw.choice([(9, 11), (10, 8), (8, 9)])
        rows = draw.choices(("plain", "one", "each"), k=2)
        channels = draw.choices(CHANNELS, k=2)
        read = Source(channels[0], *size, mode, PLACEMENTS[placement], rows[0], slope)
        skip = Source(channels[1], *read.size, rows=rows[1], slope=draw.choice(SLOPES))
        sources = {"one": [read], "skip_first": [skip, read], "skip_second": [read, skip]}[order]
        grouped = norm in ("group", "layer")
        case = conv(
            norm,
            *sources,
            out_channels=draw.choice((8, 16, 24) if grouped else CHANNELS),
            n=draw.choice((1, 2)),
            parameters=draw.choice(SETS),
            slope=slope,
        )
        name = f"{norm}-{order}-{MODE_NAMES[mode]}-{placement}-{slope}"
        yield name, case


CASES = dict(matrix())


@pytest.mark.parametrize("name", list(CASES)[::7])  # shares no factor with the axes
def test_oracle(implementation, name):
    check_oracle(CASES[name])


@pytest.mark.slow
def test_oracle_whole_matrix(implementation):
    check_oracles(CASES)


@st.composite
def cases(draw):
    """Chains of every kind, cheap ones."""
    modes, slopes = st.sampled_from(MODES), st.sampled_from(SLOPES)
    rows, channels = st.sampled_from(("plain", "one", "each")), st.integers(1, 18)
    side, margin = st.integers(4, 9), st.integers(-1, 3)
    read = Source(
        draw(channels),
        draw(side),
        draw(side),
        draw(modes),
        (draw(margin), draw(margin)),
        draw(rows),
        draw(slopes),
    )
    sources = [read]
    if draw(st.booleans()):
        skip = Source(draw(channels), *read.size, rows=draw(rows), slope=draw(slopes))
        sources = draw(st.permutations([read, skip]))
    out_channels = draw(channels)
    norm = draw(st.sampled_from(("none", "frozen", "batch", "group")))
    divisors = [g for g in range(1, out_channels + 1) if out_channels % g == 0]
    return Conv(
        tuple(sources),
        out_channels,
        norm,
        draw(st.sampled_from(divisors)) if norm == "group" else 0,
        draw(st.integers(1, 3)),
        tuple(draw(st.sets(st.sampled_from(("bias", "gamma", "beta"))))),
        draw(slopes),
    )


MANY = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(case=cases())
@MANY
def test_any_chain(implementation, case):
    check_oracle(case, torch.float64)


@every_norm
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", [MAX_POOL, BILINEAR], ids=lambda mode: MODE_NAMES[mode])
def test_half(implementation, norm, dtype, mode):
    read = Source(13, mode=mode, placement=(1, -1))
    skip = Source(8, *read.size, rows="each")
    # Without ReLU: rounding flips its masks, and no gradient could be compared.
    check_oracle(conv(norm, skip, read, parameters=ALL, slope=1.0), dtype)


@every_norm
def test_autocast(backend, norm):
    check_autocast(conv(norm, Source(8, rows="plain"), parameters=ALL, slope=1.0))


@every_norm
@pytest.mark.parametrize("rows", ["plain", "one", "each"])
def test_no_samples(backend, norm, rows):
    check_empty(conv(norm, Source(3, rows=rows), n=0, parameters=ALL))


@pytest.mark.parametrize("norm", sampled(NORMS, ["none", "batch", "group"]))
@pytest.mark.parametrize("rows", sampled(["plain", "each"], ["each"]))
def test_gradcheck(backend, norm, rows):
    """The producer at the center it computes.

    Readers take center for a constant: what moves with it is the producer's to account for, as
    part of the gradient that arrives at shift. shift's value (beta) does not move with the mean
    while z does, by -scale * dcenter, so that is added for the numeric derivative to see.
    """
    read = Source(2, 2, 3, BILINEAR, (0, -1), rows, 0.01)
    skip = Source(1, *read.size, slope=0.01)
    case = conv(norm, skip, read, out_channels=4, parameters=ALL)
    case = case._replace(groups=2 if norm == "group" else case.groups)
    center0 = case.layer(**case.tensors(torch.float64)).output.center

    def outputs(**tensors):
        output = case.layer(**tensors).output
        moved = output.scale.detach() * (center0 - output.center)
        return output.y, output.scale, output.shift + moved

    check_gradients(case, outputs)


@every_norm
def test_network(backend, norm):
    """A whole small U-Net: two readers of one map, two convolutions in a row, skip and head."""
    sizes = {"a": (3, 8), "b": (8, 8), "c": (8, 16), "d": (24, 8)}
    layers, tensors = {}, {"x": random(2, 3, 9, 10, dtype=torch.float64)}
    for name, (into, out) in sizes.items():
        layers[name] = conv(norm, Source(into), out_channels=out, parameters=ALL)
        found = parameters_of(layers[name].tensors(torch.float64))
        tensors |= {f"{parameter}_{name}": t for parameter, t in found.items()}
    tensors["weight_head"] = random(2, 8, 1, 1, seed=3, dtype=torch.float64)

    def parameters(name, t):
        return {n.removesuffix(f"_{name}"): v for n, v in t.items() if n.endswith(f"_{name}")}

    def fast(x, weight_head, **t):
        def block(name, *inputs):
            return layers[name].of(*inputs, **parameters(name, t)).output

        skip = block("b", block("a", Activation.of(x)))
        deep = block("c", skip.pool()).upsample(BILINEAR).place(skip.size)
        return head(block("d", skip, deep), weight_head)

    def plain(x, weight_head, **t):
        def block(name, x):
            return layers[name].plain_of(x, **parameters(name, t))

        skip = block("b", block("a", x))
        deep = block("c", F.max_pool2d(skip, 2))
        deep = F.interpolate(deep, scale_factor=2.0, mode="bilinear")
        x = torch.cat([skip, F.pad(deep, (0, 0, 0, 1))], 1)
        return F.conv2d(block("d", x), weight_head)

    assert_within(evaluate(fast, tensors), evaluate(plain, tensors), FP64_BUDGET)


@pytest.mark.parametrize("norm", sampled(NORMS, ["none", "batch", "group"]))
def test_registration(backend, norm):
    read = Source(3, 3, 4, BILINEAR, (0, -1), "each")
    skip = Source(2, *read.size, rows="one" if norm in ("batch", "group") else "plain")
    case = conv(norm, skip, read, out_channels=8, parameters=ALL)
    check_registration("conv_norm_act", case)


@pytest.mark.parametrize(
    "case",
    [
        conv("batch", Source(3, rows="plain")),
        conv("group", Source(3, mode=MAX_POOL), parameters=()),
        conv("none", Source(1, 1, 1, slope=1.0), out_channels=1, n=1),
        conv("instance", Source(1, 2, 1), Source(1, 2, 1), out_channels=1, n=1),
    ],
    ids=["plain", "bare", "single", "narrow"],
)
def test_registration_of_variants(backend, case):
    check_registration("conv_norm_act", case)


@every_norm
def test_repeats(compiled, threads, norm):
    """The convolution's sums are PyTorch's, so the number of threads stays."""
    check_repeats(conv(norm, Source(8, 33, 34), n=3), threads, (1, 1))


@pytest.mark.parametrize("groups", [0, 1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_of_normalization(compiled, threads, groups, dtype):
    y = channels_last(random(3, 16, 70, 71, dtype=dtype, offset=1))
    results = []
    for count in (1, 2, 1):
        threads(count)
        vectors = cpu.normalization(y, None, None, None, groups, 1e-5)
        center, scale, _, var = vectors
        dy = torch.empty_like(y)
        affine = cpu.normalization_bwd(y, scale, center, y, center, scale, var, groups, 1e-5, dy)
        results.append(dict(enumerate((dy, *vectors, *affine))))
    for result in results[1:]:
        assert_identical(result, results[0])


def test_builds_agree(monkeypatch):
    read = Source(13, mode=BILINEAR, placement=(1, -1), rows="each")
    case = conv("group", read, parameters=ALL)
    first, *others = all_builds(lambda: evaluate(case.fast, case.tensors()), monkeypatch)
    for other in others:
        assert_within(other, first, 4e-6)


@every_norm
@pytest.mark.parametrize("rows", ["plain", "one"])
@pytest.mark.parametrize("sources", [1, 2])
def test_results_stay(backend, norm, rows, sources):
    """The raw map too."""
    case = conv(norm, *[Source(3, rows=rows)] * sources)
    check_results_stay(case)
    check_results_stay(RawOutput(case))


@every_norm
def test_poisoned(compiled, poisoned, norm):
    read = Source(13, mode=BILINEAR, placement=(1, 1))
    skip = Source(3, *read.size)
    check_poisoned(conv(norm, skip, read, parameters=ALL), poisoned)
    check_poisoned(conv(norm, Source(3, 9, 9, MAX_POOL)), poisoned)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("rows", ["plain", "one"])
@pytest.mark.parametrize("channels", [1, 13])
def test_input_layout(compiled, layout, sources, rows, channels):
    # Strides of one channel are ambiguous: PyTorch's convolution may choose another algorithm.
    budget = 1e-6 * (channels == 1)
    check_input_layout(conv("batch", *[Source(channels, rows=rows)] * sources), layout, budget)


@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPANSIONS])
@every_norm
def test_gradient_layout(compiled, layout, norm):
    """Of y itself, as an outside reader of the raw map would send it."""
    case = conv(norm, Source(3))
    raw = RawOutput(case)
    check_gradient_layout(raw, layout)


class RawOutput:
    def __init__(self, case):
        self.tensors = lambda: {
            n: t for n, t in case.tensors().items() if n not in ("gamma", "beta")
        }
        self.fast = lambda **t: case.layer(**t).output.y


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "frozen"])
def test_gradients_of_vectors_may_be_expanded(backend, norm):
    """sum() sends one value with zero strides; [1, C] of those looks contiguous."""
    case = conv(norm, Source(3), parameters=ALL)
    results = []
    for ones in (lambda t: t.new_ones(()).expand_as(t), torch.ones_like):
        tensors = {
            n: t.requires_grad_(not n.startswith("running")) for n, t in case.tensors().items()
        }
        output = case.layer(**tensors).output
        outputs = [output.scale, output.shift, output.y]
        inputs = [tensors[n] for n in ("y0", "weight", "gamma", "beta")]
        results.append(torch.autograd.grad(outputs, inputs, [ones(t) for t in outputs]))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 2])
def test_kernels_refuse_strided_vectors(compiled, rows):
    """Read as if they were dense, they would be read out of bounds."""
    y, groups = channels_last(random(2, 8, 3, 3)), 8 * (rows == 2)
    center, scale, _, var = cpu.normalization(y, None, None, None, groups, 1e-5)
    arguments = y, center, scale, var, groups, 1e-5, torch.empty_like(y)
    for vector in (torch.ones(1, 1).expand(rows, 8), random(rows, 16)[:, ::2]):
        with pytest.raises(RuntimeError, match="dscale must be contiguous"):
            cpu.normalization_bwd(y, vector, scale, *arguments)
    with pytest.raises(RuntimeError, match="gamma must be contiguous"):
        cpu.normalization(y, None, random(16)[::2], None, groups, 1e-5)


@every_norm
def test_strided_parameters(backend, norm):
    """Every other element of something wider, and a channels_last weight."""
    case = conv(norm, Source(13, rows="each"), parameters=ALL)
    tensors = case.tensors()
    strided = {
        n: t.repeat_interleave(2, -1)[..., ::2] if t.dim() < 3 else t for n, t in tensors.items()
    }
    strided["weight"] = channels_last(tensors["weight"])
    got, want = evaluate(case.fast, strided), evaluate(case.fast, tensors)
    assert got["dweight"].is_contiguous(memory_format=torch.channels_last)
    assert_within(got, want, 1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_statistics_for_running_averages(backend, bias):
    case = conv("batch", parameters=("bias",) if bias else ())
    tensors = case.tensors(torch.float64)
    result = case.layer(**tensors)
    y = F.conv2d(case.sources[0].plain(tensors, "0"), tensors["weight"], padding=1)
    y = y + tensors["bias"][:, None, None] if bias else y
    torch.testing.assert_close(result.mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(result.var, y.var((0, 2, 3), unbiased=False))
    assert case._replace(norm="none").layer(**tensors)[1:] == (None, None)


RATIO = 1e3  # |mean| / std


def grouped(t, groups):
    """[N, C, ...] -> [rows, groups, values that share statistics]; groups = 0: over the batch."""
    if groups == 0:
        return t.transpose(0, 1).reshape(1, t.size(1), -1)
    return t.reshape(t.size(0), groups, -1)


@pytest.mark.parametrize("groups", [0, 1, 4, 16])
@pytest.mark.parametrize("size", [(5, 7), (70, 71)], ids=str)
def test_large_mean_statistics(backend, groups, size):
    """The mean to its last digit, and a variance without cancellation.

    That leaves an error of eps * RATIO in the variance; E[x^2] - E[x]^2 has eps * RATIO^2.
    """
    y = channels_last(random(2, 16, *size, offset=RATIO))
    center, scale, _, var = backends.module(backend).normalization(
        y, None, None, None, groups, 1e-5
    )
    values = grouped(y.double(), groups)
    repeats = center.size(1) // values.size(1)
    mean, variance = (
        t.repeat_interleave(repeats, 1) for t in (values.mean(2), values.var(2, unbiased=False))
    )
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(center.double(), mean, rtol=2 * eps, atol=0)
    torch.testing.assert_close(var.double(), variance, rtol=eps * RATIO, atol=0)
    torch.testing.assert_close(scale, torch.rsqrt(var + 1e-5), rtol=2 * eps, atol=0)


@pytest.mark.parametrize("groups", [0, 1, 4, 16])
def test_large_mean_in_centred_form(build, groups):
    """normalization_bwd subtracts the center first: B * y + C would lose eps * RATIO."""
    y = channels_last(random(2, 16, 9, 7, offset=RATIO))
    center, scale, _, var = cpu.normalization(y, None, None, None, groups, 1e-5)
    dscale, dshift = random(*scale.shape, seed=1), random(*scale.shape, seed=2)
    got = torch.empty_like(y)
    cpu.normalization_bwd(None, dscale, dshift, y, center, scale, var, groups, 1e-5, got)
    center, scale, var, dscale, dshift = (
        t.double()[:, :, None, None] for t in (center, scale, var, dscale, dshift)
    )
    width = 16 // groups if groups else 1
    count = y.numel() / (scale.numel() / width)

    def shared(t):
        return t.view(-1, 16 // width, width).sum(2).repeat_interleave(width, 1)[:, :, None, None]

    slope = -shared(scale * dscale) / (var + 1e-5) / count
    want = slope * (y - center) - shared(scale * dshift) / count
    error = (got - want).norm() / want.norm()
    assert error <= FP32_BUDGET


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_large_mean_gradients(backend, norm):
    """dweight and dx are as accurate as plain PyTorch's.

    The input's pixels and the output's both have a large mean: the centre tap is nearly all of
    the weight, for zero padding would make the border stand out.
    """
    case = conv(norm, Source(8, 24, 24, rows="plain"), slope=0.01)
    tensors = case.tensors()
    tensors["y0"] += RATIO
    taps = torch.zeros(3, 3)
    taps[1, 1] = 1
    tensors["weight"] = tensors["weight"].abs() * taps
    got, plain = (evaluate(f, tensors) for f in (case.fast, case.plain))
    assert_no_worse(got, plain, oracle(case, tensors), torch.finfo(torch.float32).eps)


@every_norm
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_values(implementation, norm, special):
    """They spread as far as in plain PyTorch: the taps, and the statistics' rows. In Winograd's
    algorithm also to the rest of a tile of 4x4 outputs that has one of them."""
    case = conv(norm, Source(9, 24, 24, MAX_POOL, (1, 0), rows="plain"), parameters=ALL)
    tensors = case.tensors()
    tensors["y0"][0, :, 4:6, 4:6] = special
    got, want = case.fast(**tensors), case.plain(**tensors)
    finite = want.isfinite()
    assert not finite.all()
    assert not got[~finite].isfinite().any()
    if implementation == "cpu" and norm in ("none", "frozen"):
        h, w = want.shape[2:]
        tiles = F.max_pool2d((~finite).float(), 4, ceil_mode=True)
        finite = F.interpolate(tiles, scale_factor=4)[:, :, :h, :w] == 0
        assert finite.any()
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-4, atol=1e-5)


def test_padding_is_zero_after_activation(backend):
    """Both the placement's padding and the convolution's."""
    source = Source(3, 2, 2, placement=(2, 2), slope=1.0)
    tensors = {n: t + 5 if n == "shift0" else t for n, t in source.tensors(1, number="0").items()}
    z = source.plain(tensors, "0")
    weight = torch.ones(1, 3, 3, 3)
    y = conv_norm_act(source.activation(tensors, "0"), weight).output.y
    assert_within({"y": y}, {"y": F.conv2d(z, weight, padding=1)}, FP32_BUDGET)


@every_norm
def test_saved_for_backward(backend, norm):
    """Each raw map once, shared by its maker and its readers; besides, vectors and weights only.

    The maker itself keeps its output only where statistics depend on it: nobody reads the last one.
    """
    first, second = conv(norm, Source(3, 16, 16)), conv(norm, Source(24, 16, 16))
    tensors = {n: t.requires_grad_("running" not in n) for n, t in first.tensors().items()}
    more = {n: t.requires_grad_() for n, t in second.tensors().items() if "weight" in n}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        one = first.layer(**tensors).output
        rest = parameters_of(second.tensors()) | more
        two = second.of(one.pool(), **rest).output
    maps = {pointer for pointer, t in saved.items() if t.dim() == 4 and t.size(2) > 3}
    expected = [tensors["y0"], one.y] + [two.y] * (norm not in ("none", "frozen"))
    assert maps == {t.untyped_storage().data_ptr() for t in expected}
    weights = sum(t.numel() for t in (tensors["weight"], more["weight"]))
    others = sum(t.numel() for pointer, t in saved.items() if pointer not in maps)
    rows = 2 if NORMS[norm][0] == "group" else 1
    assert others <= weights + rows * 24 * 12


@pytest.mark.parametrize("norm", ["frozen", "none"])
def test_fixed_vectors_need_no_sums(backend, norm):
    """Where nothing trains through scale and shift, readers see that."""
    case = conv(norm, parameters=())
    tensors = case.tensors()
    output = case.layer(**tensors | {"weight": tensors["weight"].requires_grad_()}).output
    assert output.y.requires_grad
    assert not output.scale.requires_grad
    assert not output.shift.requires_grad


@every_norm
def test_only_what_is_wanted(backend, norm):
    """Any one gradient alone equals the one computed together with all others."""
    case = conv(norm, Source(3), Source(5), parameters=ALL)
    tensors = case.tensors()
    want = evaluate(case.fast, tensors)
    for name in [n for n in tensors if f"d{n}" in want]:
        rest = {n: t for n, t in tensors.items() if n != name}
        got = evaluate(lambda **t: case.fast(**t, **rest), {name: tensors[name]})  # noqa: B023
        assert torch.equal(got[f"d{name}"], want[f"d{name}"]), name


X = Activation.of(random(1, 8, 4, 4))
WEIGHT = random(4, 8, 3, 3)
DOUBLE = random(4, 16, 3, 3)  # of two sources


ERRORS = {
    "channels": (ValueError, r"weight must be \[Cout, 8, 3, 3\], got \[4, 7, 3, 3\]",
                 lambda: conv_norm_act(X, WEIGHT[:, :7])),
    "concat": (ValueError, r"weight must be \[Cout, 16, 3, 3\], got \[4, 8, 3, 3\]",
               lambda: conv_norm_act(Concat(X, X), WEIGHT)),
    "taps": (ValueError, r"weight must be \[Cout, 8, 3, 3\], got \[4, 8, 5, 5\]",
             lambda: conv_norm_act(X, random(4, 8, 5, 5))),
    "no inputs": (ValueError, r"must have channels, got weight \[4, 0, 3, 3\]",
                  lambda: conv_norm_act(Activation.of(X.y[:, :0]), WEIGHT[:, :0])),
    "dtype": (TypeError, r"dtype torch\.float64, got torch\.float32",
              lambda: conv_norm_act(X, WEIGHT.double())),
    "second dtype": (TypeError, r"dtype torch\.float32, got torch\.float64",
                     lambda: conv_norm_act(Concat(X, Activation.of(X.y.double())), DOUBLE)),
    "device": (TypeError, "device meta, got cpu", lambda: conv_norm_act(X, WEIGHT.to("meta"))),
    "vector's device": (TypeError, "beta must be on the weight's device cpu, got meta",
                        lambda: conv_norm_act(X, WEIGHT, norm="batch", beta=random(4).to("meta"))),
    "sizes": (ValueError, r"same samples, height and width, got \[1, 4, 4\] and \[1, 2, 2\]",
              lambda: conv_norm_act(Concat(X, X.pool()), DOUBLE)),
    "samples": (ValueError, r"same samples, height and width, got \[2, 4, 4\] and \[1, 4, 4\]",
                lambda: conv_norm_act(Concat(Activation.of(random(2, 8, 4, 4)), X), DOUBLE)),
    "norm": (ValueError, "norm must be one of none, frozen, batch, group, got 'instance'",
             lambda: conv_norm_act(X, WEIGHT, norm="instance")),
    "frozen": (ValueError, "must have running_mean and running_var",
               lambda: conv_norm_act(X, WEIGHT, norm="frozen")),
    "groups": (ValueError, "groups must divide the channels, got 3 groups of 4 channels",
               lambda: conv_norm_act(X, WEIGHT, norm="group", groups=3)),
    "bias": (ValueError, r"bias must be \[4\], got \[3\]",
             lambda: conv_norm_act(X, WEIGHT, random(3))),
    "gamma": (ValueError, r"gamma must be \[4\], got \[1\]",
              lambda: conv_norm_act(X, WEIGHT, norm="batch", gamma=random(1))),
}  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), ERRORS.values(), ids=ERRORS)
def test_errors(backend, error, message, call):
    with pytest.raises(error, match=message):
        call()


def twice(operator):
    """A public operator as a function of y and of a parameter."""
    weights = {
        "conv_norm_act": (WEIGHT, lambda x, w: conv_norm_act(x, w, norm="batch").output.y),
        "conv_transpose": (random(8, 2, 2, 2), lambda x, w: conv_transpose(x, w).y),
        "head": (random(2, 8, 1, 1), head),
        "resample": (torch.ones(1), lambda x, w: materialize(x.pool()) * w),
    }
    weight, function = weights[operator]
    return lambda y, w=weight: function(Activation.of(y), w), weight


every_operator = pytest.mark.parametrize(
    "operator", ["conv_norm_act", "conv_transpose", "head", "resample"]
)


@every_operator
@pytest.mark.parametrize("loss", [torch.Tensor.sum, lambda out: out.square().sum()])
def test_double_backward_raises(backend, operator, loss):
    """Also where the incoming gradient is a constant."""
    function, _ = twice(operator)
    y = X.y.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(function(y)), y, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


@every_operator
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap", "jacrev", "jacfwd"])
def test_transforms_raise(backend, operator, transform):
    function, _ = twice(operator)
    y = X.y
    calls = {
        "grad": lambda f: torch.func.grad(lambda y: f(y).sum())(y),
        "vjp": lambda f: torch.func.vjp(f, y)[1](f(y)),
        "jvp": lambda f: torch.func.jvp(f, (y,), (y,)),
        "vmap": lambda f: torch.func.vmap(f)(y[None]),
        "jacrev": lambda f: torch.func.jacrev(f)(y),
        "jacfwd": lambda f: torch.func.jacfwd(f)(y),
    }
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        calls[transform](function)


@every_operator
@pytest.mark.parametrize("duals", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_raises(backend, operator, duals, requires_grad):
    function, weight = twice(operator)
    inputs = [t.clone().requires_grad_(requires_grad) for t in (X.y, weight)]
    if operator == "resample":  # it has no weight
        duals = (True, duals[1])
    with forward_ad.dual_level():
        inputs = [
            forward_ad.make_dual(t, torch.ones_like(t)) if dual else t
            for t, dual in zip(inputs, duals, strict=True)
        ]
        with pytest.raises(NotImplementedError, match="forward-mode"):
            function(*inputs)


@pytest.mark.parametrize("parameter", ["bias", "gamma", "beta", "scale", "shift"])
def test_forward_mode_of_vectors_raises(backend, parameter):
    """Otherwise the tangent would be lost without a word."""
    case = conv("batch", Source(8), parameters=ALL)
    tensors = case.tensors()
    name = parameter if parameter in tensors else f"{parameter}0"
    with forward_ad.dual_level():
        tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            case.layer(**tensors)
