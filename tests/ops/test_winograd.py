"""The compiled convolutions at sizes where each of their ways to work is taken.

Their small cases are in test_conv_norm_act.py and test_conv_transpose.py.
"""

import importlib

import pytest
import torch
from checks import FP32_BUDGET, assert_identical, check_dtype, evaluate, oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Conv, ConvTranspose, Source
from test_conv_norm_act import ALL, MANY, cases, channels_last, conv
from torch import nn
from torch.profiler import profile

from fastunet import ops
from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    MAX_POOL,
    NEAREST,
    NONE,
    Activation,
)
from fastunet.extension import kernels
from fastunet.prepared import keeping

# Without activation behind them: among so many values rounding would flip a mask somewhere.
LARGE = {
    # large maps of few channels: a thread takes groups of tiles through all stages
    "groups": conv("batch", Source(5, 131, 150), out_channels=7, parameters=ALL, slope=1.0),
    "groups of a pair": conv(
        "group",
        Source(24, 126, 120, slope=1.0),
        Source(9, 64, 61, BILINEAR_ALIGN_CORNERS, (-2, -2), "each", 1.0),
        out_channels=24,
        slope=1.0,
    ),
    "groups of pooled": conv("none", Source(16, 180, 261, MAX_POOL, slope=1.0), out_channels=40),
    "groups of many samples": conv(
        "instance", Source(3, 40, 44, rows="each", slope=1.0), n=9, slope=1.0
    ),
    # small maps of many channels: ranges of tiles by parts of the outputs
    "ranges": conv("batch", Source(150, 21, 18, slope=1.0), out_channels=70, slope=1.0),
    "ranges of a pair": conv(
        "frozen",
        Source(40, 34, 38, slope=1.0),
        Source(72, 17, 19, NEAREST, rows="each", slope=1.0),
        out_channels=33,
        parameters=ALL,
    ),
    # more transformed tiles than are held at a time
    "many ranges": conv("none", Source(530, 46, 48, slope=1.0), out_channels=17, n=2),
    # both gradients from what is read once, in tiles of 6 and of 4
    "shared": conv("batch", Source(20, 191, 203, slope=1.0), out_channels=18, slope=1.0, n=1),
    "shared by a pair": conv(
        "batch",
        Source(12, 120, 122, slope=1.0),
        Source(9, 60, 61, BILINEAR, slope=1.0),
        out_channels=32,
        slope=1.0,
        n=1,
    ),
    "shared in small tiles": conv("frozen", Source(8, 46, 48, slope=1.0), slope=1.0, n=10),
    # tiles of 6 by range
    "large ranges": conv("group", Source(150, 100, 101, slope=1.0), out_channels=72, n=1),
    # the weight's gradient by batches of 64 to 66 tiles; 64 by 8 blocks of channels lie otherwise
    "uneven batches": conv("none", Source(128, 40, 256, slope=1.0), out_channels=64, n=1),
    "thin": conv("none", Source(4, 1, 700, slope=1.0), Source(3, 1, 700, rows="plain")),
    "transposed": ConvTranspose(Source(20, 50, 70, slope=1.0), 18),
    "transposed, wide": ConvTranspose(Source(130, 12, 300, BILINEAR, slope=1.0), 33),
    # gradients by batch: the weight's is too large for each thread to have one
    "transposed, many": ConvTranspose(Source(390, 34, 37, rows="each", slope=1.0), 420),
    "transposed, few pixels": ConvTranspose(Source(390, 5, 7, rows="plain"), 420, n=1),
}


@pytest.mark.parametrize("name", LARGE)
def test_oracle(build, name):
    check_dtype(LARGE[name], torch.float32)


