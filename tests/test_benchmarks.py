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

from benchmarks import peers, run, sizes
from benchmarks.cases import CASES, matching
from benchmarks.contest import (
    EAGER,
    FASTUNET,
    FROZEN,
    PEERS,
    PEERS_FLOOR,
    Contender,
    GateError,
    Setting,
    gate,
    memory,
)
from benchmarks.network_cases import FLOORS, Network, network_case
from benchmarks.plot import plot
from benchmarks.timing import ratio_interval, summary

# In float64 no argument of a ReLU is nearer to 0, and no two values of a pooling window nearer to
# each other, than 6e-5 (49x67: 5e-6), so that rounding flips none, whatever the instruction set.
TINY = Network(4, True, 33, 55)
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


def test_other_engines(tmp_path, monkeypatch):
    """Those that are missing are named; FastUNet's recorded inference stands beside them."""
    monkeypatch.setattr(peers, "MODULES", dict.fromkeys(PEERS, ("no_such_module",)))
    monkeypatch.setattr(run, "matching", lambda pattern: [network_case(TINY, "forward")])
    path = tmp_path / "result.json"
    options = ["--peers", "--rounds", "1", "--min-time", "0", "--output", str(path)]
    result = CliRunner().invoke(run.main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "not measured: mnn (no module no_such_module)" in result.output
    found = json.loads(path.read_text())
    assert set(found["missing"]) == set(PEERS)
    (case,) = found["results"]
    assert set(case["contenders"]) == {*EAGER, FASTUNET, "fastunet auto graph"}


@pytest.mark.parametrize("off", [PEERS_FLOOR / 2, 2 * PEERS_FLOOR])
def test_other_engines_pass_a_gate(monkeypatch, off):
    def engine(model, image, folder):
        output = []

        def infer():
            output[:] = [(1 + off) * model(image).detach().numpy()]

        return infer, lambda: output[0]

    monkeypatch.setitem(peers.PEERS, "mnn", engine)
    setting = Setting(contenders=(*EAGER, FASTUNET, "mnn", FROZEN))
    step = network_case(TINY, "step")
    assert step.contenders(setting) == [*EAGER, FASTUNET]  # they infer only
    forward = network_case(TINY, "forward")
    assert forward.contenders(setting) == [*EAGER, FASTUNET, "mnn", FROZEN]
    setting = replace(setting, contenders=(*EAGER, "mnn"))
    if off > PEERS_FLOOR:
        with pytest.raises(GateError, match=r"mnn is 0\.02 from float64"):
            gate(forward, setting)
        return
    contenders, errors = gate(forward, setting)
    assert errors["mnn"] == pytest.approx(off, rel=0.01)
    assert contenders["mnn"].timed is not None
    assert memory(contenders["mnn"], "cpu") == {"peak_bytes": None, "saved_bytes": None}


def test_time_per_pixel():
    """Between two widths by the products; over that of 256x256, drift of the machine taken out."""
    square = 256 * 256
    seconds = {16: 1.0, 32: 3.0}
    found = {
        Network(base, True, 256, 256): {"network": s, "basis": s, "network, one thread": 2 * s}
        for base, s in seconds.items()
    }
    found[Network(16, True, 256, 256)] |= {"product": 2.0, "product, one thread": 3.0}
    # In slow minutes:
    found[Network(24, True, 256, 256)] = {"network": 4.0, "basis": 4.0, "network, one thread": 6.0}
    found[Network(16, True, 128, 256, 8)] = {"network": 8.0, "basis": 2.0}
    of_widths = {base: s / square for base, s in (seconds | {24: 2.0}).items()}
    table = {row["name"]: row for row in sizes.rows(found, of_widths, "step")}
    assert table["base16-bilinear-256x256"]["ratio"] == 1
    assert table["base16-bilinear-256x256"]["speedup_of_threads"] == 2
    assert table["base16-bilinear-256x256"]["of_a_product"] == 1.5
    assert table["base24-bilinear-256x256"]["of_a_product"] is None
    share = (24**2 - 16**2) / (32**2 - 16**2)
    assert table["base24-bilinear-256x256"]["ratio"] == pytest.approx(2 / (1 + 2 * share))
    batch = table["base16-bilinear-128x256-batch8"]
    assert batch["ratio"] == pytest.approx(1.0)
    assert batch["ns_per_pixel"] == pytest.approx(8e9 / (4 * square))


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
