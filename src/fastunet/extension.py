"""The compiled CPU kernels: which build fits this processor, and why there is none."""

import functools
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent


@functools.cache
def load() -> tuple[str | None, str]:
    """Loads the compiled kernels: (build, "") or (None, why there are none).

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
                "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps ."
            )
        return build, ""
    note = PACKAGE / "build_note.txt"
    why = note.read_text().strip() if note.exists() else "they were not built"
    return None, (
        f"no compiled kernels in this installation: {why}; with a C++20 compiler (g++ or clang++), "
        "run: pip install --no-build-isolation --force-reinstall --no-deps ."
    )


def kernels():
    """The namespace of the compiled kernels, ``torch.ops.fastunet_cpu_<build>``."""
    build, why = load()
    if build is None:
        raise RuntimeError(why)
    return getattr(torch.ops, f"fastunet_cpu_{build}")
