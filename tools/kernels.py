"""Compiles every Triton kernel that a U-Net launches, for GPUs that are not there.

The model's forward and backward run on meta tensors; each launch is recorded and compiled for the
architectures asked for. Printed: registers, spilled bytes, shared memory, and the instructions that
the inner loops are meant to have.
"""

import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
import triton
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from fastunet import FastUNet, backends
from fastunet import triton as kernels
from fastunet.triton import convolution, selection

OPERATORS = {
    name: importlib.import_module(f"fastunet.ops.{name}")
    for name in ("conv_norm_act", "conv_transpose", "resample", "head")
}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Bytes of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Bytes of spills of a shipped kernel. Triton 3.8's ptxas gives up two registers to be within a
# number that lets one more block onto a multiprocessor.
SPILLS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 0
# What to count, in PTX.
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "cp.async": r"\bcp\.async\.c[ag]",
    "ld.128": r"\bld\.global[.\w]*\.v(4\.b32|2\.b64)",
    "st.128": r"\bst\.global[.\w]*\.v(4\.b32|2\.b64)",
}


class Launch(NamedTuple):
    """One kernel, and the arguments of one call of it."""

    kernel: JITFunction
    arguments: tuple
    options: dict[str, Any]


class Recorder(TorchDispatchMode):
    """Runs the operators' Triton implementations on meta tensors; no kernel is launched."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace != "fastunet":
            return func(*args, **(kwargs or {}))
        operator = next(o for o in OPERATORS if name.startswith(o))
        variant = name.removeprefix(operator)  # none, _bwd or _folded
        return getattr(OPERATORS[operator], f"implementation{variant}")(*args)


@contextlib.contextmanager
def recording(found: list[Launch], dtype: torch.dtype, sm: int) -> Iterator[None]:
    """Collects launches for an architecture, with maps of this dtype (autocast knows no meta
    tensors)."""

    def run(self, *args, grid, warmup, **kwargs):
        found.append(Launch(self, args, kwargs))

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", run))
        stack.enter_context(patch.object(backends, "select", lambda *_: kernels))
        capability = divmod(sm, 10)
        stack.enter_context(patch.object(convolution, "capability", lambda device: capability))
        stack.enter_context(patch.object(selection, "measured", lambda: {}))
        for module in OPERATORS.values():
            if hasattr(module, "compute_dtype"):
                stack.enter_context(patch.object(module, "compute_dtype", lambda *_: dtype))
        stack.enter_context(Recorder())
        yield


def launches(
    model: FastUNet, shape: tuple[int, ...], dtype: torch.dtype, sm: int, train: bool
) -> list[Launch]:
    """What a training step, or inference, launches."""
    found: list[Launch] = []
    model = model.to("meta").train(train)
    x = torch.empty(shape, device="meta", memory_format=torch.channels_last)
    with recording(found, dtype, sm):
        if train:
            model(x).sum().backward()
        else:
            with torch.no_grad():
                model(x)
    return found


@contextlib.contextmanager
def exactly(way: str) -> Iterator[None]:
    """fp32 products in fp32, by these kernels, as tests ask for them."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        with selection.forced(way):
            yield
    finally:
        convolutions.fp32_precision = before


def specialized(launch: Launch, target: GPUTarget) -> tuple[str, ASTSource, dict[str, Any]]:
    """A key of what decides over the compiled code, the source, and compile options."""
    fn, backend = launch.kernel, CUDABackend(target)
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = binder(*launch.arguments, **launch.options)
    key = compute_cache_key({}, specialization, options)
    options, signature, constants, attributes = fn._pack_args(
        backend, launch.options, bound, specialization, options
    )
    source = ASTSource(fn, signature, constants, attributes)
    return f"{fn.__name__} {key}", source, options.__dict__


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """Compiles a launch and describes the result."""
    target = GPUTarget("cuda", capability, 32)
    _, source, options = specialized(launch, target)
    kernel = triton.compile(source, target=target, options=options)
    ptx = kernel.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__.removesuffix("_kernel"),
        "configuration": {
            name: value
            for name, value in launch.options.items()
            if name.isupper() or name.startswith("num_")
        },
        "sm": capability,
        **resources(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "notices": notices(ptx, kernel.metadata.target.arch),
        "pipelined": pipelined(kernel.asm["ttgir"]),
        **{name: len(re.findall(regex, ptx)) for name, regex in INSTRUCTIONS.items()},
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and its bytes of stack and local memory (spills), from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(usage["REG"]), "spills": int(usage["STACK"]) + int(usage["LOCAL"])}


