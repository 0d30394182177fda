"""What was found out about a GPU and holds until the GPU, the versions or the kernels change."""

import functools
import json
import os
import tempfile
from pathlib import Path

import torch


@functools.cache
def fingerprint(device: torch.device, kernels: str) -> str:
    """The GPU model, torch's version, and the kernels' version."""
    name = device.type
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    return f"{name} torch {torch.__version__} {kernels}"


def file(name: str) -> Path:
    """In FASTUNET_CACHE, or ``fastunet`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FASTUNET_CACHE") or Path(home) / "fastunet") / f"{name}.json"


def read(path: Path) -> dict[str, str]:
    """Empty where there is no such file, or none of ours."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def save(name: str, entries: dict[str, str]) -> None:
    """Adds entries to a file, wholly or not at all; without a place for it, they last as long as
    the process."""
    path = file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as temporary:
            json.dump(read(path) | entries, temporary, indent=1, sort_keys=True)
        os.replace(temporary.name, path)
    except OSError:
        pass
