"""What the Triton kernels compile to, for GPUs that are not there (tools/kernels.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sampling import sampled

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]


def python(code, status):
    """Runs code in a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == status, run.stdout + run.stderr
    return run


def kernels(tmp_path, *options):
    """The rows of the table."""
    arguments = [*options, "--json", str(tmp_path / "rows.json")]
    python(f"import sys; sys.path.insert(0, 'tools'); import kernels; kernels.main({arguments})", 0)
    return json.loads((tmp_path / "rows.json").read_text())


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "options",
    sampled(
        [
            (),
            ("--sm", "90"),
            ("--sm", "100"),
            ("--dtype", "float16"),
            ("--dtype", "float32"),
            ("--dtype", "float32", "--ieee", "--depth", "2"),
            ("--base", "24", "--sm", "86"),
        ],
        [("--sm", "90")],
    ),
    ids=lambda options: " ".join(options) or "defaults",
)
def test_compile(tmp_path, options):
    """No spills, shared memory within limits, products on tensor cores unless they are exact, loads
    that run ahead."""
    rows = kernels(tmp_path, *options)
    names = {row["kernel"] for row in rows}
    assert {"convolution", "weight_grad", "resample", "resample_bwd", "apply", "finish"} <= names
    if "--dtype" in options or "--base" in options:
        return
    wide = [r for r in rows if r["kernel"] == "convolution" and r["configuration"]["BN"] >= 64]
    for row in wide:
        # every load of 16 bytes, by the TMA unit or asynchronously
        assert row["tma"] or row["cp.async"] or row["ld.128"]
        assert row[{80: "mma", 90: "wgmma", 100: "tcgen05"}[row["sm"]]]
    assert any(row["tma"] for row in wide if row["sm"] >= 90)
    assert not any(row["tma"] for row in wide if row["sm"] < 90)


def test_nothing_recompiles_for_another_size():
    """What decides over the compiled code is the same for another batch and image."""
    code = """
import sys; sys.path.insert(0, "tools")
import kernels, torch
from triton.backends.compiler import GPUTarget
from fastunet import FastUNet
def keys(shape, sm, bilinear, train):
    model = FastUNet(3, 2, bilinear, base_channels=32, depth=3)
    found = kernels.launches(model, shape, torch.bfloat16, sm, train)
    return {kernels.specialized(launch, GPUTarget("cuda", sm, 32))[0] for launch in found}
for sm in (80, 90):
    for bilinear in (True, False):
        for train in (True, False):
            first = keys((2, 3, 249, 255), sm, bilinear, train)  # pads at every level
            for shape in ((3, 3, 256, 256), (1, 3, 531, 251)):
                more = keys(shape, sm, bilinear, train) - first
                assert not more, (sm, bilinear, train, shape, more)
print(len(first), "kernels")
"""
    assert int(python(code, 0).stdout.split()[0]) > 5


@pytest.mark.slow
def test_faults_are_found(tmp_path):
    """Blocks that do not fit a chip's shared memory are a fault, and the exit status says so."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import kernels\n"
        "kernels.SHARED[90] = 1 << 10\n"
        "kernels.main(['--sm', '90', '--base', '32', '--depth', '1'])"
    )
    assert "bytes of shared memory, at most 1024" in python(code, 1).stdout