def notices(ptx: str, capability: int) -> list[str]:
    """What ptxas remarks on, such as products that it had to serialise (C75xx)."""
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [BIN / "ptxas", f"-arch=sm_{capability}{suffix}", file, "-o", f"{file}.cubin"]
        text = subprocess.run([*command, "-v"], capture_output=True, text=True).stderr
    return sorted(set(re.findall(r"\(C\d+\)[^\n]*", text)))


def pipelined(ttgir: str) -> bool:
    """Whether products are left in flight, or loads run ahead, through a loop."""
    waits = re.findall(r"(?:warp_group_dot_wait|async_wait)[^\n]*\{(?:pendings|num) = (\d+)", ttgir)
    # The TMA unit's loads for tcgen05 are waited for by barriers: several tiles tell of them.
    stages = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<\d+x\d+x\d+x", ttgir)
    return any(int(n) > 0 for n in waits) or ("tc_gen5_mma" in ttgir and bool(stages))


def unique(found: list[Launch], capability: int) -> list[Launch]:
    target = GPUTarget("cuda", capability, 32)
    return list({specialized(launch, target)[0]: launch for launch in found}.values())


def faults(row: dict[str, Any]) -> list[str]:
    """What a shipped kernel may not have."""
    found = []
    # Exact products, of fp32 without tensor cores, serve tests: a few bytes cost them nothing.
    exact = row["configuration"].get("PRECISION") == "ieee"
    if row["spills"] > (64 if exact else SPILLS):
        found.append(f"{row['spills']} bytes of spills")
    if row["shared"] > SHARED[row["sm"]]:
        found.append(f"{row['shared']} bytes of shared memory, at most {SHARED[row['sm']]}")
    # Products that wait for each other matter little where few outputs share what is read.
    if row["notices"] and min(row["configuration"].get(n, 64) for n in ("BN", "BT", "BC")) > 32:
        found.append("; ".join(row["notices"]))
    if row["kernel"] in ("convolution", "weight_grad") and not exact:
        if not any(row[products] for products in ("wgmma", "tcgen05", "mma")):
            found.append("no tensor-core products")
        if not row["pipelined"]:
            found.append("loads do not run ahead")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["registers", "spills", "shared", "pipelined", *INSTRUCTIONS]
    lines = [
        [
            row["kernel"],
            " ".join(f"{k}={v}" for k, v in row["configuration"].items()),
            row["sm"],
            *(row[c] for c in columns),
            "; ".join(faults(row)),
        ]
        for row in rows
    ]
    return tabulate(lines, ["kernel", "configuration", "sm", *columns, "faults"])


@click.command()
@click.option("--base", default=64, show_default=True, help="Channels of the first level.")
@click.option("--depth", default=4, show_default=True)
@click.option("--size", default=512, show_default=True, help="Height and width of the image.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(list(DTYPES)))
@click.option("--ieee", is_flag=True, help="Without TF32, of float32.")
@click.option("--sm", multiple=True, default=[80, 90], show_default=True, type=int)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path))
def main(
    base: int,
    depth: int,
    size: int,
    dtype: str,
    ieee: bool,
    sm: tuple[int, ...],
    path: Path | None,
):
    """Prints what each kernel of a training step and of inference compiles to."""
    if ieee and dtype != "float32":
        raise click.BadParameter(f"the dtype must be float32, got {dtype}", param_hint="--ieee")
    ways: Sequence[Callable[[], contextlib.AbstractContextManager]] = [contextlib.nullcontext]
    if ieee:
        chosen = (selection.ON_LOAD, selection.MATERIALISED)
        ways = [functools.partial(exactly, way) for way in chosen]
    work: list[tuple[Launch, int]] = []
    for capability in sm:
        found: list[Launch] = []
        for bilinear, train, way in itertools.product((True, False), (True, False), ways):
            model = FastUNet(3, 2, bilinear, base_channels=base, depth=depth)
            with way():
                found += launches(model, (2, 3, size, size), DTYPES[dtype], capability, train)
        work += [(launch, capability) for launch in unique(found, capability)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rows = list(tqdm(pool.map(lambda w: compiled(*w), work), total=len(work), disable=None))
    rows.sort(key=lambda row: (row["kernel"], row["sm"], str(row["configuration"])))
    click.echo(table(rows))
    if path is not None:
        path.write_text(json.dumps(rows, indent=1))
    if any(map(faults, rows)):
        raise click.ClickException("some kernels have faults")


if __name__ == "__main__":
    main()
