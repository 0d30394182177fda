"""The Triton kernels against the oracle: interpreted, or on a GPU where there is one.

The interpreter takes milliseconds per tile and step, so these are samples of the operators'
matrices, and cases for what is the kernels' own: partial tiles, several blocks, merged statistics.
bfloat16 and TF32 products are a GPU's to show: there, run with -m "gpu and not slow".
"""

import pytest
import test_conv_norm_act
import test_conv_transpose
import test_head
import test_resample
import torch
from checks import (
    assert_no_worse,
    assert_within,
    check_dtype,
    check_empty,
    check_fakes,
    check_gradient_layout,
    check_input_layout,
    check_poisoned,
    check_repeats,
    check_results_stay,
    evaluate,
    oracle,
)
from oracle import MODE_NAMES, MODES, ConvTranspose, Head, Resample, Source, random
from sampling import sampled
from test_conv_norm_act import ALL, NORMS, RATIO, channels_last, conv, grouped

from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    MAX_POOL,
    NEAREST,
    Activation,
)
from fastunet.ops import materialize

pytest.importorskip("triton", reason="triton is not installed")

from fastunet import triton as kernels
from fastunet.triton.statistics import Parts, finish

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.usefixtures("way"), *[pytest.mark.gpu] * ON_GPU]
interpreted = pytest.mark.skipif(ON_GPU, reason="its tensors are on the CPU")
HALVES = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,)
# Most tests one way: the other differs in what is read.
one_way = pytest.mark.parametrize("way", ["on load"], indirect=True)

every_norm = pytest.mark.parametrize("norm", NORMS)
every_mode = pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)


class Placed:
    """A case with its tensors where the kernels run."""

    def __init__(self, case):
        self.case, self.fast, self.plain = case, case.fast, case.plain

    def tensors(self, *args):
        return {name: t.to(DEVICE) for name, t in self.case.tensors(*args).items()}


MATRICES = {
    "conv_norm_act": (test_conv_norm_act.CASES, 331),
    "conv_transpose": (test_conv_transpose.CASES, 127),
    "resample": (test_resample.CASES, 61),
    "head": (test_head.CASES, 307),
}
SAMPLE = [
    (operator, name)
    for operator, (cases, step) in MATRICES.items()
    for name in list(cases)[::step]  # shares no factor with the axes
]


@one_way
@pytest.mark.parametrize(("operator", "name"), SAMPLE)
def test_oracle(operator, name):
    check_dtype(Placed(MATRICES[operator][0][name]), torch.float32)


@one_way
@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("operator", MATRICES)
def test_oracle_whole_matrix(operator):
    failures = {}
    for name, case in MATRICES[operator][0].items():
        try:
            check_dtype(Placed(case), torch.float32)
        except Exception as error:
            failures[name] = error
    assert not failures, failures


# Tiles are 16 or 32 pixels wide, blocks 32 or 64 input and up to 128 output channels.
SHAPES = {
    "several tiles each way": conv("batch", Source(3, 21, 37), out_channels=9, n=1),
    "one pixel": conv("none", Source(5, 1, 1), out_channels=2, n=3),
    "one row": conv("batch", Source(4, 1, 70, rows="each"), n=1),
    "one column": conv("group", Source(4, 40, 1), n=1),
    "several blocks of inputs": conv("batch", Source(70, 5, 6, slope=1.0), out_channels=8),
    "several blocks of outputs": conv("batch", Source(3, 5, 6), out_channels=150, n=1),
    "pair of several blocks": conv(
        "instance",
        Source(40, 6, 5, slope=1.0),
        Source(67, 3, 3, NEAREST, (0, -1), "each", 1.0),
        out_channels=20,
    ),
    "one channel each": conv("batch", Source(1), Source(1, rows="plain"), out_channels=1),
    "multiples of 8": conv("batch", Source(24), Source(16), out_channels=24),
    "cropped on load": conv("none", Source(3, 9, 11, placement=(-3, -4)), out_channels=4),
    "padded on load": conv("none", Source(3, 4, 5, placement=(3, 2)), out_channels=4),
    # read by descriptors: plain, at least 48 pixels wide, more than 32 outputs
    "described": conv("batch", Source(8, 3, 70, rows="plain"), out_channels=40, n=2),
    "described, two tiles": conv("none", Source(24, 2, 140, rows="plain"), out_channels=70, n=1),
    "described pair": conv(
        "batch",
        Source(40, 4, 50, slope=1.0),
        Source(8, 2, 47, rows="plain", placement=(2, 3)),
        out_channels=36,
        n=1,
    ),
    "described, cropped": conv("none", Source(8, 5, 55, placement=(-2, -3)), out_channels=36, n=1),
    "described, transposed": ConvTranspose(Source(40, 2, 49, slope=1.0), 34, n=1),
    "transposed, blocks": ConvTranspose(Source(70, 5, 18, slope=1.0), 40),
    "transposed, placed": ConvTranspose(Source(6, 5, 7, placement=(1, -2)), 5),
    "transposed, wide": ConvTranspose(Source(3, 3, 35), 130, n=1),
    "head, blocks": Head(Source(70, 5, 18, slope=1.0), 21),
}


