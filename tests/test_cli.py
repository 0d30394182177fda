"""The command line, where no other test has its command."""

import pytest
from click.testing import CliRunner

from fastunet.cli import main


@pytest.mark.parametrize("option", ["--plan", "--pictures"])
def test_a_report_outlives_what_cannot_be_written(tmp_path, option):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "new")
    network = ["--base", "8", "--depth", "1", "--size", "32x32", "--budget", "1GiB"]
    done = CliRunner().invoke(main, ["profile", *network, option, path])
    assert done.exit_code == 1
    assert "eager, torch.utils.checkpoint" in done.stdout
    assert done.stderr == f"Error: '{path}' must be writable, got: Not a directory.\n"
