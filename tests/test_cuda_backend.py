"""The backend cuda as a whole: networks, what it moves, its choice, and that it compiles for GPUs.

Its kernels run on the CPU here (tests/host_cuda)."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from networks import pair, random
from sampling import sampled
from test_parity import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import cuda_kernels

import fastunet
from fastunet import FastUNet, backends, cuda, extension, self_check
from fastunet.activation import Activation

ROOT = cuda_kernels.ROOT
MISSING = extension.load_cuda("cuda_host")
on_host = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
VARIANTS = {
    "bilinear": ({"bilinear": True}, (13, 11)),
    "transposed": ({"bilinear": False, "conv_bias": True}, (12, 16)),
    "defaults": ({"depth": 4, "base_channels": 8}, (32, 48)),
    "no norm": ({"norm": "none", "bilinear": True, "depth": 1}, (5, 8)),
    "group": ({"norm": "group", "activation": "leaky_relu", "depth": 1}, (5, 8)),
    "instance": ({"norm": "instance", "bilinear": True, "depth": 2}, (9, 14)),
}


@on_host
@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training(variant, mode):
    """Logits, gradients and running statistics, at most twice as far from float64 as plain
    PyTorch's."""
    options, size = VARIANTS[variant]
    with fastunet.backend("cuda"):
        assert_as_accurate(options, mode, size, "contiguous", seeds=2)


@on_host
@pytest.mark.parametrize("variant", VARIANTS)
def test_inference(variant):
    options, size = VARIANTS[variant]
    plain, fast = (model.eval() for model in pair(**options))
    x = random(1, 3, *size)
    with torch.no_grad(), fastunet.backend("cuda"):
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)


OPERATOR = importlib.import_module("fastunet.ops.conv_norm_act")  # the name is the function's too


