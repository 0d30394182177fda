"""The benchmarks measure what they say: gates pass, and refuse; the runner writes valid files."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks import run
from benchmarks.cases import CASES, matching
from benchmarks.contest import EAGER, FASTUNET, Contender, GateError, Setting, gate, memory
from benchmarks.network_cases import FLOORS, Network, network_case
from benchmarks.plot import plot
from benchmarks.timing import ratio_interval, summary

TINY = Network(4, True, 49, 67)
# The deepest level of base 16 has the fewest pixels.
SMALL = "base16-level(4-one|3-up|1-max_pool|0-classes2)/"
RESAMPLE = "base16-level1-max_pool/forward"


@pytest.fixture(autouse=True)
def one_thread():
    """Small work on several threads crawls where other processes hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wrong(case):
    """The case, with FastUNet's first result a little off."""

    def make(name, setting):
        made = case.make(name, setting)
        factor = 1.001 if name == FASTUNET else 1.0
        return Contender(lambda: [factor * made.run()[0]], made.record, made.parameters)

    return replace(case, make=make)


def test_ids_are_unique():
    assert len({case.id for case in CASES}) == len(CASES)
    groups = {case.group for case in CASES}
    operators = {"conv_norm_act", "conv_transpose", "resample", "head"}
    assert groups == {"networks", *(f"operators/{name}" for name in operators)}


@pytest.mark.parametrize("case", matching(SMALL), ids=lambda case: case.id)
def test_gates_of_operators(case):
    contenders, errors = gate(case, Setting())
    assert set(contenders) == {*EAGER, FASTUNET}
    assert 0 < errors[FASTUNET] < case.floor
    found = memory(contenders[FASTUNET], "cpu")
    assert found["peak_bytes"] > 0
    assert (found["saved_bytes"] is None) == (case.phase == "forward")


@pytest.mark.parametrize("phase", FLOORS)
def test_gates_of_networks(phase):
    contenders, _ = gate(network_case(TINY, phase), Setting())
    if phase == "step":
        saved = {name: memory(c, "cpu")["saved_bytes"] for name, c in contenders.items()}
        assert saved[FASTUNET] < min(saved[name] for name in EAGER)


def test_gate_refuses():
    with pytest.raises(GateError, match=r"fastunet is 0\.001 from float64"):
        gate(wrong(network_case(TINY, "forward")), Setting())


def test_runner(tmp_path):
    path = tmp_path / "result.json"
    options = ["--filter", RESAMPLE, "--rounds", "1", "--min-time", "0", "--output", str(path)]
    result = CliRunner().invoke(run.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert FASTUNET in result.output
    found = json.loads(path.read_text())
    (case,) = found["results"]
    assert [len(c["seconds"]) for c in case["contenders"].values()] == [1, 1, 1]
    assert min(c["ratio"] for c in case["contenders"].values()) > 0
    assert {"hardware", "versions", "git", "threads", "dtype", "rounds"} <= set(found)
    assert list(tmp_path.iterdir()) == [path]


def test_runner_writes_nothing_when_a_gate_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "matching", lambda pattern: [wrong(*matching(RESAMPLE))])
    result = CliRunner().invoke(run.main, ["--output", str(tmp_path / "result.json")])
    assert result.exit_code == 1
    assert "1 of 1 cases have wrong results" in result.output
    assert not list(tmp_path.iterdir())


def test_runner_without_a_case():
    result = CliRunner().invoke(run.main, ["--filter", "no such case"])
    assert result.exit_code == 2
    assert "no case matches" in result.output


def test_ratio_and_its_interval():
    slow, fast = [2.0, 4.0, 6.0, 4.0], [1.0, 2.0, 3.0, 2.0]  # drift hits both alike
    found = summary({EAGER[0]: slow, EAGER[1]: [9.0] * 4, FASTUNET: fast}, EAGER)[FASTUNET]
    assert (found["baseline"], found["ratio"], found["median"]) == (EAGER[0], 0.5, 2.0)
    assert found["ratio_interval"] == (0.5, 0.5)
    low, high = ratio_interval([1.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    assert low == 1
    assert math.isclose(high, 2)


def test_plot(tmp_path):
    contender = {"baseline": EAGER[0], "ratio": 0.5, "ratio_interval": [0.4, 0.7]}
    contenders = {EAGER[0]: {"saved_bytes": 10}, FASTUNET: {"saved_bytes": 4, **contender}}
    result = {
        "hardware": {"cpu": "a CPU", "gpu": None},
        "versions": {"torch": "2"},
        "threads": 2,
        "dtype": "float32",
        "results": [{"phase": "step", "name": "a network", "contenders": contenders}],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(result))
    assert plot(path, tmp_path).stat().st_size > 0
    path.write_text(json.dumps({**result, "results": []}))
    with pytest.raises(ValueError, match="no training steps"):
        plot(path, tmp_path)
