"""A folder of images to learn from, and a run on it."""

from pathlib import Path

import pytest

for package in ("monai", "torchmetrics", "tensorboard"):
    pytest.importorskip(package, reason=f"needs {package}, of fastunet[train]")

from training.runs import options, write_folder  # noqa: E402

from fastunet.training import Settings  # noqa: E402
from fastunet.training.loop import train  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def unbroken(folder, tmp_path_factory) -> Path:
    """What a run left that nobody interrupted."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    train(Settings(**options(folder, out)))
    return out