class Traffic(TorchDispatchMode):
    """What kernels read and write of maps of a size, in bytes of 16-bit values: each map once."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().partition(".")[0].split("::")
        if namespace == "fastunet":
            variant = name.removeprefix("conv_norm_act")  # none or _bwd
            with self:
                return getattr(OPERATOR, f"implementation{variant}")(*args)
        result = func(*args, **(kwargs or {}))
        if namespace == "fastunet_cuda_host":
            self.bytes[name] += sum(map(self.moved, args))
        elif name == "convolution":
            self.bytes[name] += self.moved(args[0]) + self.moved(result)
        elif name == "convolution_backward":
            dy, x, *_, (need_x, need_weight, _) = args
            self.bytes["dgrad"] += need_x * (self.moved(dy) + self.moved(x))
            self.bytes["wgrad"] += need_weight * (self.moved(dy) + self.moved(x))
        elif name == "contiguous":
            self.bytes[name] += 2 * (result is not args[0]) * self.moved(result)
        elif name not in NO_TRAFFIC:
            self.bytes[name] += sum(map(self.moved, (*args, result)))
        return result

    def moved(self, x):
        if not isinstance(x, torch.Tensor) or x.shape[-2:] != self.size:
            return 0
        return 2 * x.numel()


# Views and allocations.
NO_TRAFFIC = ("detach", "empty", "empty_like", "new_empty", "narrow")


@on_host
def test_bytes_of_a_layer():
    """A 3x3 layer in a chain moves 10 bytes per pixel and channel forward and 22 backward, in 16
    bit; eager PyTorch 14 and 24 (fastunet.bound). Run in fp32: in 16 bit PyTorch's convolutions
    return other layouts, on the CPU."""
    c, h, w = 16, 20, 24
    x = random(1, c, h, w).contiguous(memory_format=torch.channels_last)
    weights = [random(c, c, 3, 3, seed=i).requires_grad_() for i in range(3)]
    vectors = [torch.ones(c, requires_grad=True) for _ in range(2)]

    def layer(source, weight):
        options = {"norm": "batch", "gamma": vectors[0], "beta": vectors[1], "slope": 0.0}
        return fastunet.ops.conv_norm_act(source, weight, **options).output

    with fastunet.backend("cuda"):
        first = layer(Activation.of(x), weights[0])
        with Traffic((h, w)) as forward:
            middle = layer(first, weights[1])
        last = layer(middle, weights[2])
        grads = [torch.ones_like(t) for t in (last.y, last.scale, last.shift)]
        with Traffic((h, w)) as backward:
            torch.autograd.grad([last.y, last.scale, last.shift], [middle.y], grads)
    each = c * h * w
    assert {name: n / each for name, n in forward.bytes.items() if n} == {
        "resample": 4,
        "convolution": 4,
        "normalization": 2,
    }
    # Of the last layer its normalisation and its products, and what is sent to its source.
    assert {name: n / each for name, n in backward.bytes.items() if n} == {
        "normalization_bwd": 6,
        "dgrad": 4,
        "resample_bwd": 8,
        "wgrad": 4,
    }


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTUNET_CACHE", str(tmp_path))
    self_check.verdicts.cache_clear()
    yield
    self_check.verdicts.cache_clear()


@on_host
@pytest.mark.parametrize("dtype", self_check.TOLERANCE, ids=str)
@pytest.mark.parametrize("name", self_check.CASES)
def test_self_check_passes(name, dtype):
    assert self_check.check("cuda", name, dtype, torch.device("cpu")) == ("", True)


@on_host
@pytest.mark.parametrize("name", self_check.CASES)
def test_self_check_finds_wrong_kernels(name, monkeypatch):
    resample = cuda.PASSES.resample

    def wrong(source, out=None):
        return resample(source._replace(slope=source.slope + 0.5), out)

    for module in (cuda, cuda.PASSES):
        monkeypatch.setattr(module, "resample", wrong)
    why, lasting = self_check.check("cuda", name, torch.float32, torch.device("cpu"))
    assert f"the cuda kernels of {name} in torch.float32 are wrong here" in why
    assert lasting


def test_never_chosen_on_the_cpu():
    why = backends.why_not("cuda", "resample", torch.zeros(1))
    assert why.startswith("the tensors must be") if MISSING else "never chosen" in why


@pytest.mark.parametrize(
    ("refused", "operator", "convolves", "chosen"),
    [
        ((), "conv_norm_act", True, "triton"),
        ((), "conv_norm_act", False, "cuda"),
        ((), "head", None, "triton"),
        ((), "resample", None, "cuda"),
        (("cuda",), "conv_norm_act", False, "triton"),
        (("cuda",), "resample", None, "triton"),
        (("triton",), "conv_norm_act", True, "cuda"),
        (("triton",), "head", None, "cuda"),
        (("triton", "cuda"), "conv_norm_act", True, "reference"),
    ],
)
def test_choice_on_gpus(monkeypatch, refused, operator, convolves, chosen):
    """Triton where it has the layer's product; around PyTorch's products, compiled kernels."""
    monkeypatch.setattr(backends, "why_not", lambda name, *_: "no" * (name in ("cpu", *refused)))
    triton = backends.module("triton")
    predicate = None if convolves is None else (lambda kernels: convolves and kernels is triton)
    name, whys = backends.choose(operator, torch.zeros(1), predicate)
    assert name == chosen
    assert set(whys) <= {"cpu", *refused}


def test_missing_kernels_are_explained(monkeypatch):
    """On a GPU, where the package was built without."""
    monkeypatch.setattr(extension, "load_cuda", lambda name: "no CUDA kernels in this installation")
    x = torch.empty(1, device="meta")
    assert "must be on a CUDA GPU, got meta" in cuda.why_not(x)
    assert "must be on a CUDA GPU, got cpu" in cuda.why_not(torch.empty(1))
    with (
        fastunet.backend("cuda"),
        pytest.raises(RuntimeError, match="backend 'cuda' cannot serve this"),
    ):
        FastUNet(3, 2, base_channels=4, depth=1)(torch.ones(1, 3, 8, 8))


@pytest.mark.skipif(
    cuda_kernels.cuda_home() is None, reason="not run: there is no nvcc to compile CUDA code with"
)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("architectures", sampled(["8.0;9.0a", "9.0a"], ["9.0a"]))
def test_compiles_for_gpus(tmp_path, architectures):
    """Links, loads and registers, also with a torch without CUDA; no thread's values spill to
    memory. Sampled without the file that takes nvcc most of the time."""
    without = ["resample_cuda.cu"] if architectures == "9.0a" else []
    library = cuda_kernels.build(tmp_path, architectures, *without)
    operators = ["normalization", "normalization_bwd"]
    operators += [] if without else ["resample", "resample_bwd"]
    # Linked, although no symbol of its own is used: it brings its CUDA part.
    assert b"\0libtorch.so\0" in library.read_bytes()
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
for name in {operators}:
    schema = getattr(torch.ops.fastunet_cuda, name).default._schema
    print(torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA"))
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(cuda_kernels.cuda_home() / "lib64")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.stdout.split() == [b"True"] * len(operators), run.stderr

    rows = cuda_kernels.kernels(library)
    names = {row["kernel"] for row in rows}
    # As vectors and one by one: in four modes forward and back, statistics, and the gradient.
    assert len(names) == (4 * 2 * 2 + 2 * 2 if without else 4 * 2 * (4 * 2 + 2) + 2 * 3)
    assert "tile_moments<f64, 2>" in names
    if not without:
        assert {"resample_bwd<bilinear, bf16, 8>", "sum_tiles<f32>"} <= names
    expected = {f"sm_{name.replace('.', '')}" for name in architectures.split(";")}
    assert {row["arch"] for row in rows} == expected
    assert len(rows) == len(expected) * len(names)
    assert not [row for row in rows if cuda_kernels.fault(row)]


SETUP = """
import runpy, sys, torch
torch.version.cuda = {cuda!r}
sys.argv = ["setup.py", "--version"]
sys.path.insert(0, ".")
runpy.run_path("setup.py", run_name="__main__")
"""
needs_nvcc = pytest.mark.skipif(cuda_kernels.cuda_home() is None, reason="there is no nvcc")


@pytest.mark.parametrize(
    ("cuda", "asked", "why"),
    [
        (None, "", r"CUDA: torch \S+ is a build without CUDA"),
        pytest.param(
            None,
            "0",
            "CUDA: FASTUNET_CUDA=0 was set when the package was built",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "9.2",
            "",
            "CUDA: nvcc and torch must agree .*, 9.2",
            marks=[needs_nvcc, pytest.mark.slow],
        ),
        pytest.param("9.2", "1", "the CUDA kernels cannot be built: nvcc and", marks=needs_nvcc),
        pytest.param(None, "1", "^$", marks=[needs_nvcc, pytest.mark.slow]),
    ],
)
def test_what_the_build_leaves_out(tmp_path, cuda, asked, why):
    """GPUs, unless torch and nvcc are for the same CUDA, or it is told to; and it says so."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src" / "fastunet").mkdir(parents=True)
    environment = {
        **os.environ,
        "FASTUNET_CUDA": asked,
        "FASTUNET_CPU": "",
        "FASTUNET_HOST_CUDA": "",
    }
    run = subprocess.run(
        [sys.executable, "-c", SETUP.format(cuda=cuda)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    note = tmp_path / "src" / "fastunet" / "build_note.txt"
    assert (run.returncode == 1) == (cuda == "9.2" and asked == "1"), run.stderr
    found = run.stderr if run.returncode else note.read_text().strip() if note.exists() else ""
    assert re.search(why, found)
