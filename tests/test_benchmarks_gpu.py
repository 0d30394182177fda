"""The stages for a GPU, as far as a CPU can run them: on tiny cases, in float32."""

import contextlib
import functools
import gc
import itertools
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks import network_cases
from benchmarks.contest import BUDGETED, CHANNELS_LAST, COMPILED, EAGER, FASTUNET, Setting
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks, measurements, workload
from benchmarks.gpu.job import EXPECTED, Budget, Job
from benchmarks.network_cases import Network, network_case
from benchmarks.operator_cases import Shapes
from benchmarks.timing import quantile
from fastunet import backends, extension, self_check

REFERENCE = measurements.REFERENCE
SIZES = {"n": 8, "copied": 4096}
TINY = Network(4, True, 49, 67, batch=2)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path / "stage.json", Setting(), Budget(100), rounds=1, min_time=0)


def run(monkeypatch, job, stage, **options):
    """Whether the stage went well, and its file."""
    with monkeypatch.context() as patch:
        patch.setitem(gpu.STAGES, stage, functools.partial(gpu.STAGES[stage], **options))
        good = gpu.run_stage(stage, job)
    found = json.loads(job.path.read_text())
    assert {"hardware", "versions", "git", "stage", "dtype", "failures", "skipped"} <= set(found)
    return good, found


