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


GROUPS = Path("/sys/fs/cgroup")
# Of version 2 and of version 1: limit, what is used, and in memory.stat what of that is page cache
# that nobody has used lately, which is given back when memory is short.
FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def control_group(root: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in the process's control group and in each around it that has a limit.

    own: names the group, "hierarchy:controllers:path" in each line; in a container the path may be
    one of outside, and the container's own group is at the root.
    """
    left = []
    lines = own.read_text().splitlines() if own.exists() else []
    paths = [line.split(":", 2)[1:] for line in lines if line.count(":") >= 2]
    for controller, names in FILES.items():
        base = root / controller
        folders = {base}
        for controllers, path in paths:
            if controller in controllers.split(",") and ".." not in path:
                group = base / path.lstrip("/")
                folders |= {group, *(p for p in group.parents if base in p.parents)}
        left += [bytes_left(folder, *names) for folder in folders]
    return [count for count in left if count is not None]


def bytes_left(group: Path, limit: str, used: str, spare: str) -> int | None:
    try:
        found = int((group / limit).read_text()) - int((group / used).read_text())
        stat = (group / "memory.stat").read_text() if (group / "memory.stat").exists() else ""
        return found + sum(int(n) for n in re.findall(rf"^{spare} (\d+)$", stat, re.MULTILINE))
    except (OSError, ValueError):  # not there, or "max"
        return None
