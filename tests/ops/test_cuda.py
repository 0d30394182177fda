"""What is the CUDA kernels' own: several blocks, long strips, vectors of channels, and two maps in
one pass. Here they run on the CPU, with every access checked (tests/host_cuda); with the other
backends they run the operators' matrices too. On a machine with a GPU: -m "gpu and not slow".
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import test_conv_norm_act
import test_conv_transpose
import test_head
import test_resample
import torch
from checks import check_dtype, check_oracles, check_repeats
from oracle import MODE_NAMES, MODES, Head, Resample, Source, random
from sampling import sampled
from test_conv_norm_act import channels_last, conv

import fastunet
from fastunet import cuda, extension, reference
from fastunet.activation import BILINEAR, MAX_POOL, NEAREST, NONE
from fastunet.reference.resample import accumulate_dtype

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
MISSING = extension.load_cuda("cuda" if ON_GPU else "cuda_host")
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "-"),
    *[pytest.mark.gpu] * ON_GPU,
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_mode = pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def cuda_backend(exact_convolutions):
    with fastunet.backend("cuda"):
        yield


class Placed:
    """A case with its tensors where the kernels run."""

    def __init__(self, case):
        self.case, self.fast, self.plain = case, case.fast, case.plain

    def tensors(self, *args):
        return {name: t.to(DEVICE) for name, t in self.case.tensors(*args).items()}


# A block has 256 threads: vectors of 16 bytes, up to 64 of a pixel. Strips have two rows from 4096
# blocks on, and the last one is shorter where rows are odd.
SHAPES = {
    "several blocks": Resample(Source(8, 37, 41, slope=0.01)),
    "several blocks of channels": Resample(Source(1040, 2, 3, MAX_POOL, rows="each")),
    "unaligned channels, several blocks": Resample(Source(131, 5, 6)),
    "long strips": Resample(Source(64, 301, 301), n=1),
    "long strips, upsampled": Resample(Source(128, 191, 180, BILINEAR, (3, -2)), n=1),
    "long strips, pooled": Resample(Source(256, 289, 283, MAX_POOL), n=1),
    "batch": conv("batch", Source(3, 181, 190), out_channels=64),
    "batch, unaligned": conv("batch", Source(3, 60, 61), out_channels=67),
    "group": conv("group", Source(3, 70, 65), out_channels=24),
    "instance": conv("instance", Source(3, 60, 64), out_channels=12),
    "head": Head(Source(70, 21, 18), 21),
}


@pytest.mark.parametrize("name", sampled(SHAPES, set(SHAPES) - {"long strips, pooled"}))
def test_shapes(name):
    check_dtype(Placed(SHAPES[name]), torch.float32)


@every_mode
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("rows", ["plain", "one", "each"])
def test_vectors_of_halves(mode, dtype, rows):
    """16 bytes are 8 channels: of 24, three vectors."""
    check_dtype(Placed(Resample(Source(24, 9, 12, mode, (1, -1), rows, 0.01))), dtype)


def wider(x):
    """The same values, channels of a map that has one more."""
    n, c, h, w = x.shape
    wide = x.new_empty(n, c + 1, h, w).contiguous(memory_format=torch.channels_last)
    return wide[:, 1:].copy_(x)


def shifted(x):
    """The same values, the first one element behind a multiple of 16 bytes."""
    n, c, h, w = x.shape
    flat = x.new_empty(x.numel() + 1)[1:]
    return flat.view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)


@every_dtype
@every_mode
@pytest.mark.parametrize("shifted", [wider, shifted])
def test_unaligned_maps_of_aligned_channels(mode, dtype, shifted):
    """Maps that rule out vectors, one at a time."""
    source = Source(16, 7, 6, mode, (1, -1), "one", 0.01)
    source = source.activation({k: t.to(DEVICE) for k, t in source.tensors(2, dtype).items()})
    want = cuda.resample(source)
    dz = random(*want.shape).to(want)
    grads = cuda.resample_bwd(source, dz)
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-4 if dtype == torch.float32 else 1e-3}
    other = source._replace(y=shifted(source.y))
    torch.testing.assert_close(cuda.resample(other), want, **close)
    torch.testing.assert_close(
        cuda.resample(source, shifted(torch.empty_like(want))), want, **close
    )
    for read, grad in ((other, dz), (source, shifted(dz))):
        torch.testing.assert_close(cuda.resample_bwd(read, grad), grads, **close)


@every_dtype
@every_mode
def test_channels_beside_others(mode, dtype):
    """13 of 16 channels, as in a concatenation: the other three are neither read nor written."""
    source = Source(13, 6, 5, mode, (1, -1), "one", 0.01)
    tensors = {k: t.to(DEVICE) for k, t in source.tensors(2, dtype).items()}
    x = source.activation(tensors)
    want, out = cuda.resample(x), torch.full((2, 16, *source.size), torch.nan, dtype=dtype)
    out = channels_last(out.to(DEVICE))
    y = channels_last(torch.cat([x.y, torch.full_like(x.y[:, :3], torch.nan)], 1))
    cuda.resample(x._replace(y=y[:, :13]), out[:, :13])
    assert torch.equal(out[:, :13], want)
    assert out[:, 13:].isnan().all()
    dz = channels_last(torch.cat([random(*want.shape).to(want), out[:, 13:]], 1))
    grads = cuda.resample_bwd(x._replace(y=y[:, :13]), dz[:, :13])
    for got, grad in zip(grads, cuda.resample_bwd(x, channels_last(dz[:, :13])), strict=True):
        assert torch.equal(got, grad)


@every_dtype
@pytest.mark.parametrize("channels", [16, 13])
@pytest.mark.parametrize("rows", ["plain", "one", "each"])
@pytest.mark.parametrize(
    ("mode", "placement"),
    [(NONE, (0, 0)), (MAX_POOL, (0, 0)), (NONE, (1, -1)), (MAX_POOL, (1, 0)), (NEAREST, (0, 0))],
    ids=str,
)
def test_two_maps_in_one_pass(mode, placement, rows, channels, dtype):
    """The map and the gradients, as by two passes."""
    source = Source(channels, 9, 7, mode, placement, rows, 0.01)
    tensors = {k: t.to(DEVICE) for k, t in source.tensors(2, dtype).items()}
    x = source.activation(tensors)
    want = cuda.resample(x)
    dz = random(*want.shape).to(want)
    z, grads = cuda.resample_with_bwd(x, dz)
    assert torch.equal(z, want)
    for got, grad in zip(grads, cuda.resample_bwd(x, dz), strict=True):
        assert (got is None and grad is None) or torch.equal(got, grad)


@pytest.mark.parametrize("groups", [0, 2, 6])
@every_dtype
def test_statistics_of_far_values(dtype, groups):
    """A mean of a thousand deviations costs no accuracy."""
    y = (random(3, 6, 61, 70, dtype=torch.float64) + 1000).to(dtype).to(DEVICE)
    y = y.contiguous(memory_format=torch.channels_last)
    wide = accumulate_dtype(dtype)
    bias, gamma, beta = (random(6, seed=i, dtype=wide).to(DEVICE) for i in range(3))
    found = cuda.normalization(y, bias, gamma, beta, groups, 1e-5)
    exact = reference.normalization(
        y.double(), bias.double(), gamma.double(), beta.double(), groups, 1e-5
    )
    for got, want in zip(found, exact, strict=True):
        assert got.dtype == wide
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["several blocks", "group"])
def test_the_same_every_time(name, threads):
    check_repeats(Placed(SHAPES[name]), threads, (1, 1, 1))


def test_statistics_and_gradients_of_nothing():
    y = torch.empty(0, 4, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    rows = [len(v) for v in cuda.normalization(y, None, None, None, 2, 1e-5)]
    assert rows == [0] * 4
    assert not any(v.any() for v in cuda.normalization(y, None, None, None, 0, 1e-5)[:1])


REFUSED = {
    "layout": ({"out": torch.zeros(1, 8, 4, 4)}, "out must be channels_last"),
    "dtype": ({"out": channels_last(torch.zeros(1, 8, 4, 4)).double()}, "another dtype"),
    "samples": ({"out": channels_last(torch.zeros(2, 8, 4, 4))}, "samples and channels"),
    "rows": ({"scale": torch.ones(3, 8)}, "one row or one per sample"),
    "channels": ({"scale": torch.ones(1, 7)}, "scale must have 8 elements"),
    "mode": ({"mode": 7}, "unknown resample mode 7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    """Each before anything is launched."""
    changed, why = REFUSED[name]
    y = channels_last(torch.zeros(1, 8, 4, 4))
    vectors = {"center": torch.zeros(1, 8), "scale": torch.ones(1, 8), "shift": torch.zeros(1, 8)}
    given = {"out": torch.empty_like(y), "y": y, **vectors, "slope": 0.0, "mode": 0} | changed
    placed = (t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in given.values())
    with pytest.raises(RuntimeError, match=why):
        cuda.kernels(y.to(DEVICE)).resample(*placed)


FAULTS = {
    "correct": "63",
    "missing_barrier": "a read of shared memory that the block has not set (thread 0 of block 0",
    "missing_second_barrier": "a race in shared memory",
    "unset_shared_memory": "a read of shared memory that the block has not set (thread 63",
    "beyond_shared_memory": "an access beyond the bounds of shared memory (thread 63",
    "beyond_the_tensor": "an access to global memory is outside of every tensor (thread 63",
    "unaligned_vector": "an access to global memory is not aligned (thread 1",
    "vector_too_long": "an access to global memory is outside of every tensor (thread 15",
    "set_by_another_block": "the block has not set (thread 0 of block 1",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("faults") / "faults"
    folders = (f"-I{ROOT / name}" for name in ("tests/host_cuda", "csrc"))
    flags = ("-std=c++20", "-O1", "-DFASTUNET_HOST_CUDA", "-Wno-unknown-pragmas")
    source = ROOT / "tests/host_cuda/faults.cpp"
    subprocess.run([compiler, *flags, *folders, source, "-o", program], check=True)
    return program


@pytest.mark.skipif(ON_GPU, reason="compute-sanitizer does this on GPUs")
@pytest.mark.parametrize("name", FAULTS)
def test_the_checks_find_faults(faults, name):
    output = subprocess.run([faults, name], capture_output=True, text=True, check=True).stdout
    assert FAULTS[name] in output


MATRICES = (test_conv_norm_act, test_conv_transpose, test_resample, test_head)


@pytest.mark.skipif(not ON_GPU, reason="the operators' own tests run these on the CPU")
@pytest.mark.parametrize("module", MATRICES, ids=lambda module: module.__name__)
def test_matrix(module):
    check_oracles({name: Placed(case) for name, case in list(module.CASES.items())[::5]})
