"""FastUNet against the plain U-Net: logits, every gradient, running statistics.

In float64 both are the same function, to 1e-9. In lower precision a rounding difference flips ReLU
masks and pool winners, so there FastUNet may be at most twice as far from float64 as plain PyTorch.
"""

import itertools
import math
import random as python_random
from statistics import mean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    LAYOUTS,
    MODES,
    assert_bitwise,
    assert_same_layout,
    assert_same_step,
    distances,
    double_pair,
    kind,
    laid_out,
    pair,
    random,
    step,
    to_mode,
)

import fastunet
from fastunet.reference.unet import ACTIVATIONS, CONCAT_ORDERS, NORMS

VARIANTS = [
    dict(zip(("bilinear", "norm", "activation", "conv_bias", "concat_order"), values, strict=True))
    for values in itertools.product((False, True), NORMS, ACTIVATIONS, (False, True), CONCAT_ORDERS)
]
SIZES = ((12, 16), (13, 11))
LARGER = ((32, 40), (37, 29))  # one pool winner counts for less


def matrix(every: int, sizes=SIZES, layouts=LAYOUTS):
    """All variants, modes, sizes and layouts. Of every ``every``-th variant one case is drawn to
    run by default, the others are slow."""
    draw = python_random.Random(every)
    cases = []
    for index, options in enumerate(VARIANTS):
        modes = MODES if options["norm"] == "batch" else ("train", "eval")
        rest = list(itertools.product(modes, sizes, layouts))
        drawn = draw.choice(rest) if index % every == 0 else None
        for mode, size, layout in rest:
            up = "bilinear" if options["bilinear"] else "transposed"
            words = [up, *list(options.values())[1:3], "bias" if options["conv_bias"] else "plain"]
            words += [options["concat_order"], mode, "x".join(map(str, size)), layout]
            name = "-".join(words)
            slow = () if (mode, size, layout) == drawn else pytest.mark.slow
            cases.append(pytest.param(options, mode, size, layout, id=name, marks=slow))
    return pytest.mark.parametrize(("options", "mode", "size", "layout"), cases)


@matrix(every=1)
def test_float64(options, mode, size, layout):
    x = random(2, 3, *size, dtype=torch.float64)
    plain, fast = double_pair(**options, mode=mode)
    expected = step(*laid_out(plain, x, layout))
    for backend in ("reference", "cpu"):
        with fastunet.backend(backend):
            assert_same_step(step(*laid_out(fast, x, layout)), expected)


def assert_as_accurate(options, mode, size, layout, autocast=None, seeds=2, winner=1e-6, times=2):
    """At most ``times`` plain PyTorch's distance from float64, over some seeds: logits, gradients
    and buffers, each as a whole and each tensor by itself. For a tensor, the distance that is usual
    for its kind counts where plain PyTorch is by luck closer.

    ``winner`` is what one pool winner that differs may move in all gradients; in the few numbers
    of one tensor, ten times that.
    """
    mine, plains = [], []
    for seed in range(seeds):
        plain, fast = (to_mode(model, mode) for model in pair(seed=seed, **options))
        x = random(2, 3, *size, seed=100 + seed)
        exact_plain, exact_x = laid_out(plain, x, layout)
        exact = step(exact_plain.double(), exact_x.double())
        actual, expected = (step(*laid_out(m, x, layout), autocast) for m in (fast, plain))
        assert_same_layout(actual, expected)
        mine.append(distances(actual, exact))
        plains.append(distances(expected, exact))

    def over_seeds(found, names):
        """Root mean square; a tensor can but be lost, as the sum of a bias that happens to be 0."""
        return math.sqrt(mean(min(1.0, each[name]) ** 2 for each in found for name in names))

    far = {}
    for k in ("logits", "gradients", "buffers"):
        names = [name for name in exact if kind(name) == k]
        usual = over_seeds(plains, names) if names else 0.0
        for some in filter(None, (names, *([name] for name in names))):
            budget = times * max(usual, over_seeds(plains, some))
            budget += winner * (1 if some is names else 10) if k == "gradients" else 1e-6
            distance = over_seeds(mine, some)
            if not distance <= budget:
                far[k if some is names else some[0]] = f"{distance:.2e} > {budget:.2e}"
    assert not far, f"further from float64 than {times} times plain PyTorch: {far}"


