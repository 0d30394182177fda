"""The compiled kernels: which build fits this machine, and why there is none."""

import functools
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


@functools.cache
def load() -> tuple[str | None, str]:
    """Loads the CPU kernels: (build, "") or (None, why there are none).

    The instruction set is the one PyTorch detects, so its ATEN_CPU_CAPABILITY works here too.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    best = {"AVX512": 0, "AVX2": 1}.get(capability, 2)
    builds = ["avx512", "avx2", "default"][best:]
    for build in builds:
        files = sorted(PACKAGE.glob(f"_cpu_{build}.*"))
        if not files:
            continue
        try:
            torch.ops.load_library(files[0])
        except OSError as error:
            return None, (
                f"{files[0].name} does not load with torch {torch.__version__} ({error}); "
                f"rebuild it: {REINSTALL}"
            )
        return build, ""
    return None, (
        f"no compiled kernels in this installation: {left_out('CPU')}; with a C++20 compiler "
        f"(g++ or clang++), run: {REINSTALL}"
    )


@functools.cache
def load_cuda(name: str = "cuda") -> str:
    """Loads the CUDA kernels, or, as ``cuda_host``, those compiled for the CPU. Why that is not
    possible; empty where they are there."""
    files = sorted(PACKAGE.glob(f"_{name}.*"))
    if not files:
        return (
            f"no CUDA kernels in this installation: {left_out('CUDA')}; with a CUDA build of torch "
            f"and nvcc, run: FASTUNET_CUDA=1 {REINSTALL}"
        )
    try:
        torch.ops.load_library(files[0])
    except OSError as error:
        return (
            f"{files[0].name} does not load with torch {torch.__version__} ({error}); "
            f"rebuild it: FASTUNET_CUDA=1 {REINSTALL}"
        )
    return ""


def left_out(part: str) -> str:
    """Why the build left out the kernels, ``CPU`` or ``CUDA``, as setup.py noted."""
    note = PACKAGE / "build_note.txt"
    lines = note.read_text().splitlines() if note.exists() else []
    whys = [line.partition(": ")[2] for line in lines if line.startswith(f"{part}: ")]
    return whys[0] if whys else "they were not built"


def kernels():
    """The namespace of the CPU kernels, ``torch.ops.fastunet_cpu_<build>``."""
    build, why = load()
    if build is None:
        raise RuntimeError(why)
    return getattr(torch.ops, f"fastunet_cpu_{build}")