@pytest.mark.parametrize("name", ["groups of a pair", "ranges of a pair", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(build, name, dtype):
    check_dtype(LARGE[name], dtype)


@pytest.mark.parametrize("name", LARGE)
def test_bitwise_over_threads(compiled, threads, name):
    case = LARGE[name]
    tensors = case.tensors()
    results = []
    for count in (1, 2, 3, 7, 2):  # 7: inputs and outputs in parts as well
        threads(count)
        results.append(evaluate(case.fast, tensors))
    for other in results[1:]:
        assert_identical(other, results[0])


@pytest.fixture
def adding(compiled, monkeypatch):
    """Kernels that add what comes back to a first source to these: its dy, dscale and dshift."""
    there: list[torch.Tensor] = []

    class Adding:
        def __getattr__(self, name):
            return getattr(kernels(), name)

        def conv_norm_act_bwd(self, *args):
            for to in args[3:6]:
                there.append(to.copy_(torch.randn(to.shape)).clone())
            kernels().conv_norm_act_bwd(*args[:-1], True)

    def use():
        # by its name the function of the same name is found
        module = importlib.import_module("fastunet.cpu.conv_norm_act")
        monkeypatch.setattr(module, "kernels", Adding)
        return there

    return use


@pytest.mark.parametrize("size", [(40, 46), (13, 9)])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_sums_of_a_pooled_source(adding, norm, size):
    """Also in the last row and column, which no window has."""
    rows = "each" if norm == "instance" else "one"
    case = conv(norm, Source(20, *size, MAX_POOL, rows=rows), n=2)
    tensors = case.tensors()
    want = evaluate(case.fast, tensors)
    there = adding()
    got = evaluate(case.fast, tensors)
    for name, value in zip(("dy", "dscale", "dshift"), there, strict=True):
        assert torch.equal(got[f"{name}0"], want[f"{name}0"] + value), name


def test_sums_of_other_sources(adding):
    adding()
    case = conv("batch", Source(20, 8, 8))
    with pytest.raises(RuntimeError, match="only what is pooled"):
        evaluate(case.fast, case.tensors())


def check(case, threads):
    """The error budget, and the same bits for other numbers of threads."""
    check_dtype(case, torch.float32)
    tensors = case.tensors()
    threads(1)
    once = evaluate(case.fast, tensors)
    threads(3)
    assert_identical(evaluate(case.fast, tensors), once)


@given(case=cases())
@MANY
def test_any_chain(build, threads, case):
    """In fp32; rounding must not decide over masks, so without activation."""
    sources = tuple(
        s._replace(slope=1.0, mode=NONE if s.mode == MAX_POOL else s.mode) for s in case.sources
    )
    if len({s.size for s in sources}) > 1:
        sources = sources[:1]
    check(case._replace(sources=sources, slope=1.0), threads)


@st.composite
def large_cases(draw):
    """Maps of either tile size, by groups, by ranges, and with both gradients at once."""
    side, channels = st.integers(40, 150), st.sampled_from((1, 3, 16, 17, 40, 70))
    rows = st.sampled_from(("plain", "one", "each"))
    read = Source(draw(channels), draw(side), draw(side), rows=draw(rows), slope=1.0)
    other = read._replace(channels=draw(channels), rows=draw(rows))
    if draw(st.booleans()):
        half = read._replace(height=-(-read.height // 2), width=-(-read.width // 2))
        mode = draw(st.sampled_from((BILINEAR, BILINEAR_ALIGN_CORNERS, NEAREST)))
        place = (read.height - 2 * half.height, read.width - 2 * half.width)
        other = half._replace(channels=draw(channels), mode=mode, placement=place)
    sources = (read, other) if draw(st.booleans()) else (read,)
    norm = draw(st.sampled_from(("none", "frozen", "batch", "instance")))
    return conv(norm, *sources, out_channels=draw(channels), n=draw(st.integers(1, 2)), slope=1.0)


@given(case=large_cases())
@settings(MANY, max_examples=8)
def test_any_large(build, threads, case):
    check(case, threads)


# inputs, outputs and size: in tiles of 4 by group and by range, of 6 by group and by range
PACKED = [(3, 17, (40, 44)), (64, 48, (128, 122)), (150, 70, (21, 18)), (600, 33, (18, 15))]
PACKED += [(20, 40, (191, 203)), (1100, 17, (96, 101))]


@pytest.mark.parametrize(("inputs", "outputs", "size"), PACKED)
def test_packed_weight(build, inputs, outputs, size):
    """Where somebody keeps the weight in Winograd's domain, bit for bit the same."""
    x = Activation.of(channels_last(torch.randn(2, inputs, *size)))
    weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
    kept = {}
    with torch.no_grad():
        want = ops.conv_norm_act(x, weight).output.y
        for _ in range(2):
            with keeping(kept):
                assert torch.equal(ops.conv_norm_act(x, weight).output.y, want)
            assert len(kept) == 1
        weight.zero_()  # it is no longer read
        with keeping(kept):
            assert torch.equal(ops.conv_norm_act(x, weight).output.y, want)
        wrong = {key: packed[:-1] for key, packed in kept.items()}
        with keeping(wrong), pytest.raises(RuntimeError, match="packed must be what pack_weight"):
            ops.conv_norm_act(x, weight)


def test_packs_parameters_alone(compiled):
    """What else there is for a weight may lie elsewhere, or be another, the next time."""
    x = Activation.of(channels_last(torch.randn(1, 4, 23, 24)))
    weight = nn.Parameter(torch.randn(6, 4, 3, 3))
    with torch.inference_mode():
        unversioned = nn.Parameter(torch.randn(6, 4, 3, 3))
    kept = {}
    with torch.no_grad(), keeping(kept):
        for other in (weight * 2, weight[:3], unversioned):
            ops.conv_norm_act(x, other)
        assert not kept
        ops.conv_norm_act(x, weight)
        assert len(kept) == 1


CONVOLUTIONS = {"aten::convolution", "aten::convolution_backward"}


@pytest.mark.parametrize("case", [Conv((Source(64, 32, 32),)), ConvTranspose(Source(8, 32, 32))])
def test_ieee_precision(compiled, case):
    """Who asks for it gets PyTorch's direct convolution, forward and backward."""
    tensors = case.tensors()

    def run():
        with profile() as called:
            result = evaluate(case.fast, tensors)
        return result, {e.key for e in called.key_averages()} & CONVOLUTIONS

    ours, names = run()
    assert not names
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    try:
        direct, names = run()
    finally:
        torch.backends.mkldnn.conv.fp32_precision = "none"
    assert names == CONVOLUTIONS
    exact = oracle(case, tensors)["out"]
    errors = [(r["out"].double() - exact).norm() / exact.norm() for r in (ours, direct)]
    assert errors[1] <= errors[0] <= FP32_BUDGET
