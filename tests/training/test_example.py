"""The plain script, with FastUNet and with the U-Net whose place it takes."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastunet.reference import UNet

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
IMPORT = "from fastunet import FastUNet as UNet"


def losses(script: Path, folder: Path, out: Path) -> list[float]:
    main = runpy.run_path(str(script))["main"]
    options = ["--base-channels", "4", "--size", "32", "--epochs", "3", "--output", str(out)]
    result = CliRunner().invoke(main, [str(folder / "images"), str(folder / "masks"), *options])
    assert result.exit_code == 0, result.exception
    return [float(loss) for loss in re.findall(r"loss (\S+)", result.stdout)]


def test_one_changed_line(folder, tmp_path):
    source = SCRIPT.read_text()
    assert source.count("FastUNet as") == 1
    plain = tmp_path / "plain.py"
    plain.write_text(source.replace(IMPORT, "from fastunet.reference import UNet"))
    fast = losses(SCRIPT, folder, tmp_path / "fast.pth")
    assert len(fast) == 3
    assert fast[-1] < fast[0]
    assert fast == pytest.approx(losses(plain, folder, tmp_path / "plain.pth"), rel=0.02)
    weights = torch.load(tmp_path / "fast.pth", weights_only=True)
    UNet(3, 2, base_channels=4).load_state_dict(weights)
