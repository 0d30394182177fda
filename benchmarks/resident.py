"""``python -m benchmarks.resident``: resident memory of a training step, of processes of their own.

What the allocator's figures leave out is in it: scratch of kernels and libraries, pages that are
kept, fragmentation. Peak of the process over what it had before the first step, model included.
"""

import subprocess
import sys
from pathlib import Path

import click
from tabulate import tabulate

from . import results
from .contest import CHANNELS_LAST, CONTIGUOUS, FASTUNET

STEPS = 3
STEP = """
import sys
import psutil
from benchmarks.contest import Setting
from benchmarks.network_cases import Network, data, make

base, batch, name, steps = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
work = make(Network(base, True, 256, 256, batch), "step", name, Setting())
data.cache_clear()
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = psutil.Process().memory_info().rss
for _ in range(steps):
    work.run()
peak = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 - before)
"""


def resident(base: int, batch: int, name: str) -> int:
    """Bytes over the process's own before its first step."""
    command = [sys.executable, "-c", STEP, str(base), str(batch), name, str(STEPS)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@click.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file.")
def main(output: Path | None) -> None:
    """Resident memory of a step, FastUNet and eager PyTorch in both memory formats (Linux)."""
    about, rows = results.context("cpu"), []
    for base, batch in ((64, 1), (32, 2), (16, 4)):
        found = {n: resident(base, batch, n) for n in (CONTIGUOUS, CHANNELS_LAST, FASTUNET)}
        least = min(found[CONTIGUOUS], found[CHANNELS_LAST])
        rows.append({"base": base, "batch": batch, **found, "ratio": found[FASTUNET] / least})
    click.echo(tabulate(rows, headers="keys"))
    path = output or results.default_path("cpu", "resident")
    results.write(path, {**about, "steps": STEPS, "results": rows})
    click.echo(f"\n{path}")


if __name__ == "__main__":
    main()
