"""Builds the compiled kernels, for CPUs and for CUDA GPUs, against the torch that is installed.

CPU: one source, three builds: baseline x86-64 (any processor elsewhere), AVX2 and AVX-512. The
package loads the one that the processor can run. CUDA: built where the installed torch is a CUDA
build and there is an nvcc of the same major version. The extensions use torch's stable ABI and
Python's limited API, so one build serves every torch >= 2.11 and every Python >= 3.10.

FASTUNET_CPU=0, FASTUNET_CUDA=0    leave out the kernels
FASTUNET_CPU=1, FASTUNET_CUDA=1    fail where they cannot be compiled (otherwise the package is
                  installed without them, and `fastunet doctor` says why)
TORCH_CUDA_ARCH_LIST   architectures, by default those of the GPUs that are there, from 8.0 up;
                  without any "8.0+PTX": compiled for sm_80, and by the driver for later ones; a
                  release has "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
MAX_JOBS=n        compile in n jobs (2 by default)
FASTUNET_BUILDS=avx2   these of the CPU builds alone: default, avx2, avx512, or native: the one that
                  this processor gets
FASTUNET_SANITIZE=1  with AddressSanitizer and UndefinedBehaviorSanitizer, see `make sanitize`
FASTUNET_HOST_CUDA=1  for tests: also the CUDA kernels compiled for the CPU, all accesses checked
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# What the build left out, and why, "part: reason" in each line: read by `fastunet doctor`.
BUILD_NOTE = ROOT / "src" / "fastunet" / "build_note.txt"
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
# -g0, as many Pythons ask for -g: a third more time, and libraries of eight times the size.
CXX_FLAGS = ["-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]


def extension(name, sources, flags, folders=(), macros=(), **options):
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        f"fastunet._{name}",
        sources,
        include_dirs=[str(ROOT / folder) for folder in (*folders, "csrc")],
        define_macros=[*MACROS, ("FASTUNET_LIBRARY", f"fastunet_{name}"), *macros],
        extra_compile_args=flags,
        py_limited_api=True,
        **options,
    )


def sources(suffix):
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(f"**/*{suffix}"))


def cuda_macros():
    """A name of the sources, by which a GPU's self-check knows the kernels again."""
    text = hashlib.sha256()
    for source in sorted((ROOT / "csrc").glob("**/*.*")):
        text.update(source.read_bytes())
    return [("FASTUNET_SOURCES", text.hexdigest()[:16])]


