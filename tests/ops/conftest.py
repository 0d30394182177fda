"""Which implementation serves a test.

``backend``: each backend that has kernels for the CPU; ``compiled``: the CPU's kernels as this
processor gets them; ``build``: each build of them; ``implementation``: all of these, for what
arithmetic alone could break. The backend ``cuda`` runs its kernels on the CPU (tests/host_cuda).
"""

import pytest
import torch
from torch.utils import deterministic

import fastunet
from fastunet import extension

BUILDS = ("avx512", "avx2", "default")


def libraries():
    """The file of each build that is there and that this processor can run."""
    built, why = extension.load()
    if built is None:
        pytest.skip(f"the compiled kernels are missing: {why}")
    runnable = BUILDS[BUILDS.index(built) :]
    return {b: file for b in runnable for file in extension.PACKAGE.glob(f"_cpu_{b}.*")}


def use_build(build, monkeypatch):
    """Makes the backend ``cpu`` use one build of the kernels; all can live in one process."""
    there = libraries()
    if build not in there:
        pytest.skip(f"the build {build} is missing (make test-all has it), or cannot run here")
    torch.ops.load_library(there[build])
    monkeypatch.setattr(extension, "load", lambda: (build, ""))


def all_builds(function, monkeypatch):
    """The function's result with each of several builds."""
    there = libraries()
    if len(there) < 2:
        pytest.skip(f"make test-all has other builds than {', '.join(there)}")
    results = []
    for build in there:
        use_build(build, monkeypatch)
        with fastunet.backend("cpu"):
            results.append(function())
    return results


@pytest.fixture
def compiled():
    """The backend ``cpu`` in the build that this processor gets."""
    built, why = extension.load()
    if built is None:
        pytest.skip(f"the compiled kernels are missing: {why}")
    with fastunet.backend("cpu"):
        yield built


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    use_build(request.param, monkeypatch)
    with fastunet.backend("cpu"):
        yield request.param


def need_host_cuda():
    if why := extension.load_cuda("cuda_host"):
        pytest.skip(why)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request):
    if request.param == "cpu" and extension.load()[0] is None:
        pytest.skip(f"the compiled kernels are missing: {extension.load()[1]}")
    if request.param == "cuda":
        need_host_cuda()
    with fastunet.backend(request.param):
        yield request.param


@pytest.fixture(params=["reference", "cuda", *(f"cpu_{build}" for build in BUILDS)])
def implementation(request, monkeypatch):
    name, _, build = request.param.partition("_")
    if build:
        use_build(build, monkeypatch)
    if name == "cuda":
        need_host_cuda()
    with fastunet.backend(name):
        yield name


@pytest.fixture
def exact_convolutions():
    """PyTorch's on GPUs, in fp32 as its budgets are, and not in TF32."""
    cudnn = torch.backends.cudnn.conv
    before, cudnn.fp32_precision = cudnn.fp32_precision, "ieee"
    yield
    cudnn.fp32_precision = before


@pytest.fixture(params=["on load", "materialised"])
def way(request, exact_convolutions):
    """How the Triton kernels get at what is pending; never by PyTorch's convolution."""
    from fastunet.triton import selection

    with fastunet.backend("triton"), selection.forced(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN (and integers their maximum) while this is entered."""

    class Poison:
        def __enter__(self):
            self.before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True)
            monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
            assert torch.empty(3).isnan().all()

        def __exit__(self, *_):
            torch.use_deterministic_algorithms(self.before)

    return Poison()


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