# Interpreted, these take longest, and others are like them.
LONG = (
    "multiples of 8",
    "one channel each",
    "one column",
    "pair of several blocks",
    "described",
    "described, two tiles",
    "described, cropped",
    "transposed, wide",
)


@one_way
@pytest.mark.parametrize("name", sampled(SHAPES, set(SHAPES) - set(LONG)))
def test_shapes(name):
    check_dtype(Placed(SHAPES[name]), torch.float32)


@pytest.mark.parametrize("way", ["materialised"], indirect=True)
@pytest.mark.parametrize("name", sampled(SHAPES, list(SHAPES)[1::4]))
def test_shapes_of_materialised_maps(name):
    test_shapes(name)


HALF = {
    **{norm: conv(norm, Source(8, slope=1.0), parameters=ALL, slope=1.0) for norm in NORMS},
    "pair": conv("batch", Source(8), Source(13, mode=MAX_POOL, height=19, width=22), slope=1.0),
    "transposed": ConvTranspose(Source(5, mode=BILINEAR, slope=0.01)),
    "head": Head(Source(13, slope=0.01), 3),
    "pool": Resample(Source(13, mode=MAX_POOL, placement=(1, -1))),
    "bilinear": Resample(Source(13, mode=BILINEAR_ALIGN_CORNERS, placement=(1, -1))),
}


@one_way
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", sampled(HALF, {*HALF} - {*NORMS} | {"batch"}))
def test_half(name, dtype):
    check_dtype(Placed(HALF[name]), dtype)