@pytest.mark.parametrize("options", [[], ["--stage", "check"], ["--stage", "workload"]], ids=str)
def test_without_a_gpu(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(gpu.main, options)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "needs an NVIDIA GPU: torch.cuda.is_available() is False" in result.output


def test_workload():
    options = ["--stage", "workload", "--device", "cpu", "--backend", "reference"]
    result = CliRunner().invoke(gpu.main, options, catch_exceptions=False)
    assert result.exit_code == 0
    assert workload.run("cpu", "reference") == {"bfloat16": 46, "float16": 46}
    assert "{'bfloat16': 46, 'float16': 46}" in result.output


def test_workload_finds_what_is_not_finite(monkeypatch):
    monkeypatch.setattr(workload, "head", lambda x, *_: x.y / 0)
    with pytest.raises(RuntimeError, match=r"head, 5 -> 11 .*bfloat16: the result must"):
        workload.run("cpu", "reference")


@pytest.fixture
def no_gc(monkeypatch):
    """A large process takes a while for it, between works that do nothing."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def test_verify(monkeypatch, job, no_gc):
    """Each backend's, operator's and dtype's verdict, under the key by which it is looked up; none
    of what failed."""
    wrong = "cuda", "head", torch.float16
    failing = "triton", "head", torch.float32

    def check(*what):
        why = {wrong: "wrong sums", failing: "no memory"}.get(what[:3], "")
        return why, why != "no memory"

    def why_not(x):
        return "no such dtype" if x.dtype == torch.float64 else ""

    monkeypatch.setattr(self_check, "check", check)
    for backend in ("triton", "cuda"):
        monkeypatch.setattr(backends.module(backend), "why_not", why_not)
    good, found = run(monkeypatch, job, "verify")
    assert not good
    assert [tuple(f.values()) for f in found["failures"]] == [
        ("triton head torch.float32", "RuntimeError: no memory"),
        ("cuda head torch.float16", "wrong sums"),
    ]
    device = torch.device("cpu")
    keys = {
        self_check.key_of(*what, device): check(*what, device)[0]
        for what in itertools.product(("triton", "cuda"), self_check.CASES, self_check.TOLERANCE)
        if what[2] != torch.float64 and what != failing
    }
    assert found["verdicts"] == keys


def test_verify_in_time(monkeypatch, job, no_gc):
    """What there is no time for has no verdict, and is named."""
    done = []

    def check(backend, operator, dtype, device):
        done.append(operator)
        job.budget.end = job.budget.clock() - 1
        return "", True

    monkeypatch.setattr(self_check, "check", check)
    for backend in ("triton", "cuda"):
        monkeypatch.setattr(backends.module(backend), "why_not", lambda x: "")
    good, found = run(monkeypatch, job, "verify")
    assert good
    assert len(done) == len(found["verdicts"]) == 1
    assert len(found["skipped"]) == 2 * len(self_check.CASES) * len(self_check.TOLERANCE) - 1


def test_time_is_up(monkeypatch, job):
    """Whoever goes on after any failure does not go on after this one."""
    job.budget.end = job.budget.clock() + 20

    def stubborn():
        job.budget.end = job.budget.clock() + 0.1
        with job.budget.enforced():  # instead of the stage's
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(10)

    def stage(job):
        job.do("first", "kind", stubborn)
        job.do("second", "kind", stubborn)

    monkeypatch.setitem(gpu.STAGES, "ceilings", stage)
    good, found = run(monkeypatch, job, "ceilings")
    assert not good
    assert [tuple(f.values()) for f in found["failures"]] == [
        ("first", "TimeUp: the stage's time is up")
    ]
    assert [skip["what"] for skip in found["skipped"]] == ["second"]
    monkeypatch.setitem(gpu.STAGES, "ceilings", lambda job: stubborn())
    _, found = run(monkeypatch, job, "ceilings")
    assert found["failures"][-1]["what"] == "ceilings"


def test_budget():
    now = [0.0]
    budget = Budget(200, lambda: now[0])
    assert budget.allows("a")
    with budget.spend("a"):
        now[0] = 90
    assert budget.left() == 110
    assert budget.allows("a")  # 1.2 * 90
    now[0] = 100
    assert not budget.allows("a")
    assert budget.allows(COMPILED)
    assert not budget.allows("compile max-autotune")
    assert EXPECTED["compile max-autotune"] > 100


def test_job_skips_notes_failures_and_saves(job):
    def fail():
        raise ValueError("no good")

    done = []
    job.pattern = "^[ab]"
    for name in ("a", "b", "c"):
        job.do(name, "kind", fail if name == "a" else lambda name=name: done.append(name))
    job.budget.end = job.budget.clock() + 3
    job.do("b again", "kind of its own", fail)
    assert done == ["b"]
    found = json.loads(job.path.read_text())
    assert found["failures"] == [{"what": "a", "error": "ValueError: no good"}]
    assert [skip["what"] for skip in found["skipped"]] == ["b again"]


REPORT = """<testsuites><testsuite tests="4">
<testcase classname="tests.test_gpu" name="test_a" time="1"/>
<testcase classname="tests.test_gpu" name="test_b[x]"><failure message="assert 1 == 2">..</failure>
</testcase>
<testcase classname="tests.test_gpu" name="test_c"><error message="boom"/></testcase>
<testcase classname="tests.test_gpu" name="test_d"><skipped message="needs a GPU"/></testcase>
</testsuite></testsuites>"""


def test_junit():
    assert checks.junit(REPORT) == {
        "counts": {"passed": 1, "failure": 1, "error": 1, "skipped": 1},
        "failures": [
            ("tests.test_gpu::test_b[x]", "assert 1 == 2"),
            ("tests.test_gpu::test_c", "boom"),
        ],
        "skips": {"needs a GPU": 1},
    }


def test_check(monkeypatch, job, tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_good(): pass\ndef test_bad(): assert False\n"
        "@pytest.mark.slow\ndef test_of_the_whole_matrix(): assert False\n"
    )
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    good, found = run(monkeypatch, job, "check", tests=(str(path),))
    assert not good
    assert found["counts"] == {"passed": 1, "failure": 1, "error": 0, "skipped": 0}
    (failure,) = found["failures"]
    assert failure["what"].endswith("::test_bad")


@pytest.mark.slow
def test_check_out_of_time(monkeypatch, job, tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text("import time\ndef test_good(): pass\ndef test_slow(): time.sleep(60)\n")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(job.budget, "left", lambda: 23)
    _, found = run(monkeypatch, job, "check", tests=(str(path),), marker="not gpu")
    assert found["counts"]["passed"] >= 1
    assert "its time ran out" in found["failures"][-1]["error"]


SANITIZED = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at convolution_kernel+0x2d0 in convolution.py:88
=========     Address 0x7f21 is out of bounds
{'bfloat16': 42}
========= ERROR SUMMARY: 1 error
"""


def test_sanitizer_report():
    found = checks.sanitizer_report(SANITIZED)
    assert found["errors"] == 1
    assert found["kernels"] == {"convolution_kernel": 1}
    assert len(found["output"]) == 5
    races = "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)"
    assert checks.sanitizer_report(races)["errors"] == 3
    assert checks.sanitizer_report("killed")["errors"] is None


def test_sanitize(monkeypatch, job, tmp_path):
    monkeypatch.setattr(checks, "find_sanitizer", lambda: None)
    good, found = run(monkeypatch, job, "sanitize")
    assert good
    assert found["compute-sanitizer"] is None
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        "#!/bin/sh\n[ $2 = racecheck ] && echo '=== RACECHECK SUMMARY: 2 hazards displayed' || "
        "echo '=== ERROR SUMMARY: 0 errors'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(checks, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr(checks, "WORKLOAD", ("true",))
    good, found = run(monkeypatch, job, "sanitize")
    assert not good
    assert [one["errors"] for one in found["results"]] == [0, 2, 0] * 2  # of each backend


def test_ceilings(monkeypatch, job, capsys):
    good, found = run(monkeypatch, job, "ceilings", **SIZES)
    assert good
    assert set(found["ceilings"]) == {"bfloat16", "float16", "tfloat32", "copy"}
    assert all(value > 0 for value in found["ceilings"].values())
    assert "copy, TB/s" in capsys.readouterr().out


@pytest.mark.slow
def test_passes(monkeypatch, job):
    """Each pass of each backend that is right, with its rate."""
    if extension.load_cuda("cuda_host"):
        pytest.skip(extension.load_cuda("cuda_host"))
    cuda = backends.module("cuda")
    normalization = cuda.normalization

    def wrong(y, *args):
        return tuple(2 * t for t in normalization(y, *args))

    monkeypatch.setattr(cuda, "normalization", wrong)
    names = ("cuda", "reference")
    good, found = run(monkeypatch, job, "passes", shape=(2, 8, 12, 14), names=names, **SIZES)
    assert not good
    assert [f["what"] for f in found["failures"]] == ["statistics/cuda"]
    rows = {(r["pass"], r["backend"]): r for r in found["results"]}
    assert len(rows) == 2 * 12 - 1
    maps = 2 * 8 * 12 * 14 * 4
    assert rows["resample_bwd max-pool", "cuda"]["bytes"] == 2.25 * maps
    assert rows["resample nearest", "cuda"]["bytes"] == 5 * maps
    for row in rows.values():
        assert row["bytes_per_second"] == row["bytes"] / quantile(row["seconds"], 0.5)


@pytest.mark.slow
def test_operators(monkeypatch, job):
    job.pattern = "level(4-one|3-up|1-max_pool|0-classes2)/"
    shapes = Shapes((4,), 64, 2)
    names = (REFERENCE, FASTUNET)
    good, found = run(monkeypatch, job, "operators", shapes=shapes, names=names, **SIZES)
    assert good
    assert len(found["results"]) == 8
    for case in found["results"]:
        assert list(case["contenders"]) == [*EAGER, *names]
        for contender in case["contenders"].values():
            assert contender["bytes_per_second"] * contender["median"] == pytest.approx(
                case["bytes"]
            )
            assert contender["of_copy_ceiling"] > 0
    assert job.path.with_suffix(".png").exists()


def test_operators_count_what_they_read_and_write(monkeypatch, job):
    job.pattern = "base4-level1-affine/forward"
    shapes = Shapes((4,), 64, 2)
    _, found = run(monkeypatch, job, "operators", shapes=shapes, names=(FASTUNET,), **SIZES)
    (case,) = found["results"]
    moved = case["bytes"]
    assert moved == 4 * (2 * 2 * 8 * 32 * 32 + 2 * 8)  # two maps, scale and shift
    assert all("of_copy_ceiling" in c for c in case["contenders"].values())
    # Of which much would stay in this cache: no part of what a copy reaches.
    monkeypatch.setattr(measurements, "l2_bytes", lambda device: moved // 3)
    _, found = run(monkeypatch, job, "operators", shapes=shapes, names=(FASTUNET,), **SIZES)
    assert found["l2_bytes"] == moved // 3
    contenders = found["results"][-1]["contenders"].values()
    assert all(c["bytes_per_second"] for c in contenders)
    assert not any("of_copy_ceiling" in c for c in contenders)


def test_networks(monkeypatch, job):
    lines = ((REFERENCE, "fastunet no-such-backend", FASTUNET), (FASTUNET, f"{FASTUNET} cpu"))
    job.pattern = "(step|fastunet)$"
    good, found = run(monkeypatch, job, "networks", chosen=[TINY], lines=lines, **SIZES)
    assert not good
    title = "networks/base4-bilinear-49x67-batch2"
    assert {f["what"] for f in found["failures"]} == {
        f"{title}/{phase}/fastunet no-such-backend" for phase in ("forward", "step")
    }
    assert [list(case["contenders"]) for case in found["results"]] == 2 * [
        [*EAGER, REFERENCE, FASTUNET]
    ]
    assert found["bounds"][TINY.name]["fused"]["training_seconds"] > 0
    assert math.isfinite(found["results"][1]["contenders"][FASTUNET]["ratio"])


def test_memory(monkeypatch, job):
    names = [FASTUNET, f"{FASTUNET} cpu full", CHANNELS_LAST, f"{CHANNELS_LAST} full"]
    network = TINY._replace(height=64, width=64)
    good, found = run(monkeypatch, job, "memory", chosen=[network], names=names)
    assert good
    fast, fast_less, eager, eager_less, *predicted = found["results"]
    assert [p["contender"] for p in predicted[:1] + predicted[-1:]] == [
        "predicted eager",
        "predicted full",
    ]
    assert all(p["at_peak"]["parameters"] > 0 for p in predicted)
    assert fast["saved"] < eager["saved"]
    assert fast_less["saved"] < fast["saved"]
    assert eager_less["saved"] < eager["saved"]
    of_loss = 2 * 64 * 64 * (2 * 4 + 8)  # log-softmax and labels
    # counted in bfloat16
    assert fast["saved"] == pytest.approx(2 * fast["predicted"] + of_loss, rel=0.01)
    assert fast_less["predicted"] is None


def test_graph_contenders(monkeypatch):
    """Inference through fastunet.capture in the contender's backend, steps by a replay."""
    seen = []

    def capture(model, image):
        seen.append(backends.requested())
        return model

    monkeypatch.setattr(network_cases, "capture", capture)
    monkeypatch.setattr(network_cases, "replayed", lambda work: lambda: [*work(), "replayed"])
    name = f"{REFERENCE} graph"
    forward = network_case(TINY, "forward").make(name, Setting()).run()
    assert [t.shape for t in forward] == [(2, 2, 49, 67)]
    assert seen == ["reference"]
    assert network_case(TINY, "step").make(name, Setting()).run()[-1] == "replayed"


def test_compile_contenders(monkeypatch):
    """How torch.compile is called; and the memory budget holds while it compiles, not longer."""
    seen = []

    def compiled(model, **options):
        def call(x):
            budgets.append(torch._functorch.config.activation_memory_budget)
            return model(x)

        budgets = []
        seen.append((options, budgets))
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    case = network_case(TINY, "step")
    for name in (COMPILED, "compile max-autotune", BUDGETED):
        case.make(name, Setting()).run()
    assert [options["mode"] for options, _ in seen] == [None, "max-autotune", None]
    assert [budgets for _, budgets in seen] == [[1.0], [1.0], [0.5, 1.0]]
    operators = replace(case, can_compile=False)
    assert COMPILED not in operators.contenders(Setting(contenders=(*EAGER, COMPILED)))
