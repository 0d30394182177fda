"""What is available on this machine, which backend serves here, and why the others do not."""

import importlib.metadata
import itertools
import platform
from operator import itemgetter
from typing import Any

import torch

from . import __version__, backends, extension

OPERATORS = ("conv_norm_act", "conv_transpose", "resample", "head")
AROUND = "around PyTorch's convolutions"


def report() -> dict[str, Any]:
    """Versions, devices, and per device and dtype the backend that serves each operator."""
    build, why_not_compiled = extension.load()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda"] if gpus else [])]
    return {
        "fastunet": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": version("triton"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "compiled_kernels": build,
        "why_not_compiled": why_not_compiled,
        "why_no_cuda_kernels": extension.load_cuda(),
        "operators": [
            serving(device, dtype, operator)
            for device in devices
            for dtype in (torch.float32, torch.bfloat16)
            for operator in (*OPERATORS, AROUND)
        ],
    }


def serving(device: str, dtype: torch.dtype, operator: str) -> dict[str, Any]:
    """The backend that `auto` takes for an operator, and why not those before it; or for what is
    done around a convolution that is left to PyTorch."""
    x = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
    if operator == AROUND:
        name, why_not = backends.choose("conv_norm_act", x, lambda kernels: False)
    else:
        name, why_not = backends.choose(operator, x)
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "operator": operator,
        "backend": name,
        "why_not": why_not,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def render(found: dict[str, Any]) -> str:
    """The report as text."""
    cuda = f"CUDA {found['torch_cuda']}" if found["torch_cuda"] else "CPU build"
    lines = [
        f"fastunet {found['fastunet']}, Python {found['python']}",
        f"torch {found['torch']} ({cuda}), triton {found['triton'] or 'not installed'}",
        f"CPU {found['machine']} {found['cpu_capability']}, {found['threads']} threads",
        f"GPU {', '.join(found['gpus']) or 'none'}",
        f"CPU kernels: {found['compiled_kernels'] or found['why_not_compiled']}",
        f"CUDA kernels: {found['why_no_cuda_kernels'] or 'built'}",
        "operators:",
    ]
    alike = itemgetter("device", "dtype", "backend", "why_not")
    for (device, dtype, backend, why_not), rows in itertools.groupby(found["operators"], alike):
        served = ", ".join(row["operator"] for row in rows)
        lines.append(f"  {device} {dtype} {served}: {backend}")
        lines += [f"    not {name}: {why}" for name, why in why_not.items()]
    return "\n".join(lines)