@pytest.mark.skipif(not ON_GPU, reason="interpreted products are exact")
@pytest.mark.parametrize("name", HALF)
def test_tf32(name):
    """At most twice plain PyTorch's error, as it rounds there too."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    case = Placed(HALF[name])
    tensors = case.tensors(torch.float32)
    got, plain = (evaluate(f, tensors) for f in (case.fast, case.plain))
    assert_no_worse(got, plain, oracle(case, tensors), 2**-10)


@pytest.mark.skipif(not ON_GPU, reason="interpreted kernels have no warps")
@pytest.mark.parametrize("name", ["described", "described pair", "several blocks of outputs"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_wide_half(name, dtype):
    check_dtype(Placed(SHAPES[name]._replace(slope=1.0)), dtype)


@one_way
@pytest.mark.parametrize(
    "case",
    [
        conv("batch", Source(3), Source(5, rows="plain"), n=0, parameters=ALL),
        conv("group", Source(3, rows="each"), n=0, parameters=ALL),
        conv("none", Source(3, mode=BILINEAR), n=0),
        ConvTranspose(Source(3), n=0),
        Head(Source(3), n=0),
        Resample(Source(3, mode=MAX_POOL, rows="each"), n=0),
    ],
    ids=["batch", "group", "none", "transposed", "head", "resample"],
)
def test_no_samples(case):
    check_empty(Placed(case))


READ = Source(5, 2, 3, BILINEAR, (1, -1), "each")
SMALL = {
    "conv_norm_act": conv("batch", Source(3, *READ.size), READ, out_channels=4, parameters=ALL),
    "conv_transpose": ConvTranspose(Source(3, 4, 5)),
    "head": Head(Source(3, 4, 5)),
    "resample": Resample(Source(3, 4, 5, MAX_POOL, (1, -1))),
}


@one_way
@pytest.mark.parametrize("operator", SMALL)
def test_fakes(operator):
    check_fakes(operator, Placed(SMALL[operator]))


@one_way
@pytest.mark.parametrize("operator", SMALL)
def test_results(operator, threads, poisoned):
    """The same bits again, in memory of their own, from nothing but what was written."""
    case = Placed(SMALL[operator])
    check_repeats(case, threads, (1, 1))
    check_results_stay(case)
    check_poisoned(case, poisoned)


@one_way
def test_strided_parameters():
    """Every other element of something wider."""
    for case in map(Placed, (SMALL["conv_norm_act"], SMALL["conv_transpose"])):
        tensors = case.tensors()
        strided = {
            n: t.repeat_interleave(2, -1)[..., ::2] if t.dim() < 3 else t
            for n, t in tensors.items()
        }
        assert_within(evaluate(case.fast, strided), evaluate(case.fast, tensors), 0)


@one_way
def test_channels_last_weights():
    for case in map(Placed, SMALL.values()):
        tensors = case.tensors()
        other = {n: channels_last(t) if n == "weight" else t for n, t in tensors.items()}
        assert_within(evaluate(case.fast, other), evaluate(case.fast, tensors), 0)


@one_way
@pytest.mark.parametrize(
    "layout", sampled(["contiguous", "channel_slice", "cropped"], ["channel_slice"])
)
def test_layouts(layout):
    check_input_layout(Placed(conv("batch", Source(3), Source(5, rows="plain"))), layout)
    check_gradient_layout(Placed(Resample(Source(5, mode=BILINEAR, placement=(1, -1)))), layout)
    check_gradient_layout(Placed(Head(Source(5), 3)), layout, 1e-6)


@interpreted
@one_way
@every_mode
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_values(mode, special):
    """They come out where plain PyTorch has them."""
    source = Source(5, 5, 6, mode, (1, 1))
    t = source.tensors(2)
    t["scale"] = t["scale"].abs() + 0.1
    t["y"][0, :, 1:3, 2:4] = special
    torch.testing.assert_close(
        materialize(source.activation(t)), source.plain(t), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    case = conv("none", source._replace(slope=0.01), out_channels=3)
    t = case.tensors() | {"y0": t["y"], "scale0": t["scale"]}
    got, want = case.fast(**t), case.plain(**t)
    assert torch.equal(got.isfinite(), want.isfinite())
    finite = want.isfinite()
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-5, atol=1e-5)


@interpreted
@one_way
@pytest.mark.parametrize("position", range(4))
def test_pool_of_nan(position):
    test_resample.test_pool_of_nan(None, position)


@one_way
def test_pool_of_equals():
    """The first one wins, as in PyTorch."""
    y = torch.zeros(1, 5, 4, 4, device=DEVICE, requires_grad=True)
    materialize(Activation.of(y).pool()).sum().backward()
    want = torch.zeros(4, 4, device=DEVICE)
    want[::2, ::2] = 1
    assert torch.equal(y.grad[0], want.expand(5, 4, 4))


@one_way
@pytest.mark.parametrize("groups", [0, 1, 4, 16])
@pytest.mark.parametrize("size", [(5, 7), (70, 71)], ids=str)
def test_large_mean_statistics(groups, size):
    """As accurate as what test_conv_norm_act asks of the other backends, also by merging twice."""
    y = channels_last(random(2, 16, *size, offset=RATIO)).to(DEVICE)
    center, scale, _, var = kernels.normalization(y, None, None, None, groups, 1e-5)
    values = grouped(y.double(), groups)
    repeats = 16 // values.size(1)
    mean, variance = (
        t.repeat_interleave(repeats, 1) for t in (values.mean(2), values.var(2, unbiased=False))
    )
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(center.double(), mean, rtol=2 * eps, atol=0)
    torch.testing.assert_close(var.double(), variance, rtol=eps * RATIO, atol=0)
    torch.testing.assert_close(scale, torch.rsqrt(var + 1e-5), rtol=2 * eps, atol=0)


@one_way
@pytest.mark.parametrize("tiles", [33, 257, 700])
def test_merging_of_statistics(tiles):
    """Parts of any number of pixels, none included, in any number of steps."""
    count = (torch.arange(tiles) * 7 % 5).float()
    values = [[random(int(n), 5, seed=i, offset=3) for i, n in enumerate(count)] for _ in range(2)]
    values = [torch.cat(rows) for rows in values]
    parts = Parts(
        count.repeat(2).to(DEVICE),
        *(
            torch.stack([f(rows) for row in values for rows in row.split(count.int().tolist())]).to(
                DEVICE
            )
            for f in (lambda v: v.mean(0).nan_to_num(), lambda v: (v - v.mean(0)).square().sum(0))
        ),
    )
    center, _, _, var = finish(parts, 2, 5, None, None, None, 0.0)
    want = torch.stack([v.double().mean(0) for v in values])
    variance = torch.stack([v.double().var(0, unbiased=False) for v in values])
    torch.testing.assert_close(center.double().cpu(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double().cpu(), variance, rtol=1e-5, atol=0)


@interpreted
@one_way
@pytest.mark.parametrize("norm", sampled(["batch", "group", "instance"], ["batch"]))
def test_large_mean_gradients(norm):
    test_conv_norm_act.test_large_mean_gradients(None, norm)


@one_way
def test_only_what_is_wanted():
    """Any one gradient alone equals the one computed together with all others."""
    case = Placed(conv("batch", Source(3), Source(5), out_channels=8, parameters=ALL))
    tensors = case.tensors()
    want = evaluate(case.fast, tensors)
    for name in ("y0", "scale1", "weight", "gamma"):
        rest = {n: t for n, t in tensors.items() if n != name}
        got = evaluate(lambda **t: case.fast(**t, **rest), {name: tensors[name]})  # noqa: B023
        assert torch.equal(got[f"d{name}"], want[f"d{name}"]), name
