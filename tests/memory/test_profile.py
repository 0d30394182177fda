"""The report, its pictures, and the command line."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from fastunet import FastUNet
from fastunet.cli import main
from fastunet.memory import MemoryPlan, draw, profile
from fastunet.memory.ledger import training_step
from fastunet.memory.report import CHECKPOINT, EAGER, largest_within
from fastunet.reference import UNet

SHAPE = (2, 3, 64, 80)
NAMES = [EAGER, CHECKPOINT, "none", "light", "full"]


@pytest.fixture(scope="module")
def report():
    return profile(
        FastUNet(3, 2, base_channels=8, depth=1),
        SHAPE,
        optimizer_states=2,
        budget="8MiB",
        find_batch=True,
        find_size=True,
        measure=True,
    )


@pytest.mark.slow
def test_side_by_side(report):
    assert [run.name for run in report.runs] == [*NAMES, "plan"]
    peaks = [run.peak for run in report.runs]
    eager, _, none, light, full, planned = peaks
    assert planned <= report.budget
    assert max(light, full) < none < eager
    for run in report.runs[2:]:
        assert run.measured == pytest.approx(run.peak, rel=0.01)
        assert run.at_peak.total == run.peak == sum(h.nbytes for h in run.held)
    for run, error in zip(report.runs[:2], (0.1, 0.15), strict=True):
        assert run.measured == pytest.approx(run.peak, rel=error)
    saved = [run.saved for run in report.runs]
    assert saved[4] < saved[3] < saved[2] < saved[0]
    costs = [run.cost for run in report.runs]
    assert costs[:3] == [None, None, 0]
    assert 0 < costs[3] < costs[4] < 0.34  # forward is a third of the step
    text = str(report)
    assert all(name in text for name in NAMES)
    assert "largest batch" in text


def test_the_largest_that_fits(report):
    model = FastUNet(3, 2, base_channels=8, depth=1)
    networks = {EAGER: UNet(3, 2, base_channels=8, depth=1)}
    for run in report.runs:
        if run.name in (CHECKPOINT, "plan"):
            continue
        network, policy = networks.get(run.name, model), run.name if run.cost is not None else None
        for n, fits in ((run.largest_batch, True), (run.largest_batch + 1, False)):
            peak = training_step(network, (n, *SHAPE[1:]), states=2, policy=policy).peak()
            assert (peak <= report.budget) == fits
        for side, fits in ((run.largest_size, True), (run.largest_size + 2, False)):
            peak = training_step(network, (2, 3, side, side), states=2, policy=policy).peak()
            assert (peak <= report.budget) == fits
    batches = {run.name: run.largest_batch for run in report.runs}
    assert batches[EAGER] < batches["none"] <= batches["full"] <= batches["plan"]
    assert batches["none"] < batches["plan"]


@pytest.mark.parametrize("power", [1, 2])
def test_search_for_the_largest(power):
    def peak(n):
        assert n >= 2
        return 1000 + 7 * n**power

    for budget in (1020, 1028, 1029, 5000, 10**6):
        found = largest_within(peak, budget, least=2, power=power)
        assert found == 0 or (peak(found) <= budget < peak(found + 1))
        assert found > 0 or peak(2) > budget


def test_json(report):
    found = json.loads(json.dumps(report.to_dict()))
    assert found["shape"] == list(SHAPE)
    assert found["runs"][2]["timeline"][3]["nbytes"].keys() == {
        "parameters", "optimizer", "input", "gradients", "saved", "recomputed", "temporary"
    }  # fmt: skip
    assert found["runs"][-1]["held"][0]["nbytes"] > 0
    assert found["choices"][0][1] == 0
    assert found["plan"]["layers"]


def test_pictures(report, tmp_path):
    paths = draw(report, tmp_path / "new")
    assert [path.name for path in paths] == ["memory-timeline.png", "memory-against-work.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_wrong_options():
    model = FastUNet(3, 2, base_channels=8, depth=2)
    with pytest.raises(ValueError, match="needs a budget"):
        profile(model, SHAPE, find_size=True)
    with pytest.raises(ValueError, match="a snapshot needs measure=True and a model on a CUDA"):
        profile(model, SHAPE, measure=True, snapshot="file")
    with pytest.raises(ValueError, match="n_channels = 3"):
        profile(model, (1, 4, 64, 64))


SMALL = ["profile", "--base", "8", "--depth", "2", "--size", "64x64", "--dtype", "float32"]


def test_command_line(tmp_path):
    plan = tmp_path / "plan.json"
    options = ["--budget", "3MiB", "--optimizer", "adam", "--plan", str(plan)]
    done = CliRunner().invoke(main, [*SMALL, *options])
    assert done.exit_code == 0, done.output
    assert "eager, torch.utils.checkpoint" in done.output
    model = FastUNet(3, 2, base_channels=8, depth=2)
    model.use_checkpointing(MemoryPlan.load(plan))
    model(torch.zeros(1, 3, 64, 64)).sum().backward()

    done = CliRunner().invoke(main, [*SMALL, "--json", "--device", "cuda", "--bilinear"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["device"] == "cuda"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "64"], "size must be HxW"),
        (["--budget", "lots"], "a size must be bytes or like '6GiB'"),
        (["--budget", "1KB", "--plan", "x.json"], "a plan needs a budget that can be met"),
        (["--find-batch"], "needs a budget"),
        pytest.param(
            ["--measure", "--device", "cuda"],
            "--measure on cuda needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--depth", "7"], "at least 2\\*\\*depth = 128, got 64x64"),
    ],
)
def test_command_line_refuses(options, message):
    done = CliRunner().invoke(main, [*SMALL, *options])
    assert done.exit_code == 2
    assert re.search(message, " ".join(done.output.split()))
