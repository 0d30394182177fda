"""Runs that are interrupted, killed, or spread over processes.

Each is forked from one process that has imported everything, which takes seconds.
"""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sampling import sampled
from training import children
from training.runs import assert_same_run, assert_scores, command, options

from fastunet import checkpoints
from fastunet.training import Settings
from fastunet.training.loop import train

context = multiprocessing.get_context("forkserver")
# torch._dynamo: what the first step of an optimizer imports.
context.set_forkserver_preload(["fastunet.training.loop", "fastunet.cli", "torch._dynamo"])


def start(arguments: list[str], log: Path, environment: dict[str, str] | None = None):
    child = context.Process(target=children.run, args=(arguments, str(log), environment or {}))
    child.start()
    return child


def ended(child) -> int:
    child.join(60)
    assert child.exitcode is not None, "the run must end"
    return child.exitcode


def wait_for_new(path: Path, before: int, child) -> int:
    """Until the file is another one than ``before``, or the run has ended; its time of change."""
    while child.is_alive():
        changed = path.stat().st_mtime_ns if path.exists() else 0
        if changed != before:
            return changed
        time.sleep(0.001)
    return before


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_stops_the_run(folder, tmp_path, number, workers):
    out, log = tmp_path / "run", tmp_path / "log"
    child = start(command(folder, out, epochs=10**6, save_every=2, workers=workers), log)
    wait_for_new(out / "last.pt", 0, child)
    os.kill(child.pid, number)
    assert ended(child) == 128 + number
    lines = log.read_text().splitlines()
    assert lines[-1].startswith("stopped in epoch ")
    assert lines[-1].endswith("--resume goes on from there.")
    assert "Traceback" not in log.read_text()
    training = checkpoints.load(out / "last.pt")["training"]
    assert f"epoch {training['epoch'] + 1} after {training['step']} of 3 steps" in lines[-1]
    checkpoints.load_model(out / "last.pt")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_while_saving(unbroken, tmp_path, moment):
    path = tmp_path / "last.pt"
    before = (unbroken / "last.pt").read_bytes()
    path.write_bytes(before)
    child = context.Process(target=children.die_while_saving, args=(str(path), moment))
    child.start()
    assert ended(child) == -signal.SIGKILL
    assert path.read_bytes() == before


@pytest.mark.parametrize("kills", sampled([4, 20], [4]))
def test_killed_at_random_moments(folder, tmp_path, kills):
    chance = random.Random(kills)
    epochs = 3 * kills
    given = {"epochs": epochs, "save_every": 1}
    train(Settings(**options(folder, tmp_path / "unbroken", **given)))
    out, newest = tmp_path / "run", tmp_path / "run" / "last.pt"
    for _ in range(kills):
        before = newest.stat().st_mtime_ns if newest.exists() else 0
        child = start(command(folder, out, **given, resume=newest.exists()), tmp_path / "log")
        wait_for_new(newest, before, child)
        time.sleep(chance.uniform(0, 0.06))  # some steps, in any part of one
        assert child.is_alive(), (tmp_path / "log").read_text()
        child.kill()
        assert ended(child) == -signal.SIGKILL
        checkpoint = checkpoints.load(newest)
        assert checkpoint["training"]["epoch"] < epochs
    (out / ".last.pt.1.part").write_bytes(b"what a killed run may leave")
    assert ended(start(command(folder, out, **given, resume=True), tmp_path / "log")) == 0
    assert_same_run(out, tmp_path / "unbroken")
    assert not [*out.glob(".*")]


def places() -> list[dict[str, str]]:
    """What torchrun tells each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]


def test_gradients_of_two_ranks_are_those_of_the_joint_batch(tmp_path):
    out = tmp_path / "gradients.pt"
    ranks = [
        context.Process(target=children.gradients, args=(rank, place, str(out)))
        for rank, place in enumerate(places())
    ]
    for rank in ranks:
        rank.start()
    assert [ended(rank) for rank in ranks] == [0, 0]
    for norm, found in torch.load(out, weights_only=True).items():
        model = children.frozen(norm)
        children.backward(model, *children.batch())
        for name, parameter in model.named_parameters():
            error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, (norm, name)


@pytest.mark.parametrize("norm", [{"norm": "none"}, {"sync_bn": True}], ids=["none", "sync"])
def test_two_ranks_follow_one_process(folder, tmp_path, norm):
    """Through a run, its validation and its logs; and both stop and go on together."""
    given = {**norm, "epochs": 3, "lr": 1e-3}
    train(Settings(**options(folder, tmp_path / "one", **given)))
    out = tmp_path / "two"
    logs = [tmp_path / "log0", tmp_path / "log1"]
    ranks = [
        start(command(folder, out, **given), log, place)
        for log, place in zip(logs, places(), strict=True)
    ]
    assert [ended(rank) for rank in ranks] == [0, 0], [log.read_text() for log in logs]
    assert logs[1].read_text() == ""
    one, two = (checkpoints.load(path / "last.pt") for path in (tmp_path / "one", out))
    for first, second in zip(*(c["training"]["history"] for c in (one, two)), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["dice"] == pytest.approx(second["dice"], abs=0.01)
    for key, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][key], atol=1e-4, rtol=1e-4), key


def test_two_ranks_score_what_they_save(folder, tmp_path):
    """With running statistics that each has of its own."""
    given = {"epochs": 3, "lr": 0.03}
    pairs = zip((tmp_path / "log0", tmp_path / "log1"), places(), strict=True)
    ranks = [start(command(folder, tmp_path / "run", **given), *pair) for pair in pairs]
    assert [ended(rank) for rank in ranks] == [0, 0]
    assert_scores(folder, tmp_path / "run")


def test_two_ranks_stop_and_go_on_together(folder, tmp_path):
    out, newest = tmp_path / "two", tmp_path / "two" / "last.pt"
    logs = [tmp_path / "log0", tmp_path / "log1"]

    def both(**changes):
        pairs = zip(logs, places(), strict=True)
        return [start(command(folder, out, save_every=1, **changes), *pair) for pair in pairs]

    ranks = both(epochs=500)
    wait_for_new(newest, 0, ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)  # one is enough
    assert [ended(rank) for rank in ranks] == [128 + signal.SIGTERM] * 2
    before = checkpoints.load(newest)["training"]
    ranks = both(epochs=500, resume=True)
    wait_for_new(newest, newest.stat().st_mtime_ns, ranks[0])
    os.kill(ranks[0].pid, signal.SIGINT)
    assert [ended(rank) for rank in ranks] == [130, 130]
    after = checkpoints.load(newest)["training"]
    assert (after["epoch"], after["step"]) > (before["epoch"], before["step"])
    assert after["history"][: len(before["history"])] == before["history"]


def test_batches_that_cannot_be_shared(folder, tmp_path):
    logs = [tmp_path / "log0", tmp_path / "log1"]
    ranks = [
        start(command(folder, tmp_path / "run", batch_size=3), log, place)
        for log, place in zip(logs, places(), strict=True)
    ]
    assert [ended(rank) for rank in ranks] == [1, 1]
    for log in logs:
        message = "Error: --batch-size must be a multiple of the 2 processes, got 3."
        assert log.read_text().strip() == message


@pytest.mark.slow
def test_torchrun(folder, tmp_path):
    """The command as it is documented; the processes that the other tests start are cheaper."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, "--standalone", "-m", "fastunet", *command(folder, tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert checkpoints.load(tmp_path / "run" / "last.pt")["training"]["epoch"] == 2
