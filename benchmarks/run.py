"""``python -m benchmarks.run``: contenders take turns, medians, ratios, a table and a JSON file."""

import sys
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from . import peers as engines
from . import results
from .cases import matching
from .contest import (
    COMPILED,
    EAGER,
    FASTUNET,
    FROZEN,
    PEERS,
    POLICIES,
    Case,
    GateError,
    Setting,
    gate,
    memory,
    traffic,
)
from .timing import COVERAGE, interleave, summary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(case: Case, setting: Setting, rounds: int, min_time: float) -> dict[str, Any]:
    """The gate first; then time, then memory and FLOPs, whose tools would slow the work down."""
    contenders, errors = gate(case, setting)
    works = {name: c.timed or c.run for name, c in contenders.items()}
    measured = summary(interleave(works, rounds, min_time, setting.device), EAGER)
    bytes_of = {name: memory(c, setting.device) for name, c in contenders.items()}
    with FlopCounterMode(display=False) as counter:
        works[EAGER[0]]()
    return {
        "group": case.group,
        "name": case.name,
        "phase": case.phase,
        "flops": counter.get_total_flops(),
        "bytes": traffic(contenders[EAGER[0]]),
        "contenders": {
            name: {**measured[name], **bytes_of[name], "error": errors[name]} for name in contenders
        },
    }


def table(cases: list[dict[str, Any]]) -> str:
    def mib(nbytes: int | None) -> str:
        return "" if nbytes is None else f"{nbytes / 2**20:.1f}"

    rows: list[list[str]] = []
    for case in cases:
        title = f"{case['group'].removeprefix('operators/')}/{case['name']}/{case['phase']}"
        for name, c in case["contenders"].items():
            low, high = c["ratio_interval"]
            rows.append(
                [
                    title,
                    name,
                    f"{1e3 * c['median']:.2f}",
                    " - ".join(f"{1e3 * q:.2f}" for q in c["quartiles"]),
                    f"{c['ratio']:.2f}",
                    f"{low:.2f} - {high:.2f}",
                    f"{case['flops'] / c['median'] / 1e9:.0f}",
                    mib(c["peak_bytes"]),
                    mib(c["saved_bytes"]),
                ]
            )
            title = ""
    headers = ["case", "contender", "ms", "quartiles", "vs eager", f"{COVERAGE:.0%}"]
    headers += ["GFLOP/s", "peak MiB", "saved MiB"]
    align = ["left", "left", *["right"] * 7]
    return tabulate(rows, headers, colalign=align, disable_numparse=True)


@click.command()
@click.option("--filter", "pattern", default="", help="Regular expression on group/name/phase.")
@click.option("--rounds", default=12, show_default=True, type=click.IntRange(1))
@click.option("--min-time", default=0.05, show_default=True, help="Seconds per measurement.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; PyTorch's own choice if not.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="JSON file.")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="float32 on cpu, bfloat16 on cuda.")
@click.option("--compile/--no-compile", default=False, help="Also torch.compile of the networks.")
@click.option("--peers/--no-peers", default=False, help="Also other engines' inference, on CPUs.")
@click.option("--policies/--no-policies", default=False, help="Also FastUNet with checkpointing.")
@click.option("--plot", "plotted", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Measure nothing; draw this result file into docs/images.")  # fmt: skip
def main(
    pattern: str,
    rounds: int,
    min_time: float,
    threads: int | None,
    output: Path | None,
    device: str,
    dtype: str | None,
    compile: bool,
    peers: bool,
    policies: bool,
    plotted: Path | None,
) -> None:
    """Measures FastUNet against eager PyTorch (both memory formats) on this machine.

    Nothing is timed whose results are wrong; then no file is written and the exit status is 1.
    """
    if plotted is not None:
        from .plot import plot

        try:
            click.echo(plot(plotted, results.IMAGES))
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        return
    cases = matching(pattern)
    if not cases:
        raise click.BadParameter(f"no case matches {pattern!r}", param_hint="--filter")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("no CUDA GPU here", param_hint="--device")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    names = [*EAGER, *([COMPILED, FROZEN] if compile else []), FASTUNET]
    names += [f"{FASTUNET} auto {policy}" for policy in POLICIES] if policies else []
    absent = engines.missing() if peers else {}
    if peers:
        names += [f"{FASTUNET} auto graph", *(name for name in PEERS if name not in absent)]
        for name, why in absent.items():
            click.echo(f"not measured: {name} ({why})", err=True)
    setting = Setting(device, DTYPES[dtype], tuple(names))
    about = results.context(device)
    measured, wrong = [], 0
    for case in tqdm(cases, unit="case", disable=None):
        try:
            measured.append(measure(case, setting, rounds, min_time))
        except GateError as error:
            wrong += 1
            tqdm.write(f"wrong results: {error}", file=sys.stderr)
    click.echo(table(measured))
    if wrong:
        raise click.ClickException(f"{wrong} of {len(cases)} cases have wrong results")
    path = output or results.default_path(device, pattern)
    sampling = {"rounds": rounds, "min_time": min_time, "coverage": COVERAGE}
    results.write(
        path, {**about, "dtype": dtype, **sampling, "missing": absent, "results": measured}
    )
    click.echo(f"\n{path}")


if __name__ == "__main__":
    main()
