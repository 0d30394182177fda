"""The stages that run other programs: the tests, and the operators under compute-sanitizer."""

import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.results import ROOT
from fastunet import backends, self_check

from .job import Job

TESTS = ("tests/test_gpu.py", "tests/ops/test_triton.py", "tests/ops/test_cuda.py")
BACKENDS = ("triton", "cuda")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
WORKLOAD = (sys.executable, "-m", "benchmarks.gpu", "--stage", "workload")


class Done(NamedTuple):
    """status: None where its time ran out."""

    status: int | None
    output: str


def execute(command: list[str], timeout: float, **environment: str) -> Done:
    """Runs it in the repository's root, for at most ``timeout`` seconds; leaves nothing running."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
        return Done(process.returncode, output)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGINT)  # pytest still writes its report
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return Done(None, process.communicate()[0])


def junit(report: str) -> dict[str, Any]:
    """Counts of a junit report, the failures' names and messages, and why tests were skipped."""
    counts = dict.fromkeys(("passed", "failure", "error", "skipped"), 0)
    failures: list[tuple[str, str]] = []
    skips = Counter[str]()
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        ends = [child for child in case if child.tag in counts] or [ElementTree.Element("passed")]
        for end in ends:
            counts[end.tag] += 1
            if end.tag in ("failure", "error"):
                failures.append((name, (end.get("message") or "")[:500]))
            elif end.tag == "skipped":
                skips[end.get("message") or ""] += 1
    return {"counts": counts, "failures": failures, "skips": dict(skips)}


def check(job: Job, tests: tuple[str, ...] = TESTS, marker: str = "gpu and not slow") -> None:
    """The tests that need a GPU; in several processes, as Triton compiles, where xdist is there.

    marker: instead of pyproject.toml's; those marked slow compile for hours.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", marker, f"--junitxml={report}", *tests]
        if importlib.util.find_spec("xdist") and (workers := (os.cpu_count() or 1) // 2) > 1:
            command += ["-n", str(min(8, workers))]
        done = execute(command, job.budget.left() - 20)
        found = junit(report.read_text()) if report.exists() else None
    job.result |= {"status": done.status, "output": done.output[-4000:]}
    if found is not None:
        job.result |= {"counts": found["counts"], "skips": found["skips"]}
        job.rows["tests"] = found["counts"]
        for failure in found["failures"]:
            job.fail(*failure)
    if done.status is None:
        job.fail("pytest", "its time ran out; the tests that it interrupted count as passed")
    elif found is None or (done.status != 0 and not found["failures"]):
        job.fail("pytest", f"status {done.status}\n{done.output}")


def verify(job: Job) -> None:
    """The self-checks' verdicts, as src/fastunet/verified.json keeps them: those alone that will
    be the same again."""
    verdicts = job.result["verdicts"] = {}
    device = torch.device(job.setting.device)
    for backend, dtype, operator in itertools.product(
        BACKENDS, self_check.TOLERANCE, self_check.CASES
    ):
        name = f"{backend} {operator} {dtype}"
        if why := backends.module(backend).why_not(torch.empty(0, dtype=dtype, device=device)):
            job.rows[name] = {"self-check": name, "verdict": f"cannot serve: {why}"}
            continue

        def work(
            name: str = name, backend: str = backend, dtype: torch.dtype = dtype, op: str = operator
        ) -> None:
            why, lasting = self_check.check(backend, op, dtype, device)
            job.rows[name] = {"self-check": name, "verdict": why or "passed"}
            if not lasting:
                raise RuntimeError(why)
            verdicts[self_check.key_of(backend, op, dtype, device)] = why
            if why:
                job.fail(name, why)

        job.do(name, f"{backend} {operator}", work)


def sanitizer_report(output: str) -> dict[str, Any]:
    """errors: None where there is no summary. kernels: how often each was complained about."""
    counts = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    lines = [line for line in output.splitlines() if line.startswith("===")]
    places = re.findall(r" at (?:0x\w+ in )?(?:void )?([A-Za-z_][\w:]*)", "\n".join(lines))
    errors = sum(int(a or b) for a, b in counts) if counts else None
    return {"errors": errors, "kernels": dict(Counter(places)), "output": lines[:100]}


def find_sanitizer() -> str | None:
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=toolkit)


def sanitize(job: Job) -> None:
    """Every operator once under each tool, every tensor in an allocation of its own."""
    tool = job.result["compute-sanitizer"] = find_sanitizer()
    if tool is None:
        job.rows["none"] = {"compute-sanitizer": "neither on PATH nor in CUDA_HOME/bin"}
        return
    todo = [(b, t) for b in BACKENDS for t in SANITIZERS if re.search(job.pattern, f"{t} {b}")]
    for backend in dict.fromkeys(backend for backend, _ in todo):
        workload = [*WORKLOAD, "--backend", backend]
        done = execute(workload, job.budget.left() - 20)  # also compiles the kernels
        if done.status != 0:
            job.fail(f"the workload of {backend} by itself", done.output)
            continue
        for name in [name for other, name in todo if other == backend]:
            share = job.budget.left() / (len(todo) - len(job.result["results"]))
            watch(job, tool, name, workload, max(5, share - 10))


def watch(job: Job, tool: str, name: str, workload: list[str], seconds: float) -> None:
    """The workload under one tool."""
    command = [tool, "--tool", name, "--target-processes", "application-only", *workload]
    done = execute(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    about = {"tool": name, "backend": workload[-1], "status": done.status}
    found = {**about, **sanitizer_report(done.output)}
    job.result["results"].append(found)
    what = f"{name} {workload[-1]}"
    job.rows[what] = {key: found[key] for key in (*about, "errors", "kernels")}
    if done.status != 0 or found["errors"] != 0:
        job.fail(what, f"{found['errors']} errors, status {done.status}\n{done.output[-300:]}")
    job.save()
