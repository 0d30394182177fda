"""Checkpoint files: whole or not at all, and safe to read whatever their bytes are."""

import math
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastunet import FastUNet, checkpoints


def example(**changes) -> dict:
    torch.manual_seed(0)
    config = {"n_channels": 3, "n_classes": 2, "base_channels": 4, "depth": 2, "bilinear": True}
    return {
        "config": config,
        "classes": ["ground", "cell"],
        "mask_values": [0, 255],
        "input": {"channels": 3, "mean": [0.1, 0.2, 0.3], "deviation": [0.5, 1.0, 2.0]},
        "state_dict": FastUNet(**config).state_dict(),
        "training": {"epoch": 3, "random": {"cpu": torch.get_rng_state()}},
    } | changes


@contextmanager
def full_disk(room: int):
    """No file can grow beyond ``room`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_saved_is_loaded(tmp_path):
    path, saved = tmp_path / "a.pt", example()
    checkpoints.save(path, saved)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert torch.load(path, weights_only=True)["format"] == checkpoints.FORMAT
    loaded = checkpoints.load(path)
    for name in ("config", "classes", "mask_values", "input"):
        assert loaded[name] == saved[name]
    assert torch.equal(loaded["training"]["random"]["cpu"], saved["training"]["random"]["cpu"])

    original = FastUNet(**saved["config"]).eval()
    original.load_state_dict(saved["state_dict"])
    x = torch.rand(1, 3, 20, 30)
    for source in (str(path), loaded):
        model, prepare = checkpoints.load_model(source)
        assert type(model) is FastUNet
        assert not model.training
        assert torch.equal(model(x), original(x))
        assert torch.equal(prepare(x), checkpoints.normalize(x, saved["input"]))


def test_normalize():
    image = torch.rand(2, 3, 4, 5)
    normal = checkpoints.normalize(image, example()["input"])
    assert torch.allclose(normal[:, 2], (image[:, 2] - 0.3) / 2)
    assert torch.allclose(normal[:, 0], (image[:, 0] - 0.1) / 0.5)


def test_safetensors_export(tmp_path):
    saved = example()
    checkpoints.export_safetensors(tmp_path / "a.safetensors", saved)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert {*file.keys()} == {*saved["state_dict"]}
        for key, value in saved["state_dict"].items():
            assert torch.equal(file.get_tensor(key), value)
        assert "'base_channels': 4" in file.metadata()["config"]


@pytest.mark.parametrize("write", [checkpoints.save, checkpoints.export_safetensors])
def test_full_disk_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "a"
    write(path, example())
    before = path.read_bytes()
    assert len(before) > 20000
    for room in (0, 1, 10000, len(before) - 1):
        with (
            full_disk(room),
            pytest.raises(OSError, match=r"must be writable.*is intact") as caught,
        ):
            write(path, example(classes=["another", "one"]))
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match=r"must be writable, got: No such file"):
        checkpoints.save(tmp_path / "no" / "a.pt", example())
    with pytest.raises(FileNotFoundError, match="is not a file"):
        checkpoints.load(tmp_path / "no" / "a.pt")


def refused(path, match: str) -> None:
    for read in (checkpoints.load, checkpoints.load_model):
        with pytest.raises(ValueError, match=match) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_foreign_files(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(FastUNet(3, 2, base_channels=4, depth=2).state_dict(), path)
    refused(path, "must be one that fastunet wrote")
    torch.save([1, 2], path)
    refused(path, "holds a list")
    path.write_text("not a checkpoint")
    refused(path, "cannot be read: it is truncated")
    torch.save({"format": checkpoints.FORMAT, "loss": torch.nn.MSELoss()}, path)
    refused(
        path, r"holds torch.nn.modules.loss.MSELoss, which torch.load\(weights_only=True\) refuses"
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"config": None}, "config must hold the arguments of FastUNet"),
        ({"config": {"n_channels": 3}}, "config must hold the arguments of FastUNet"),
        ({"config": example()["config"] | {"colour": 1}}, "config must hold the arguments"),
        ({"config": example()["config"] | {"depth": 10**12}}, "config must have depth=2"),
        ({"config": example()["config"] | {"base_channels": 10**9}}, "must have base_channels=4"),
        ({"config": example()["config"] | {"norm": "all"}}, "norm must be one of"),
        ({"config": example()["config"] | {"norm": "none"}}, "must be of the same model"),
        ({"state_dict": {}}, "config must have"),
        ({"state_dict": {"inc": 3}}, "state_dict must hold tensors"),
        ({"classes": ["one"]}, "classes must be a list of 2 str"),
        ({"mask_values": [0, "1"]}, "mask_values must be a list of 2 int"),
        ({"input": {"channels": 1}}, "input must have 3 channels"),
        ({"input": example()["input"] | {"mean": [0.0]}}, "mean must be 3 finite numbers"),
        ({"input": example()["input"] | {"mean": [0.0, math.nan, 1.0]}}, "mean must be 3 finite"),
        (
            {"input": example()["input"] | {"deviation": [0.0, 1.0, 1.0]}},
            "deviation must be above 0",
        ),
    ],
)
def test_entries_that_do_not_fit(tmp_path, changes, match):
    path = tmp_path / "a.pt"
    checkpoints.save(path, example(**changes))
    refused(path, match)


def fault_of(path) -> str | None:
    """The one sentence that refuses a file; None for one whose model runs."""
    try:
        model, _ = checkpoints.load_model(path)
    except ValueError as error:
        return " and more lines" if "\n" in str(error) else str(error)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 8, 8)).shape == (1, 2, 8, 8)
    return None


def test_any_truncation_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    checkpoints.save(path, example())
    whole = path.read_bytes()
    for length in np.random.default_rng(0).integers(0, len(whole) - 1, 20):
        path.write_bytes(whole[:length])
        refused(path, "cannot be read: it is truncated")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_bytes_are_refused_or_right(tmp_path):
    """Random files, and real ones with a few bytes changed."""
    random = np.random.default_rng(0)
    path, saved = tmp_path / "a.pt", example()
    checkpoints.save(path, saved)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for trial in range(150):
        if trial % 3 == 0:
            content = random.integers(0, 256, random.integers(0, 400), dtype=np.uint8)
        else:
            content = whole.copy()
            where = random.integers(0, len(whole) if trial % 3 == 1 else 3000, 4)
            content[where] = random.integers(0, 256, 4)
        path.write_bytes(content.tobytes())
        fault = fault_of(path)
        assert fault is None or str(path) in fault
        assert path.read_bytes() == content.tobytes()


def test_any_entries_are_refused_or_right(tmp_path):
    """Configurations of random values, of which no one may cost time or memory."""
    random = np.random.default_rng(0)
    values = [None, True, 0, -1, 3, 2**62, 1.5, math.nan, "batch", "", [], {}, (1,), torch.ones(2)]
    path = tmp_path / "a.pt"
    for _ in range(60):
        changed = example()
        entry = ("config", "input", "classes", "mask_values", "state_dict")[random.integers(5)]
        value = values[random.integers(len(values))]
        if isinstance(changed[entry], dict):
            names = [*changed[entry], "norm", "activation", "negative_slope", "checkpointing", "x"]
            changed[entry] = dict(changed[entry]) | {names[random.integers(len(names))]: value}
        else:
            changed[entry] = [*changed[entry][1:], value]
        checkpoints.save(path, changed)
        fault = fault_of(path)
        assert fault is None or str(path) in fault
