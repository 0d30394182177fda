"""What a result file says besides the numbers, and how it is written: wholly or not at all."""

import json
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

import fastunet
from fastunet import doctor, extension
from fastunet.files import whole_file

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def hardware(device: str) -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def versions() -> dict[str, Any]:
    build, why = extension.load()
    return {
        "fastunet": fastunet.__version__,
        "cpu_kernels": build or why,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": doctor.version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "system": platform.platform(),
    }


def git_state() -> dict[str, Any]:
    """commit, and whether files other than results differ from it; None outside a repository,
    where COMMIT in the environment can name it."""

    def git(*args: str) -> str | None:
        if shutil.which("git") is None:
            return None
        run = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    generated = [f":!{path.relative_to(ROOT)}" for path in (RESULTS, IMAGES)]
    changed = git("status", "--porcelain", "--", ".", *generated)
    dirty = None if changed is None else bool(changed)
    commit = git("rev-parse", "--verify", "HEAD") or os.environ.get("COMMIT")
    return {"commit": commit, "dirty": dirty}


def context(device: str) -> dict[str, Any]:
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
        "git": git_state(),
        "threads": torch.get_num_threads(),
        "load_average_before": psutil.getloadavg(),
    }


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def default_path(device: str, pattern: str) -> Path:
    """Such as results/cpu-networks-<cpu model>.json: a filtered run does not replace a full one."""
    model = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    return RESULTS / f"{device}-{slug(pattern) or 'all'}-{slug(model)}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
