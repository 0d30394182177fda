"""Whole runs: that they learn, what they write, and that they go on as if never stopped."""

import csv
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.runs import assert_same_run, assert_scores, command, draw, fails, options, write

from fastunet import FastUNet, checkpoints, load_weights, predict
from fastunet.cli import main
from fastunet.training import Settings, loop
from fastunet.training.loop import train


def test_a_run_learns_and_writes_its_results(folder, tmp_path):
    out = tmp_path / "run"
    result = train(Settings(**options(folder, out, epochs=12, augment=False)))
    assert {p.name for p in out.iterdir()} == {
        "last.pt", "best.pt", "model.safetensors", "log.csv", "result.json", "tensorboard"
    }  # fmt: skip
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert len(rows) == 12
    assert np.mean(losses[-3:]) < 0.6 * losses[0]
    assert result["best"]["dice"] > 0.85
    assert result["best"]["dice"] == max(float(row["dice"]) for row in rows)
    assert json.loads((out / "result.json").read_text()) == result

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == list(range(1, 37))
    assert [event.step for event in events.Scalars("dice/1")] == list(range(3, 37, 3))

    best = checkpoints.load(out / "best.pt")
    assert "training" not in best
    model, prepare = checkpoints.load_model(out / "best.pt")
    for other in (out / "best.pt", out / "model.safetensors"):
        loaded = FastUNet(3, 2, base_channels=4, depth=2)
        load_weights(loaded, other)
        assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert load_file(out / "model.safetensors").keys() == best["state_dict"].keys()

    # The checkpoint alone is enough to find a disc that nobody has seen.
    image, mask = draw(99, 45, 61)
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()[None] / 255
    with torch.no_grad():
        found = model(prepare(pixels)).argmax(1)[0].numpy()
    assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.8


def test_scores_are_dice_and_iou_over_all_pixels(folder, unbroken):
    assert_scores(folder, unbroken)


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 6])
def test_resumed_run_is_the_unbroken_one(folder, unbroken, tmp_path, monkeypatch, stop_at):
    """From the middle of an epoch, from its end, from after the last."""
    out = tmp_path / "run"
    real = loop.Run.train_step
    done = 0

    def stopping(run, *batch):
        nonlocal done
        done += 1
        if done == stop_at:
            run.signals.note(2, None)
        return real(run, *batch)

    monkeypatch.setattr(loop.Run, "train_step", stopping)
    with pytest.raises(loop.Interrupted, match="--resume"):
        train(Settings(**options(folder, out)))
    assert done == stop_at
    torch.manual_seed(12345)  # nothing may hang on the global state
    np.random.seed(12345)
    train(Settings(**options(folder, out, resume=True, workers=1, save_every=1)))
    assert done == 6
    assert_same_run(out, unbroken)


def test_other_seeds_and_policies(folder, unbroken, tmp_path):
    """Checkpointing changes nothing, the seed everything."""
    train(Settings(**options(folder, tmp_path / "light", checkpointing="light")))
    assert_same_run(tmp_path / "light", unbroken)
    train(Settings(**options(folder, tmp_path / "other", seed=1)))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "other", unbroken)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "reference", "checkpointing": "full"},
        {"amp": "bf16", "bilinear": True},
        {"amp": "fp16", "norm": "group"},
    ],
)
def test_variants_train(folder, tmp_path, changes):
    train(Settings(**options(folder, tmp_path / "run", epochs=4, **changes)))
    model, _ = checkpoints.load_model(tmp_path / "run" / "best.pt")
    assert model.bilinear == changes.get("bilinear", False)
    history = checkpoints.load(tmp_path / "run" / "last.pt")["training"]["history"]
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 3}, "--epochs must be as in the run to resume, 2, got 3"),
        ({"lr": 0.5}, "--lr must be as in the run to resume, 0.01, got 0.5"),
        ({"model": "reference"}, "--model must be as in the run to resume, fast, got reference"),
    ],
)
def test_resuming_with_other_options(folder, unbroken, tmp_path, changes, message):
    out = shutil.copytree(unbroken, tmp_path / "run")
    before = (out / "last.pt").read_bytes()
    assert fails(command(folder, out, resume=True, **changes)) == f"{message}."
    assert (out / "last.pt").read_bytes() == before


def test_resuming_with_other_images(folder, unbroken, tmp_path):
    out = shutil.copytree(unbroken, tmp_path / "run")
    other = shutil.copytree(folder, tmp_path / "f")
    for index in range(3):  # of which at most two are held out
        image, _ = draw(100 + index, 20 + 7 * index, 50 - 3 * index)
        write(other / "images" / f"{index}.png", image)
    message = fails(command(other, out, resume=True))
    assert message.startswith("the images and masks must be those of the run to resume")


