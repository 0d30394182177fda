"""Which backend serves: explicit choices, the automatic one, and installations without kernels."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import fastunet
from fastunet import backends, cpu, extension, reference
from fastunet.activation import Activation
from fastunet.ops import materialize

needs_kernels = pytest.mark.skipif(
    extension.load()[0] is None, reason=f"the compiled kernels are missing: {extension.load()[1]}"
)


def pooled(requires_grad=False):
    x = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_(requires_grad)
    return x, Activation.of(x).pool()


@pytest.fixture
def served(monkeypatch):
    """The backends that served resample and its backward, in the order of the calls."""
    calls = []

    def watched(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for module in (reference, cpu):
        name = module.__name__.rpartition(".")[2]
        for function in ("resample", "resample_bwd"):
            monkeypatch.setattr(module, function, watched(name, getattr(module, function)))
    return calls


def python(code, path=None, **environment):
    """What a fresh interpreter prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


@needs_kernels
def test_automatic_choice_is_the_fastest(served):
    materialize(pooled()[1])
    assert served == ["cpu"]


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_explicit_choice(served, name):
    with fastunet.backend(name):
        materialize(pooled()[1])
    assert served == [name]


@needs_kernels
def test_backward_runs_where_forward_ran(served):
    """Even when the context has been left, or another one entered."""
    x, activation = pooled(requires_grad=True)
    with fastunet.backend("reference"):
        z = materialize(activation)
    with fastunet.backend("cpu"):
        z.sum().backward()
    assert served == ["reference", "reference"]
    assert x.grad.sum() == 4


def test_contexts_nest_and_end():
    before = backends.requested()
    with fastunet.backend("reference"):
        with fastunet.backend("auto"):
            assert backends.requested() == "auto"
        assert backends.requested() == "reference"
        with pytest.raises(KeyError), fastunet.backend("cpu"):
            raise KeyError
        assert backends.requested() == "reference"
    assert backends.requested() == before


def test_unknown_name():
    with (
        pytest.raises(ValueError, match=r"the backend must be one of auto, .*, got 'cuda12'"),
        fastunet.backend("cuda12"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "x", "why"),
    [
        ("reference", torch.ones(1, 1, 2, 2, dtype=torch.int64), "floating point, got torch.int64"),
        ("cpu", torch.ones(1, 1, 2, 2, dtype=torch.int64), "float16, got torch.int64"),
        ("cpu", torch.ones(1, 1, 2, 2, dtype=torch.complex64), "float16, got torch.complex64"),
        ("cpu", torch.ones(1, 1, 2, 2, device="meta"), "must be on the CPU, got meta"),
    ],
    ids=["reference-int", "cpu-int", "cpu-complex", "cpu-meta"],
)
def test_explicit_choice_raises_with_the_reason(name, x, why):
    with pytest.raises(RuntimeError, match=rf"backend '{name}' cannot serve this: .*{why}"):
        backends.select(name, "head", x)
    if x.device.type == "cpu":
        with fastunet.backend(name), pytest.raises(RuntimeError, match=why):
            materialize(Activation.of(x).pool())


def test_no_silent_fallback(monkeypatch):
    """Without kernels an explicit choice raises; the automatic one goes on."""
    monkeypatch.setattr(extension, "load", lambda: (None, "they were left out"))
    activation = pooled()[1]
    with fastunet.backend("cpu"), pytest.raises(RuntimeError, match="they were left out"):
        materialize(activation)
    with pytest.raises(RuntimeError, match="they were left out"):
        extension.kernels()
    with fastunet.backend("auto"):
        assert materialize(activation).flatten().tolist() == [5, 7, 13, 15]


def test_environment():
    code = "from fastunet import backends; print(backends.requested())"
    assert python(code, FASTUNET_BACKEND="reference").stdout.strip() == "reference"
    result = python(code, FASTUNET_BACKEND="fast")
    assert result.returncode != 0
    assert (
        "FASTUNET_BACKEND must be one of auto, cpu, triton, cuda, reference, got 'fast'"
        in result.stderr
    )


@pytest.mark.parametrize(
    ("capability", "there", "chosen"),
    [
        ("AVX512", ["avx512", "avx2", "default"], "avx512"),
        ("AVX512", ["avx2", "default"], "avx2"),
        ("AVX2", ["avx512", "avx2", "default"], "avx2"),
        ("AVX2", ["avx512"], None),
        ("DEFAULT", ["avx512", "avx2", "default"], "default"),
        ("SVE256", ["default"], "default"),
    ],
)
def test_build_follows_the_instruction_set(monkeypatch, tmp_path, capability, there, chosen):
    for build in there:
        (tmp_path / f"_cpu_{build}.abi3.so").touch()
    loaded = []
    monkeypatch.setattr(extension, "PACKAGE", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.ops, "load_library", lambda file: loaded.append(file.name))
    build, why = extension.load.__wrapped__()
    assert build == chosen
    assert loaded == ([f"_cpu_{chosen}.abi3.so"] if chosen else [])
    assert ("no compiled kernels" in why) == (chosen is None)


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_atens_capability_holds_here_too(capability):
    """ATEN_CPU_CAPABILITY holds PyTorch and these kernels to a baseline alike."""
    if capability == "avx2" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor has no AVX2")
    if not list(extension.PACKAGE.glob(f"_cpu_{capability}.*")):
        pytest.skip(f"the build {capability} is missing")
    code = (
        "import torch; from fastunet import Activation, extension, ops\n"
        "z = ops.materialize(Activation.of(torch.ones(1, 1, 2, 2)).pool())\n"
        "print(extension.load()[0], z.item())"
    )
    result = python(code, ATEN_CPU_CAPABILITY=capability, FASTUNET_BACKEND="cpu")
    assert result.stdout.split() == [capability, "1.0"], result.stderr


SERVES_WITHOUT_KERNELS = """
import torch, fastunet
from fastunet import extension
print(fastunet.__file__)
print(*extension.load())
model = fastunet.FastUNet(3, 2, base_channels=4, depth=1)
model(torch.ones(1, 3, 8, 8)).sum().backward()
print(all(p.grad is not None for p in model.parameters()))
try:
    with fastunet.backend("cpu"):
        model(torch.ones(1, 3, 8, 8))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "they were not built"),
        ({"build_note.txt": "CUDA: no nvcc\nCPU: no g++ was found\n"}, "installation: no g++ was"),
        ({"_cpu_avx2.abi3.so": "x", "_cpu_default.abi3.so": "x"}, "does not load with torch"),
    ],
    ids=["missing", "left_out", "broken"],
)  # fmt: skip
def test_installation_without_kernels(tmp_path, files, why):
    """The package imports, trains, and says why and what to do."""
    package = tmp_path / "fastunet"
    ignored = shutil.ignore_patterns("*.so", "build_note.txt", "__pycache__")
    shutil.copytree(extension.PACKAGE, package, ignore=ignored)
    for name, text in files.items():
        (package / name).write_text(text)
    result = python(SERVES_WITHOUT_KERNELS, path=tmp_path, FASTUNET_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    file, load, trained, refusal = result.stdout.splitlines()
    assert file == str(package / "__init__.py")
    assert load.startswith("None ")
    assert why in load
    assert "pip install" in load
    assert trained == "True"
    assert refusal == f"backend 'cpu' cannot serve this: {load.removeprefix('None ')}"