@matrix(every=2)
def test_float32(options, mode, size, layout):
    # Winograd's convolution rounds up to five times as much as a direct one.
    assert_as_accurate(options, mode, size, layout, times=6)


@matrix(every=5)
def test_float32_ieee(options, mode, size, layout):
    """With the direct convolution, for users who ask PyTorch for it."""
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    try:
        assert_as_accurate(options, mode, size, layout)
    finally:
        torch.backends.mkldnn.conv.fp32_precision = "none"


@matrix(every=4, sizes=LARGER, layouts=("contiguous", "both"))
def test_bfloat16_autocast(options, mode, size, layout):
    assert_as_accurate(options, mode, size, layout, torch.bfloat16, seeds=4, winner=0.03)


configurations = st.fixed_dictionaries(
    {
        "n_channels": st.integers(1, 4),
        "n_classes": st.integers(1, 10),
        "bilinear": st.booleans(),
        "base_channels": st.integers(2, 7),
        "depth": st.integers(1, 3),
        "norm": st.sampled_from(NORMS),
        "activation": st.sampled_from(ACTIVATIONS),
        "negative_slope": st.sampled_from([0.01, 0.3, 1.0, 1.5]),
        "conv_bias": st.booleans(),
        "concat_order": st.sampled_from(CONCAT_ORDERS),
        "checkpointing": st.sampled_from(["none", "none", "full"]),
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    configurations,
    st.sampled_from(MODES),
    st.integers(1, 3),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(LAYOUTS),
)
def test_random_configurations(options, mode, batch, more_height, more_width, layout):
    least = 2 ** options["depth"]
    size = least + more_height, least + more_width
    x = random(batch, options["n_channels"], *size, dtype=torch.float64)
    plain, fast = double_pair(**options, mode=mode)
    error = value_error(*laid_out(plain, x, layout))
    assert value_error(*laid_out(fast, x, layout)) == error
    if error is not None:
        return
    actual = step(*laid_out(fast, x, layout))
    # PyTorch 2.13's InstanceNorm has a wrong backward for one channels_last image: the reference
    # for values is contiguous. A map of one pixel, and what follows from it, is of either layout.
    assert_same_step(actual, step(plain, x), layouts=False)
    if max(size) >= 2 * least:
        assert_same_layout(actual, step(*laid_out(plain, x, layout)))


def value_error(model, x):
    """What the forward pass raises where a norm gets one value per channel."""
    try:
        model(x)
    except ValueError as error:
        return str(error)


@pytest.fixture
def poisoned():
    """New tensors are full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("bilinear", [False, True], ids=["transposed", "bilinear"])
@pytest.mark.parametrize("norm", NORMS)
def test_nothing_uninitialized_is_read(norm, bilinear, mode, autocast, backend, request):
    model = to_mode(pair(norm=norm, bilinear=bilinear, conv_bias=True, depth=3)[1], mode)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    x = random(2, 3, 21, 26)

    def run():
        model.load_state_dict(state)
        with fastunet.backend(backend):
            return step(model, x, autocast)

    expected = run()
    assert all(t.isfinite().all() for t in expected.values())
    request.getfixturevalue("poisoned")
    assert_bitwise(run(), expected)


@pytest.mark.parametrize("size", [(48, 64), (51, 67)], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm", NORMS)
def test_bitwise_over_repeats(norm, autocast, size):
    """With as many threads as there are: sums must not depend on who comes first."""
    model = pair(norm=norm, bilinear=True, base_channels=8)[1]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    x = random(2, 3, *size)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first = step(model, x, autocast)
        for _ in range(3):
            model.load_state_dict(state)
            assert_bitwise(step(model, x, autocast), first)
    finally:
        torch.set_num_threads(threads)