def test_resuming_where_the_data_has_moved(folder, unbroken, tmp_path, monkeypatch):
    """Masks may have other names by then, too."""
    out = shutil.copytree(unbroken, tmp_path / "run")
    moved = shutil.copytree(folder, tmp_path / "moved")
    for mask in (moved / "masks").iterdir():
        mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    monkeypatch.chdir(tmp_path)
    given = options(Path("moved"), out, resume=True, mask_suffix="_mask")
    train(Settings(**given))
    assert_same_run(out, unbroken)


def test_weights_to_start_from(folder, unbroken, tmp_path):
    """A step so small that it moves none of them; what a resumed run has is in its checkpoint."""
    best = checkpoints.load(unbroken / "best.pt")
    path, out = tmp_path / "unet.pth", tmp_path / "run"
    torch.save({f"module.{key}": value for key, value in best["state_dict"].items()}, path)
    given = options(folder, out, lr=1e-12, epochs=1, batch_size=6, weights=path)
    train(Settings(**given))
    found = checkpoints.load(out / "last.pt")["state_dict"]
    for name, _ in FastUNet(**best["config"]).named_parameters():
        assert torch.allclose(found[name], best["state_dict"][name], rtol=0, atol=1e-9), name
    path.unlink()
    train(Settings(**given | {"resume": True}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": 8}, "is of a model with base_channels=4 and this one has base_channels=8"),
        ({"mask_values": "0,1,2"}, "is of a model with n_classes=2 and this one has n_classes=3"),
        ({"weights": "no.pth"}, "checkpoint 'no.pth' is not a file"),
    ],
)
def test_weights_that_do_not_fit(folder, unbroken, tmp_path, monkeypatch, changes, message):
    """Are refused before all images are read."""
    monkeypatch.setattr(loop, "survey", None)
    given = {"weights": unbroken / "model.safetensors"} | changes
    assert message in fails(command(folder, tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


def test_resuming_what_is_not_there_or_holds_weights_alone(folder, unbroken, tmp_path):
    assert "last.pt' is not a file" in fails(command(folder, tmp_path / "no", resume=True))
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(unbroken / "best.pt", out / "last.pt")
    assert "must hold a state of training to resume" in fails(command(folder, out, resume=True))
    checkpoint = checkpoints.load(unbroken / "last.pt")
    checkpoint["training"]["optimizer"] = {"state": 3}
    checkpoints.save(out / "last.pt", checkpoint)
    assert "is corrupt and cannot be resumed" in fails(command(folder, out, resume=True))


def test_a_run_is_not_overwritten(folder, unbroken, tmp_path):
    """Nor any file of it alone; what a run leaves that came to no checkpoint stops none."""
    before = (unbroken / "last.pt").read_bytes()
    assert fails(command(folder, unbroken)).endswith(": pass --resume to continue its run.")
    assert (unbroken / "last.pt").read_bytes() == before
    for name in (file.name for file in unbroken.iterdir() if file.is_file()):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("kept")
        assert f"must be new or empty, it has {name}: " in fails(command(folder, out))
        assert [file.read_text() for file in out.iterdir()] == ["kept"]
    (tmp_path / "stopped" / "tensorboard").mkdir(parents=True)
    train(Settings(**options(folder, tmp_path / "stopped", epochs=1, batch_size=6)))


def test_large_images_are_validated_by_tiles(folder, tmp_path, monkeypatch):
    """As ``fastunet predict`` sees them, under autocast."""
    monkeypatch.setattr(loop, "TILE", 16)
    real, seen = FastUNet.forward, []

    def forward(model, x):
        logits = real(model, x)
        if not model.training:
            seen.append((*x.shape[2:], logits.dtype))
        return logits

    monkeypatch.setattr(FastUNet, "forward", forward)
    given = {"epochs": 1, "batch_size": 6, "amp": "bf16"}
    settings = Settings(**options(folder, tmp_path / "run", **given))
    train(settings)
    assert {dtype for *_, dtype in seen} == {torch.bfloat16}
    assert max(max(size) for *size, _ in seen) == 16
    validation = loop.open_data(settings).validation
    assert len(seen) > 3 * len(validation)
    model, prepare = checkpoints.load_model(tmp_path / "run" / "last.pt")
    both = either = 0
    for image, mask in (validation[index] for index in range(len(validation))):
        with torch.autocast("cpu", torch.bfloat16):
            found = predict(model, image, 16, classes=True, prepare=prepare)
        both += (found & mask).sum().item()
        either += (found.sum() + mask.sum()).item()
    row = checkpoints.load(tmp_path / "run" / "last.pt")["training"]["history"][-1]
    assert row["dice/1"] == pytest.approx(2 * both / either)


def test_images_whose_deepest_map_is_a_pixel(tmp_path):
    """Which instance norm cannot take, in training or validation."""
    for index in range(2):
        image, mask = draw(index, 5, 7)
        write(tmp_path / "images" / f"{index}.png", image)
        write(tmp_path / "masks" / f"{index}.png", mask)
    given = {"norm": "instance", "epochs": 1, "batch_size": 1}
    train(Settings(**options(tmp_path, tmp_path / "run", size=8, **given)))
    message = fails(command(tmp_path, tmp_path / "other", size=7, **given))
    assert message == (
        "--size must be at least 2 * 2**depth with --norm instance, got 7 with --depth 2."
    )


@pytest.mark.parametrize(
    ("policy", "advice"),
    [("none", "try --checkpointing light, full or auto"), ("light", "try a smaller --batch-size")],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_out_of_memory_says_what_to_try(folder, tmp_path, monkeypatch, policy, advice, error):
    def full(*_):
        raise error

    monkeypatch.setattr(FastUNet, "forward", full)
    message = fails(command(folder, tmp_path / "run", checkpointing=policy))
    assert message.startswith("a step must fit in memory, --batch-size 2 of --size 32 does not")
    assert advice in message


def test_out_of_memory_in_validation(folder, tmp_path, monkeypatch):
    real = FastUNet.forward

    def full(model, x):
        if model.training:
            return real(model, x)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FastUNet, "forward", full)
    assert fails(command(folder, tmp_path / "run", batch_size=6)) == (
        "validation must fit in memory, a tile of at most 768x768 pixels with --base 4 does not: "
        "try --amp bf16 or a smaller --base."
    )


def test_disk_full_during_training(folder, tmp_path, monkeypatch):
    """The run ends with a sentence, and can go on from the checkpoint before."""
    out, room = tmp_path / "run", 3
    real = os.fsync

    def fsync(number):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    message = fails(command(folder, out, save_every=1))
    assert "must be writable, got: No space left on device" in message
    assert checkpoints.load(out / "last.pt")["training"]["step"] == 3
    assert not [*out.glob(".*")]


def test_a_loss_that_is_not_finite_ends_the_run(folder, tmp_path):
    message = fails(command(folder, tmp_path / "run", lr=1e30, norm="none"))
    assert message.startswith("the loss must stay finite, got nan in epoch 1, step 2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "folders"}, "Invalid value for '--data': 'folders' is not one of"),
        ({"model": "slow"}, "Invalid value for '--model'"),
        ({"optimizer": "sgd"}, "No such option '--optimizer'"),
        ({"masks": None}, "--data folder needs --masks"),
        ({"root": "x"}, "--data folder takes no --root"),
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"lr": "nan"}, "--lr must be a positive number, got nan"),
        ({"val_share": 1}, "--val-share must be between 0 and 1, got 1.0"),
        ({"size": 3}, "--size must be at least 2**depth, got 3 with --depth 2"),
        ({"depth": 10**9}, "--size must be at least 2**depth, got 32 with --depth 1000000000"),
        ({"device": "abacus"}, "--device must be cpu or cuda, got 'abacus'"),
        ({"device": "cuda:99"}, "--device cuda:99 must be a GPU that PyTorch sees"),
        ({"batch_size": 7}, "--batch-size must be at most the 6 images to train on, got 7"),
        ({"mask_values": "0"}, "--mask-values must be two or more different integers"),
        ({"mask_values": "0,0"}, "--mask-values must be two or more different integers"),
        ({"mask_values": "a,b"}, "--mask-values must be two or more different integers"),
        ({"mask_values": "0,65536"}, "--mask-values must be in 0..65535, got 65536"),
        ({"mask_values": "1,-1"}, "--mask-values must be in 0..65535, got -1"),
        ({"size": 4, "norm": "group"}, "--size must be at least 2 * 2**depth with --norm group"),
        ({"size": 7, "batch_size": 1}, "--size must be at least 2 * 2**depth with --batch-size 1"),
        ({"data": "mni152", "images": None, "masks": None, "mask_suffix": "_mask"},
         "--data mni152 takes no --mask-suffix"),
        ({"model": "reference", "checkpointing": "auto"}, "--checkpointing of --model reference"),
        ({"sync_bn": True, "norm": "group"}, "--sync-bn needs --norm batch, got 'group'"),
        ({"sync_bn": True, "model": "reference", "device": "cpu"}, "--sync-bn of --model"),
    ],
)  # fmt: skip
def test_bad_options(folder, tmp_path, changes, message):
    assert message in fails(command(folder, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_ctrl_c_before_the_first_step(folder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "survey", interrupted)
    result = CliRunner().invoke(main, command(folder, tmp_path / "run"))
    assert (result.exit_code, result.stderr) == (130, "stopped before the first step.\n")


def test_missing_packages_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastunet.training.loop", None)
    assert "`pip install 'fastunet[train]'`" in fails(command(folder, tmp_path / "run"))
