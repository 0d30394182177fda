"""``python -m benchmarks.sizes``: does FastUNet's time per pixel stay what it is at other sizes?

Odd and large images, batches and widths between the powers of two, against a 256x256 image: of the
same width, or for widths between by what the two neighbours make of it; and two threads against
one, beside what a matrix product gains by them, as two processors may be one core's. Interleaved;
writes a JSON file into ``results/``.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from tqdm import tqdm

from . import results
from .contest import FASTUNET, Setting
from .network_cases import Network, make
from .timing import interleave, quantile

SIZES = ((197, 233), (512, 512), (640, 959))
BATCHES = (1, 8)
BETWEEN = {24: (16, 32), 48: (32, 64)}  # widths, and their neighbours


def square(base: int) -> Network:
    """What the others are compared with."""
    return Network(base, True, 256, 256)


def networks(bases: tuple[int, ...]) -> list[Network]:
    sizes = [(256, 256, 1), *((h, w, n) for n in BATCHES for h, w in SIZES), (256, 256, 8)]
    return [Network(base, True, h, w, n) for base in bases for h, w, n in sizes]


def pixels(network: Network) -> int:
    return network.batch * network.height * network.width


def expected(base: int, per_pixel: dict[int, float]) -> float:
    """Seconds per pixel of a width: measured, or between its neighbours in the same proportion as
    its products, which grow with the square."""
    if base not in BETWEEN:
        return per_pixel[base]
    low, high = BETWEEN[base]
    share = (base**2 - low**2) / (high**2 - low**2)
    return per_pixel[low] + share * (per_pixel[high] - per_pixel[low])


def squares(bases: tuple[int, ...], phase: str, rounds: int) -> dict[int, float]:
    """Seconds per pixel of a 256x256 image, all widths in turn."""
    works = {str(base): make(square(base), phase, FASTUNET, Setting()).run for base in bases}
    times = interleave(works, 3 * rounds, 0.05, "cpu")
    return {b: quantile(times[str(b)], 0.5) / pixels(square(b)) for b in bases}


def measure(cases: list[Network], phase: str, rounds: int) -> dict[Network, dict[str, float]]:
    """Medians of seconds, by threads: each case beside the 256x256 image of its width; of single
    images in four times the rounds."""
    found: dict[Network, dict[str, float]] = {}
    for network in tqdm(cases, unit="case", desc=phase, disable=None):
        basis = square(network.base)
        works: dict[str, Callable[[], object]] = {
            "network": make(network, phase, FASTUNET, Setting()).run,
            "basis": make(basis, phase, FASTUNET, Setting()).run,
        }
        if network == basis and torch.get_num_threads() > 1:
            works["product"] = functools.partial(torch.mm, *torch.randn(2, 512, 512))
            for name in ("network", "product"):
                works[f"{name}, one thread"] = functools.partial(on_one_thread, works[name])
        turns = rounds if network.batch > 1 else 4 * rounds
        times = interleave(works, turns, 0.05, "cpu")
        found[network] = {name: quantile(values, 0.5) for name, values in times.items()}
    return found


def on_one_thread(work: Callable[[], object]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work()
    torch.set_num_threads(threads)


def speedup(times: dict[str, float], name: str) -> float | None:
    """Of a work by the threads, where it was measured on one as well."""
    one = times.get(f"{name}, one thread")
    return one / times[name] if one else None


def rows(
    found: dict[Network, dict[str, float]], of_widths: dict[int, float], phase: str
) -> list[dict[str, Any]]:
    """of_widths: seconds per pixel of a 256x256 image."""
    table = []
    for network, times in found.items():
        per_pixel = times["network"] / pixels(network)
        of_basis = times["basis"] / pixels(square(network.base))
        of_width = of_widths[network.base] / expected(network.base, of_widths)
        table.append(
            {
                "name": network.name,
                "phase": phase,
                "seconds": times["network"],
                "ns_per_pixel": per_pixel * 1e9,
                "ratio": per_pixel / of_basis * of_width,
                "speedup_of_threads": speedup(times, "network"),
                "of_a_product": speedup(times, "product"),
            }
        )
    return table


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--bases", default="16,24,32,48,64", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file.")
def main(rounds: int, bases: str, output: Path | None) -> None:
    """Time per pixel at other sizes, over that at 256x256 (1: none is lost)."""
    about = results.context("cpu")
    widths = tuple(int(base) for base in bases.split(","))
    cases = networks(widths)
    table = []
    for phase in ("forward", "step"):
        table += rows(measure(cases, phase, rounds), squares(widths, phase, rounds), phase)
    click.echo(tabulate(table, headers="keys", floatfmt=".3g"))
    path = output or results.default_path("cpu", "sizes")
    results.write(path, {**about, "dtype": "float32", "rounds": rounds, "results": table})
    click.echo(f"\n{path}")


if __name__ == "__main__":
    main()
