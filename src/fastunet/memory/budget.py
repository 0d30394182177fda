"""How much memory there is: sizes as people write them, and what a device has left."""

import math
import re
from pathlib import Path

import psutil
import torch

from fastunet.maps import kept_map_memory

UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", 1)},
}


def parse_size(size: int | float | str) -> int:
    """Bytes, of a number or of a text such as ``"6GiB"``, ``"500 MB"`` or ``"1.5 GiB"``.

    Raises:
        ValueError: where it is neither, or not positive.
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", size)
        units = {name.lower(): unit for name, unit in UNITS.items()}
        if found is None or found[2].lower() not in units:
            raise ValueError(f"a size must be bytes or like '6GiB' or '500 MB', got {size!r}")
        size = float(found[1]) * units[found[2].lower()]
    nbytes = float(size)
    if not 0 < nbytes < math.inf:
        raise ValueError(f"a size must be more than 0 bytes, got {size!r}")
    return int(nbytes)


def format_size(nbytes: float) -> str:
    """MiB, or from 10 GiB on GiB."""
    if nbytes >= 10 * 2**30:
        return f"{nbytes / 2**30:.2f} GiB"
    return f"{nbytes / 2**20:.1f} MiB"


def available(device: torch.device | str) -> int:
    """Bytes that this process can still get on a device, within every limit that it is under.

    On CUDA what the driver has and what PyTorch's cache holds unused, within
    ``set_per_process_memory_fraction``. On the CPU the system's memory without swap, within the
    limits of the process (``ulimit -v`` and ``-d``) and of its control group (containers), and
    what FastUNet keeps for its next maps.

    Raises:
        ValueError: for a device that is neither a CPU nor a CUDA device.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        return max(0, min(free + reserved - used, int(share * total) - used))
    if device.type != "cpu":
        raise ValueError(f"device must be a cpu or cuda device, got {str(device)!r}")
    process = psutil.Process()
    left = [psutil.virtual_memory().available, *control_group()]
    if hasattr(process, "rlimit"):
        used_by = process.memory_info()
        for limit, used in (
            (psutil.RLIMIT_AS, used_by.vms),
            (psutil.RLIMIT_DATA, used_by.data),
        ):
            soft, _ = process.rlimit(limit)
            if soft != psutil.RLIM_INFINITY:
                left.append(soft - used)
    return max(0, min(left) + kept_map_memory())


def control_group(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left in the process's control group, of version 2 or 1; nothing without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return [int((root / limit).read_text()) - int((root / used).read_text())]
        except (OSError, ValueError):  # not there, or "max"
            continue
    return []
