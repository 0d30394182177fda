"""The demo in two steps, and that its held-out slices are held out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("nilearn", reason="needs nilearn, of fastunet[demo]")
EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402

from fastunet.training import mni152  # noqa: E402


def run_demo(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "demo.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def slices():
    return mni152.load()


def test_demo_writes_its_results(tmp_path):
    folder = tmp_path / "new" / "folder"
    options = ["--steps", "2", "--base-channels", "2", "--batch-size", "1", "--device", "cpu"]
    run = run_demo(*options, "--output", str(folder))
    assert run.returncode == 0, run.stderr
    assert "UNet / FastUNet" in run.stdout
    assert {path.name for path in folder.iterdir()} == {"prediction.png", "loss.png", "result.json"}
    for name in ("prediction.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    result = json.loads((folder / "result.json").read_text())
    assert set(result["hardware"]) == {"device", "cpu", "threads", "torch"}
    assert result["settings"]["steps"] == 2
    assert result["slices"]["shape"] == [197, 233]
    assert set(result["ratios"]) == {"time", "saved", "peak"}
    assert set(result["largest_loss_difference"]) == {"first 20", "all"}
    assert list(result["models"]) == ["UNet", "FastUNet"]
    for model in result["models"].values():
        assert len(model["losses"]) == len(model["step_ms"]) == 2
        assert model["peak_bytes"] > 0.9 * model["saved_bytes"] > 0
        assert set(model["dice"]) == {"grey", "white", "mean"}
    # Same weights, same batch: on the first step only rounding differs (PyTorch's own
    # channels_last BatchNorm on CPUs is up to 1e-3 off in the mean).
    first, second = (model["losses"][0] for model in result["models"].values())
    assert first == pytest.approx(second, rel=1e-3)
    assert result["models"]["FastUNet"]["first_loss_error"] < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "abacus"], "--device must be cpu or cuda, got 'abacus'"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees no such GPU on this machine"),
        (["--batch-size", "1000"], "--batch-size must be at most 94, got 1000"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--output", __file__], "is a file"),
        (["--output", f"{__file__}/below"], "below cannot be made: Not a directory"),
    ],
)
def test_demo_explains_bad_options(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(demo.main, options)
    assert outcome.exit_code == 2
    assert message in outcome.output


def test_slices_are_images_with_labels(slices):
    for part in slices:
        assert part.images.shape == (len(part.z), 1, 197, 233)
        assert part.labels.shape == (len(part.z), 197, 233)
        assert part.images.isfinite().all()
        counts = part.labels.flatten().bincount().tolist()
        assert len(counts) == len(mni152.CLASSES)
        assert min(counts) > 0.05 * sum(counts)


def test_image_is_normalised_inside_the_head(slices):
    train, _ = slices
    outside = train.images.min()  # the image is 0 there before normalisation
    inside = train.images[train.images > outside]
    assert abs(inside.mean()) < 0.2  # exactly 0 over the whole head
    assert abs(inside.std() - 1) < 0.2
    assert all((image > outside).float().mean() >= mni152.LEAST_BRAIN for image in train.images)


def test_held_out_slices_are_far_from_training(slices):
    train, held_out = slices
    assert held_out.z == [z for block in mni152.HELD_OUT for z in block]
    assert len(train.z) == len(set(train.z)) > 2 * len(held_out.z)
    distance = min(abs(a - b) for a in train.z for b in held_out.z)
    assert distance == mni152.GAP + 1


def test_split_of_a_small_volume():
    train, held_out = mni152.split(list(range(30, 60)))
    assert train == list(range(30, 48 - mni152.GAP))
    assert held_out == list(range(48, 58))