def cpu_extensions():
    flags = [*CXX_FLAGS, "-ffp-contract=fast", "-fno-math-errno"]
    builds = {"default": ["-O3"]}
    if platform.machine().lower() in ("x86_64", "amd64"):
        builds["default"] = ["-O2"]  # few processors need it: compiled in half the time
        builds["avx2"] = ["-O3", "-mavx2", "-mfma", "-mf16c"]
        builds["avx512"] = [*builds["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
        # GCC 12 warns of its own headers (bug 105593).
        builds["avx512"] += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    wanted = os.environ.get("FASTUNET_BUILDS", " ".join(builds)).split()
    wanted = [native() if name == "native" else name for name in wanted]
    checks = []
    if os.environ.get("FASTUNET_SANITIZE") == "1":
        checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        checks += ["-O0", "-g1"]  # compiled in a quarter of the time of -O1
    return [
        extension(f"cpu_{name}", sources(".cpp"), flags + own + checks, extra_link_args=checks)
        for name, own in builds.items()
        if name in wanted
    ]


def native():
    """The build that this processor gets, as fastunet/extension.py chooses."""
    import torch

    found = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(found, "default")


def host_cuda_extension():
    flags = [*CXX_FLAGS, "-O2", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    flags += ["-Wno-unknown-pragmas"]
    return extension(
        "cuda_host",
        ["tests/host_cuda/kernels.cpp"],
        flags,
        folders=["tests/host_cuda"],
        macros=[("FASTUNET_HOST_CUDA", None), *cuda_macros()],
    )


def cuda_home():
    """The CUDA toolkit's folder, or None; builds of torch without CUDA do not look for it."""
    from torch.utils import cpp_extension

    nvcc = shutil.which("nvcc")
    beside_nvcc = str(Path(nvcc).resolve().parents[1]) if nvcc else None
    homes = (cpp_extension.CUDA_HOME, os.environ.get("CUDA_HOME"), beside_nvcc, "/usr/local/cuda")
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    return next((h for h in homes if h and all(Path(h, n).exists() for n in needed)), None)


def cuda_extension():
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = cuda_home()  # None in builds of torch without CUDA
    os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures()
    nvcc = ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden"]
    return extension(
        "cuda",
        sources(".cu"),
        {"cxx": ["-std=c++20"], "nvcc": nvcc},
        macros=cuda_macros(),
        libraries=["cudart"],
        # By way of libtorch its CUDA part, whose current stream is asked for, comes into scope.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        library_dirs=[os.path.join(cuda_home(), name) for name in ("lib64", "lib")],
    )


def architectures():
    """Of the GPUs that are there, where this nvcc compiles for all of them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = sorted({torch.cuda.get_device_capability(i) for i in range(count)})
    found = [(major, minor) for major, minor in found if major >= 8]
    nvcc = [Path(cuda_home(), "bin", "nvcc"), "--list-gpu-code"]
    known = subprocess.check_output(nvcc, text=True).split() if found else []
    if not found or any(f"sm_{major}{minor}" not in known for major, minor in found):
        return "8.0+PTX"
    return ";".join(f"{major}.{minor}" for major, minor in found)


def why_no_cuda():
    """Why the CUDA kernels cannot be built, empty where they can."""
    import torch

    home = cuda_home()
    if home is None:
        return "there is no nvcc: set CUDA_HOME, or put it on PATH"
    if torch.version.cuda is None:
        # Possible all the same: a check that they compile.
        return "" if asked("CUDA") == "1" else f"torch {torch.__version__} is a build without CUDA"
    try:
        text = subprocess.check_output([Path(home, "bin", "nvcc"), "--version"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvcc does not run: {error}"
    found = re.search(r"release (\d+)\.", text)
    if not found or found[1] != torch.version.cuda.split(".")[0]:
        release = found[1] if found else "an unknown version"
        return f"nvcc and torch must agree in CUDA's major version: {release}, {torch.version.cuda}"
    return ""


def asked(part):
    return os.environ.get(f"FASTUNET_{part}", "")


def part_of(extension):
    return "CPU" if "._cpu" in extension.name else "CUDA"


def extensions():
    """What is to be built here; what is not is noted."""
    chosen = []
    if asked("CPU") == "0":
        leave_out("CPU", "FASTUNET_CPU=0 was set when the package was built")
    else:
        chosen += cpu_extensions()
    if asked("CUDA") == "0":
        leave_out("CUDA", "FASTUNET_CUDA=0 was set when the package was built")
    elif why := why_no_cuda():
        if asked("CUDA") == "1":
            sys.exit(f"fastunet: the CUDA kernels cannot be built: {why}")
        leave_out("CUDA", why)
    else:
        chosen.append(cuda_extension())
    if os.environ.get("FASTUNET_HOST_CUDA") == "1":
        chosen.append(host_cuda_extension())
    return chosen


def compiled_build():
    """The arguments of setup() for the compiled kernels; none where they cannot be built."""
    # pip builds in isolation, where the environment's own torch is hidden: look there too.
    sys.path.append(sysconfig.get_path("purelib"))
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        def build_extension(self, extension):
            # Objects of the builds have the same names: keep them apart.
            self.begun = True
            shared = self.build_temp
            self.build_temp = os.path.join(shared, extension.name)
            try:
                super().build_extension(extension)
            except Exception as error:
                if asked(part_of(extension)) == "1":
                    raise
                leave_out(part_of(extension), f"they did not compile: {error}")
                self.failed.append(extension)
            finally:
                self.build_temp = shared

        def finalize_options(self):
            super().finalize_options()
            self.force = True  # setuptools knows no headers; ninja does, and builds what changed

        def build_extensions(self):
            self.failed, self.begun = [], False
            try:
                super().build_extensions()
            except RuntimeError as error:  # torch refuses the compilers before any is built
                of_cuda = [e for e in self.extensions if e.name == "fastunet._cuda"]
                if self.begun or not of_cuda or asked("CUDA") == "1":
                    raise
                leave_out("CUDA", str(error))
                self.failed = of_cuda
                self.extensions = [e for e in self.extensions if e not in of_cuda]
                super().build_extensions()
            self.extensions = [e for e in self.extensions if e not in self.failed]
            # The package's files, those of earlier builds too, may have been copied before this.
            copied = Path(self.build_lib, "fastunet")
            if copied.is_dir():
                if BUILD_NOTE.exists():
                    self.copy_file(str(BUILD_NOTE), str(copied))
                forget_left_out(copied)

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    os.environ.setdefault("MAX_JOBS", "2")
    chosen = extensions()
    if not chosen:
        return {}
    return {
        "ext_modules": chosen,
        "cmdclass": {"build_ext": BuildKernels},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def leave_out(part, why):
    with BUILD_NOTE.open("a") as note:
        note.write(f"{part}: {' '.join(why.split())}\n")
    forget_left_out(BUILD_NOTE.parent)
    print(f"fastunet: built without the {part} kernels: {why}", file=sys.stderr)


def forget_left_out(folder):
    """Deletes libraries of an earlier build, of parts that this one leaves out."""
    noted = BUILD_NOTE.read_text() if BUILD_NOTE.exists() else ""
    for part, files in (("CPU", "_cpu_*.*"), ("CUDA", "_cuda.*")):
        for library in folder.glob(files) if f"{part}: " in noted else ():
            library.unlink()


BUILD_NOTE.unlink(missing_ok=True)
try:
    arguments = compiled_build()
except ImportError as error:
    if "1" in (asked("CPU"), asked("CUDA")):
        raise
    arguments = {}
    for missing in ("CPU", "CUDA"):
        leave_out(missing, f"no torch was found when the package was built ({error})")
setup(**arguments)
