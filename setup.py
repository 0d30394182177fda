"""Builds the compiled CPU kernels against the torch that is installed.

One source, three builds: baseline x86-64 (any processor elsewhere), AVX2 and AVX-512. The package
loads the one that the processor can run. The extension uses torch's stable ABI and Python's limited
API, so one build serves every torch >= 2.11 and every Python >= 3.10.

FASTUNET_CPU=0    skip the compiled kernels
FASTUNET_CPU=1    fail the build where they cannot be compiled (otherwise the package is installed
                  without them, and `fastunet doctor` says why)
MAX_JOBS=n        compile in n jobs (2 by default)
FASTUNET_SANITIZE=1  with AddressSanitizer and UndefinedBehaviorSanitizer, see `make sanitize`
"""

import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# What the build left out, and why: read by `fastunet doctor`.
BUILD_NOTE = ROOT / "src" / "fastunet" / "build_note.txt"


def cpu_extensions():
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp"))
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
    flags += ["-Wall", "-Wno-psabi"]
    builds = {"default": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        builds["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
        builds["avx512"] = [*builds["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
        # GCC 12 warns of its own headers (bug 105593).
        builds["avx512"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    link = []
    if os.environ.get("FASTUNET_SANITIZE") == "1":
        link = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags += ["-O1", "-g1", "-fno-omit-frame-pointer", *link]
    return [
        CppExtension(
            f"fastunet._cpu_{name}",
            sources,
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[
                ("TORCH_TARGET_VERSION", "0x020b000000000000"),
                ("FASTUNET_LIBRARY", f"fastunet_cpu_{name}"),
            ],
            extra_compile_args=flags + isa,
            extra_link_args=link,
            py_limited_api=True,
        )
        for name, isa in builds.items()
    ]


def compiled_build():
    """The arguments of setup() for the compiled kernels; none where they cannot be built."""
    # pip builds in isolation, where the environment's own torch is hidden: look there too.
    sys.path.append(sysconfig.get_path("purelib"))
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        def build_extension(self, extension):
            # Objects of the builds have the same names: keep them apart.
            shared = self.build_temp
            self.build_temp = os.path.join(shared, extension.name)
            try:
                super().build_extension(extension)
            finally:
                self.build_temp = shared

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if required:
                    raise
                leave_out(f"the C++ kernels did not compile: {error}")
                if not self.inplace:  # the package's files were copied before this
                    self.copy_file(str(BUILD_NOTE), os.path.join(self.build_lib, "fastunet"))
                self.extensions = []

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    os.environ.setdefault("MAX_JOBS", "2")
    return {
        "ext_modules": cpu_extensions(),
        "cmdclass": {"build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def leave_out(why):
    BUILD_NOTE.write_text(f"{why}\n")
    print(f"fastunet: built without compiled kernels: {why}", file=sys.stderr)


BUILD_NOTE.unlink(missing_ok=True)
required = os.environ.get("FASTUNET_CPU") == "1"
arguments = {}
if os.environ.get("FASTUNET_CPU") == "0":
    leave_out("FASTUNET_CPU=0 was set when the package was built")
else:
    try:
        arguments = compiled_build()
    except ImportError as error:
        if required:
            raise
        leave_out(f"no torch was found when the package was built ({error})")
setup(**arguments)
