"""``python -m benchmarks.gpu``: all that waits for a machine with an NVIDIA GPU.

Each stage takes minutes, writes DIR/STAGE.json, and prints a table. What fails, and what there is
no time for, is named in that file. Where torch and the tools are installed already, no other set-up
is needed than PYTHONPATH=src.
"""

import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tabulate import tabulate

from benchmarks import results
from benchmarks.contest import Setting

from . import checks, measurements, passes, workload
from .job import Budget, Job, TimeUp

STAGES: dict[str, Callable[[Job], Any]] = {
    "check": checks.check,
    "verify": checks.verify,
    "sanitize": checks.sanitize,
    "ceilings": measurements.ceilings,
    "passes": passes.measure,
    "operators": measurements.operators,
    "networks": measurements.networks,
    "memory": measurements.memory,
}


def run_stage(name: str, job: Job) -> bool:
    """Runs it in its time, writes what it found and prints it; whether all went well."""
    job.result |= {**results.context(job.setting.device), "stage": name}
    job.result["dtype"] = str(job.setting.dtype).removeprefix("torch.")
    try:
        with job.budget.enforced():
            STAGES[name](job)
    except (Exception, TimeUp) as error:
        traceback.print_exc()
        job.fail(name, error)
    job.save()
    if name in ("operators", "networks") and job.result["results"]:
        try:
            from benchmarks.plot import plot_contests

            plot_contests(job.path)
        except ImportError as error:
            click.echo(f"nothing is drawn: {error}", err=True)
    click.echo(tabulate(list(job.rows.values()), headers="keys", disable_numparse=True))
    counts = ", ".join(f"{len(job.result[key])} {key}" for key in ("failures", "skipped"))
    click.echo(f"\n{name}: {counts}; {job.path}")
    return not job.result["failures"]


@click.command()
@click.option("--stage", default="all", show_default=True,
              type=click.Choice([*STAGES, "all", "workload"]))  # fmt: skip
@click.option("--out", type=click.Path(file_okay=False, path_type=Path),
              help="Folder of the JSON files.  [default: benchmarks/results/<GPU>]")  # fmt: skip
@click.option("--minutes", default=9.0, show_default=True, help="Of each stage.")
@click.option(
    "--filter",
    "pattern",
    default="",
    help="Regular expression on group/name/phase/contender; also names the file.",
)
@click.option("--rounds", default=12, show_default=True, type=click.IntRange(1))
@click.option("--device", default="cuda", show_default=True, type=click.Choice(["cuda", "cpu"]),
              help="cpu: of the workload only.")  # fmt: skip
@click.option("--backend", default="triton", show_default=True, help="Of the workload.")
def main(
    stage: str,
    out: Path | None,
    minutes: float,
    pattern: str,
    rounds: int,
    device: str,
    backend: str,
) -> None:
    """Verifies and measures everything on this machine's GPU, in stages."""
    if stage == "workload" and device == "cpu":
        click.echo(workload.run(device, backend))
        return
    if device == "cpu" or not torch.cuda.is_available():
        found = "cpu was asked for" if device == "cpu" else "torch.cuda.is_available() is False"
        click.echo(f"stage {stage} needs an NVIDIA GPU: {found}", err=True)
        sys.exit(2)
    if stage == "workload":
        click.echo(workload.run(device, backend))
        return
    out = out or results.RESULTS / results.slug(torch.cuda.get_device_name())
    if stage == "all":  # each in a process of its own: some errors leave no GPU behind
        options = ["--out", str(out), "--minutes", str(minutes), "--filter", pattern]
        command = [sys.executable, "-m", "benchmarks.gpu", *options, "--rounds", str(rounds)]
        statuses = [subprocess.run([*command, "--stage", name]).returncode for name in STAGES]
        sys.exit(int(any(statuses)))
    torch.backends.cudnn.benchmark = True
    name = "-".join(filter(None, [stage, results.slug(pattern)]))
    job = Job(
        out / f"{name}.json",
        Setting("cuda", torch.bfloat16),
        Budget(60 * minutes),
        pattern,
        rounds,
    )
    sys.exit(not run_stage(stage, job))


if __name__ == "__main__":
    main()
