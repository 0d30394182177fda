"""Compiles the CUDA C++ kernels for GPUs that are not there, also against a torch without CUDA.

Printed, as cuobjdump finds them in the library: registers, spilled bytes and shared memory of each
kernel; its accesses to global memory by 16 bytes and by less, and how many loads run ahead.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
# What setup.py reads.
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "src")
# Per thread and block, so that two blocks of 256 threads fit a multiprocessor.
MOST_REGISTERS, MOST_SHARED = 128, 48 << 10
MODES = {"0": "none", "1": "max_pool", "2": "bilinear", "4": "nearest"}


def cuda_home() -> Path | None:
    """A CUDA toolkit that can compile, or None."""
    nvcc = shutil.which("nvcc")
    homes = (
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        nvcc and Path(nvcc).resolve().parents[1],
    )
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    found = (Path(home) for home in homes if home)
    return next((home for home in found if all((home / n).exists() for n in needed)), None)


def build(folder: Path, architectures: str, *without: str) -> Path:
    """The library with the CUDA kernels, compiled in a copy of the sources, ``without`` those.

    Raises:
        RuntimeError: where there is no toolkit, or the kernels do not compile, with the messages.
    """
    home = cuda_home()
    if home is None:
        raise RuntimeError("there is no nvcc: set CUDA_HOME")
    copy = folder / "source"
    for name in SOURCES:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("*.so", *without))
        else:
            shutil.copy(ROOT / name, target)
    environment = {**os.environ, "CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": architectures}
    environment |= {"FASTUNET_CPU": "0", "FASTUNET_CUDA": "1", "FASTUNET_HOST_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder / "built")]
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    (library,) = (folder / "built" / "fastunet").glob("_cuda.*")
    return library


def cuobjdump(option: str, library: Path) -> str:
    """Triton brings one, with the disassembler that it needs; toolkits do not always."""
    home, triton = cuda_home(), importlib.util.find_spec("triton")
    places = [home / "bin" / "cuobjdump"] if home else []
    if triton and triton.origin:
        places.insert(0, Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    program = next((place for place in places if place.exists()), "cuobjdump")
    command = [program, option, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(library: Path) -> dict[tuple[str, str], list[str]]:
    """Of each architecture's kernels, in order, without operands."""
    found: dict[tuple[str, str], list[str]] = {}
    architecture, name = "", ""
    for line in cuobjdump("--dump-sass", library).splitlines():
        if header := re.search(r"arch = (\w+)", line):
            architecture = header[1]
        elif header := re.search(r"Function : (\w+)", line):
            name = header[1]
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            found.setdefault((architecture, name), []).append(code[1])
    return found


def accesses(code: list[str]) -> dict[str, int]:
    """Of global memory: by 16 bytes, by less; and how many loads at most come before a store."""
    of_memory = [c for c in code if c.startswith(("LDG", "STG"))]
    ahead = most = 0
    for instruction in of_memory:
        ahead = ahead + 1 if instruction.startswith("LDG") else 0
        most = max(most, ahead)
    wide = sum(".128" in c for c in of_memory)
    return {"wide": wide, "narrow": len(of_memory) - wide, "ahead": most}


def kernels(library: Path) -> list[dict[str, Any]]:
    """What each kernel was compiled to, by architecture."""
    code = instructions(library)
    text = cuobjdump("--dump-resource-usage", library)
    rows, architecture, name = [], "", ""
    for line in text.splitlines():
        if found := re.search(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\w+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            usage = {"registers": registers, "spills": stack + local, "shared": shared}
            usage |= accesses(code[architecture, name])
            rows.append({"kernel": readable(name), "arch": architecture, **usage})
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def readable(symbol: str) -> str:
    """resample_bwd<max_pool, bf16, 8> of a mangled name."""
    name = re.search(r"\d([a-z_]+)_kernelI", symbol)[1]
    mode, kind, width = re.match(
        r"(?:LN\w*?ModeE(\d)E)?(6__half|13__nv_bfloat16|[df])(?:Li(\d)E)?",
        symbol.split("_kernelI")[1],
    ).groups()
    kinds = {"6__half": "f16", "13__nv_bfloat16": "bf16", "d": "f64", "f": "f32"}
    return f"{name}<{', '.join(filter(None, (MODES.get(mode), kinds[kind], width)))}>"


def fault(row: dict[str, Any]) -> str:
    """What must not be."""
    if row["spills"]:
        return "spills"
    if row["registers"] > MOST_REGISTERS or row["shared"] > MOST_SHARED:
        return "too large for two blocks"
    if (
        re.search(r", [248]>$", row["kernel"])
        and not row["kernel"].endswith(" 1>")
        and row["narrow"] > 1
    ):
        return "vectors are split"
    return ""


@click.command()
@click.option("--arch", default="8.0;9.0a", show_default=True, help="As in TORCH_CUDA_ARCH_LIST.")
def main(arch: str) -> None:
    """Prints what each CUDA C++ kernel compiles to."""
    if cuda_home() is None:
        click.echo("CUDA C++ kernels: not compiled, there is no nvcc (set CUDA_HOME)")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = kernels(build(Path(folder), arch))
    click.echo(tabulate([{**row, "faults": fault(row)} for row in rows], headers="keys"))
    if any(map(fault, rows)):
        raise click.ClickException("some kernels have faults")


if __name__ == "__main__":
    main()
