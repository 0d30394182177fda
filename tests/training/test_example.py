"""The plain script and Lightning's, with FastUNet and with the U-Net whose place it takes."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastunet.reference import UNet

EXAMPLES = Path(__file__).parents[2] / "examples"
IMPORT = "from fastunet import FastUNet as UNet"


def losses(script: Path, folder: Path, out: Path) -> list[float]:
    main = runpy.run_path(str(script))["main"]
    options = ["--base-channels", "4", "--size", "32", "--epochs", "3", "--output", str(out)]
    result = CliRunner().invoke(main, [str(folder / "images"), str(folder / "masks"), *options])
    assert result.exit_code == 0, result.exception
    return [float(loss) for loss in re.findall(r"loss (\S+)", result.stdout)]


@pytest.mark.filterwarnings("ignore::UserWarning:lightning.*")  # few workers, few steps
@pytest.mark.parametrize("name", ["train.py", "train_lightning.py"])
def test_one_changed_line(folder, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = EXAMPLES / name
    source = script.read_text()
    assert source.count("FastUNet as") == 1
    plain = tmp_path / "plain.py"
    plain.write_text(source.replace(IMPORT, "from fastunet.reference import UNet"))
    fast = losses(script, folder, tmp_path / "fast.pth")
    assert len(fast) == 3
    assert fast[-1] < fast[0]
    assert fast == pytest.approx(losses(plain, folder, tmp_path / "plain.pth"), rel=0.02)
    weights = torch.load(tmp_path / "fast.pth", weights_only=True)
    UNet(3, 2, base_channels=4).load_state_dict(weights)
