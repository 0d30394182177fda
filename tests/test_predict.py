"""Prediction by tiles against the whole image, and ``fastunet predict``."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from networks import pair, random, randomize
from PIL import Image

import fastunet
from fastunet import FastUNet, checkpoints, prediction, reference
from fastunet.cli import main
from fastunet.images import ImageFile, read_image, read_mask
from fastunet.tiling import parts, predict_bands, rising, tile_and_overlap

DEPTH = 2  # of the networks here, so
MULTIPLE = 4
REACH = 7 * MULTIPLE  # a logit sees 23 pixels around, really
EXACT = 16 * MULTIPLE  # the overlap that makes tiles equal to the whole


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= tolerance * expected.norm()


SIZES = [(203, 170), (129, 64), (64, 301), (300, 3), (1, 1), (5, 9)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_the_whole(size):
    """Everywhere with the overlap of the receptive field: in float64 to its rounding."""
    plain, fast = pair()
    x = random(3, *size)
    for tile, overlap, batch_size in ((128, EXACT, 1), (150, 70, 3), (3 * EXACT, None, 2)):
        for model, image, tolerance in (
            (plain.double(), x.double(), 1e-13),
            (fast, x, 1e-5),
        ):
            whole = fastunet.predict(model, image)
            tiled = fastunet.predict(model, image, tile, overlap, batch_size)
            assert tiled.shape == (2, *size)
            close(tiled, whole, tolerance)


def test_tiles_equal_the_whole_away_from_their_borders():
    model = pair()[0].double()
    x = random(3, 203, 170, dtype=torch.float64)
    whole, tiled = fastunet.predict(model, x), fastunet.predict(model, x, 96, 16)
    inside = [
        torch.tensor([
            all(
                (p.start == 0 or p.start <= i - REACH) and (p.stop == n or p.stop > i + REACH)
                for p in parts(n, 96, 16, MULTIPLE)
                if p.first <= i < p.last
            )
            for i in range(n)
        ])
        for n in (203, 170)
    ]  # fmt: skip
    same = inside[0][:, None] & inside[1]
    assert 0.2 < same.double().mean() < 0.8
    difference = (tiled - whole).abs().amax(0)
    assert difference[same].max() < 1e-12 * whole.abs().max()
    assert difference[~same].max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("length", [1, 15, 128, 129, 140, 257, 1000, 1001])
@pytest.mark.parametrize(("tile", "overlap"), [(128, 0), (128, 16), (128, 64), (36, 16), (8, 4)])
def test_parts_cover_an_axis(length, tile, overlap):
    found = parts(length, tile, overlap, MULTIPLE)
    like = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(length, dtype=torch.float64)
    for part in found:
        assert 0 <= part.start <= part.first < part.last <= part.stop <= length
        assert part.start % MULTIPLE == 0
        assert part.stop - part.start <= tile
        total[part.first : part.last] += part.weight(like)
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-15)
    for one, two in pairwise(found):
        assert one.stop - two.start >= overlap or one.stop == length
        unused = (one.start + tile - two.start) * 7 // 16
        assert two.first >= two.start + unused
        assert one.last <= one.start + tile - unused
    fewest = -(-max(length - tile, 0) // (tile - overlap)) + 1
    assert len(found) == fewest


def test_rounding_of_tile_and_overlap():
    assert tile_and_overlap(4, 1000, None, None) == (1000, 0)
    assert tile_and_overlap(16, 1000, 500, 130) == (512, 144)
    assert tile_and_overlap(16, 1000, 500, 250) == (512, 256)
    assert tile_and_overlap(16, 1000, 36, 18) == (48, 16)  # at most half
    assert tile_and_overlap(16, 1000, 768, None) == (768, 256)
    assert tile_and_overlap(16, 1000, 512, None) == (512, 176)


def test_both_sides_of_a_seam_count_alike():
    weight = rising(9, torch.zeros((), dtype=torch.float64))
    assert weight.diff().min() > 0
    assert torch.allclose(weight + weight.flip(0), torch.ones_like(weight), atol=1e-15)


@pytest.mark.parametrize("kind", [reference.UNet, FastUNet])
@pytest.mark.parametrize("size", [(64, 64), (37, 53), (4, 4)])
def test_the_whole_image_is_the_models_own_output(kind, size):
    model = pair()[kind is FastUNet].eval()
    x = random(2, 3, *size)
    with torch.no_grad():
        expected, one = model(x), model(x[:1])[0]
    assert torch.equal(fastunet.predict(model, x, batch_size=2), expected)
    assert torch.equal(fastunet.predict(model, x[0]), one)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (3, 40), (4, 9)])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_small_images_are_reflected(size, norm):
    """To what the model takes: of instance norm's maps none may be a single pixel."""
    model = pair(norm=norm)[1].eval()
    x = random(3, *size)
    least = MULTIPLE * (2 if norm == "instance" and max(size) < 2 * MULTIPLE else 1)
    pad = [(0, 0), *((0, max(least - n, 0)) for n in size)]
    padded = torch.from_numpy(np.pad(x.numpy(), pad, mode="reflect"))
    with torch.no_grad():
        expected = model(padded[None])[0, :, : size[0], : size[1]]
    assert torch.equal(fastunet.predict(model, x), expected)


@pytest.mark.parametrize("options", [{"norm": "instance"}, {"norm": "group"}, {"bilinear": True}])
def test_networks_that_see_their_whole_tile_are_blended(options):
    """Their tiles differ; the seams do not: neighbouring pixels change no more than elsewhere."""
    model = pair(**options)[1]
    x = random(3, 200, 170).cumsum(1).cumsum(2) / 1000
    whole, tiled = fastunet.predict(model, x), fastunet.predict(model, x, 96, 48)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    for found in (tiled, fastunet.predict(model, x[:, :33, :35], 8, 4)):
        assert found.isfinite().all()


def test_weights_add_up_to_one():
    model = pair()[1]
    torch.nn.init.zeros_(model.outc.conv.weight)
    torch.nn.init.constant_(model.outc.conv.bias, 3)
    found = fastunet.predict(model, random(3, 203, 170), 64, 32)
    assert torch.allclose(found, torch.full_like(found, 3), rtol=1e-6, atol=0)


def test_batches_and_tiles_at_once():
    model = pair()[1]
    x = random(3, 3, 130, 150)
    expected = torch.stack([fastunet.predict(model, image, 64, 32) for image in x])
    for batch_size in (1, 2, 5, 100):
        close(fastunet.predict(model, x, 64, 32, batch_size), expected, 1e-6)


def test_the_model_takes_at_most_batch_size_tiles():
    model = pair()[1]
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    fastunet.predict(model, random(2, 3, 130, 150), 64, 32, 4)
    assert {shape[0] for shape in seen} == {4, 2}
    assert max(max(shape[2:]) for shape in seen) == 64
    assert len(model._forward_pre_hooks) == 1


def test_sources_and_what_is_returned(tmp_path):
    model = pair()[1]
    x = torch.randint(0, 256, (3, 130, 150)).to(torch.uint8)
    tifffile.imwrite(tmp_path / "a.tif", x.permute(1, 2, 0).numpy(), tile=(32, 32))
    scaled = read_image(tmp_path / "a.tif")
    expected = fastunet.predict(model, scaled, 64, 32)
    np.save(tmp_path / "a.npy", scaled.numpy())
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    out = np.lib.format.open_memmap(tmp_path / "b.npy", "w+", np.float32, (2, 130, 150))
    with ImageFile(tmp_path / "a.tif") as windows:
        assert torch.equal(fastunet.predict(model, windows, 64, 32), expected)
        assert fastunet.predict(model, windows, 64, 32, out=out) is out
    assert torch.equal(torch.from_numpy(out), expected)
    assert torch.equal(fastunet.predict(model, mapped, 64, 32), expected)
    bands = [*predict_bands(model, scaled, 64, 32)]
    assert len(bands) == 4  # of four rows of tiles
    assert torch.equal(torch.cat(bands, 1), expected)
    classes = fastunet.predict(model, scaled, 64, 32, classes=True)
    assert torch.equal(classes, expected.argmax(0))
    assert not expected.requires_grad
    expected += 1  # no inference tensor
    prepared = fastunet.predict(model, scaled, 64, 32, prepare=lambda x: (x - 0.5) / 0.1)
    close(prepared, fastunet.predict(model, (scaled - 0.5) / 0.1, 64, 32), 1e-6)
    with pytest.raises(ValueError, match=r"out must have the shape \[2, 130, 150\], got \[3, 1"):
        fastunet.predict(model, scaled, 64, 32, out=torch.empty(3, 130, 150))


def test_one_logit_is_of_class_1_above_0():
    model = pair(3, 1)[1]
    x = random(3, 50, 60)
    logits = fastunet.predict(model, x)
    found = fastunet.predict(model, x, classes=True)
    assert found.dtype == torch.int64
    assert torch.equal(found, (logits[0] > 0).long())
    assert 0 < found.sum() < found.numel()


def test_dtypes():
    model, x = pair()[1], random(3, 100, 90)
    expected = fastunet.predict(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = fastunet.predict(model, x, 64, 32)
        whole = fastunet.predict(model, x)
    assert found.dtype == whole.dtype == torch.bfloat16
    assert (whole.float() - expected).norm() < 0.05 * expected.norm()
    double = fastunet.predict(pair()[1].double(), x)  # the image takes the model's dtype
    close(double, fastunet.predict(pair()[0].double(), x.double()), 1e-9)


def test_modes_and_statistics_are_as_before():
    model = pair()[1].train()
    model.inc.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    x = random(3, 100, 90)
    first = fastunet.predict(model, x, 64, 32)
    bands = predict_bands(model, x, 64, 32)
    next(bands)
    assert not model.training
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    bands.close()
    assert torch.equal(fastunet.predict(model, x, 64, 32), first)

    def failing(x):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        fastunet.predict(model, x, prepare=failing)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_wrapped_models():
    model, x = pair()[1], random(3, 70, 60)
    wrapped = torch.nn.DataParallel(model)
    assert torch.equal(fastunet.predict(wrapped, x, 32), fastunet.predict(model, x, 32))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": torch.nn.Conv2d(3, 2, 1)}, "the model must be a UNet or FastUNet, got Conv2d"),
        ({"image": random(30, 30)}, r"must be \[C, H, W\] or \[N, C, H, W\], .*, got \[30, 30\]"),
        ({"image": [1]}, r"the image must be \[C, H, W\] .*, got list"),
        ({"image": random(3, 0, 5)}, r"none of them 0, got \[3, 0, 5\]"),
        ({"image": random(4, 30, 30)}, "must have n_channels = 3 channels, got 4"),
        ({"image": random(3, 30, 30).byte()}, "must be floating-point, .*, got torch.uint8"),
        ({"image": np.zeros((3, 9, 9), int)}, "must be floating-point, .*, got torch.int64"),
        ({"tile": 7}, r"tile must be an integer of at least 2 \* 2\*\*depth = 8, got 7"),
        ({"tile": 64.0}, r"tile must be an integer of at least .*, got 64.0"),
        ({"overlap": 17}, "overlap must be at most half of a tile, 16, got 17"),
        ({"overlap": -1}, "overlap must be an integer of at least 0, got -1"),
        ({"overlap": "a"}, "overlap must be an integer of at least 0, got 'a'"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
    ],
)
def test_what_is_said_of_wrong_arguments(changed, message):
    arguments = {"model": pair()[1], "image": random(3, 50, 50), "tile": 32} | changed
    with pytest.raises(ValueError, match=message):
        fastunet.predict(**arguments)


def test_a_model_on_two_devices():
    model = pair()[1]
    model.outc.to("meta")
    with pytest.raises(ValueError, match="the model must be on one device, got cpu, meta"):
        fastunet.predict(model, random(3, 50, 50))


VALUES = [0, 100, 255]


@pytest.fixture
def checkpoint(tmp_path):
    config = {"n_channels": 3, "n_classes": 3, "base_channels": 4, "depth": DEPTH}
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(
        path,
        {
            "config": config,
            "classes": ["none", "one", "two"],
            "mask_values": VALUES,
            "input": {"channels": 3, "mean": [0.4, 0.5, 0.6], "deviation": [0.2, 0.2, 0.3]},
            "state_dict": randomize(FastUNet(**config)).state_dict(),
        },
    )
    return path


def picture(path, height, width):
    array = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, tile=(32, 32), compression="zlib", photometric="rgb")
    elif path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def invoke(*arguments):
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def expected_mask(checkpoint, path):
    model, prepare = checkpoints.load_model(checkpoint)
    return torch.tensor(VALUES)[
        fastunet.predict(model, read_image(path), classes=True, prepare=prepare)
    ]


@pytest.mark.parametrize("most", [2**26, 1000], ids=["png", "tif"])
def test_a_folder(tmp_path, checkpoint, monkeypatch, most):
    """Any size and format; beyond some pixels as TIFF, piece by piece."""
    monkeypatch.setattr(prediction, "PNG_PIXELS", most)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no image")
    sizes = {"a.png": (150, 203), "b.JPG": (1, 1), "c.tif": (301, 170), "d.npy": (70, 300)}
    for name, size in sizes.items():
        picture(tmp_path / "in" / name, *size)
    done = invoke(tmp_path / "in", "--checkpoint", checkpoint, "--out", tmp_path / "out",
                  "--tile", 128, "--overlap", EXACT, "--batch-size", 2)  # fmt: skip
    assert done.exit_code == 0, done.output
    suffix = "png" if most > 1000 else "tif"
    names = [f"a.{suffix}", "b.png", f"c.{suffix}", f"d.{suffix}"]
    assert files(tmp_path / "out") == [f"{f}/{n}" for f in ("masks", "overlays") for n in names]
    for (name, size), written in zip(sizes.items(), names, strict=True):
        mask = read_mask(tmp_path / "out/masks" / written)
        expected = expected_mask(checkpoint, tmp_path / "in" / name)
        assert mask.shape == size
        assert (mask != expected).double().mean() < 1e-3  # where two logits are equal but rounding
        shown = read_image(tmp_path / "out/overlays" / written)
        assert shown.shape == (3, *size)
        grey = (shown - read_image(tmp_path / "in" / name)).abs().amax(0) < 0.02
        if size == (1, 1):
            continue
        assert mask.unique().tolist() == VALUES
        assert (grey == (mask == 0)).double().mean() > 0.99  # but where the image has that colour


def test_one_image_without_overlay(tmp_path, checkpoint):
    picture(tmp_path / "a.png", 100, 90)
    done = invoke(tmp_path / "a.png", "--checkpoint", checkpoint, "--out", tmp_path / "out",
                  "--no-overlay", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert files(tmp_path / "out") == ["masks/a.png"]
    assert torch.equal(
        read_mask(tmp_path / "out/masks/a.png"), expected_mask(checkpoint, tmp_path / "a.png")
    )


def test_what_is_there_is_kept(tmp_path, checkpoint):
    """The files that would be written alone are looked at; what is asked for is replaced."""
    image, out = tmp_path / "a.png", tmp_path / "out"
    picture(image, 40, 30)
    (out / "overlays").mkdir(parents=True)
    kept = out / "overlays" / "a.png"
    kept.write_text("mine")
    arguments = (image, "--checkpoint", checkpoint, "--out", out)
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert done.output == (
        f"Error: out must not hold '{kept}' yet: pass --overwrite to replace it.\n"
    )
    assert files(out) == ["overlays/a.png"]
    assert invoke(*arguments, "--no-overlay").exit_code == 0
    done = invoke(*arguments, "--no-overlay")
    assert f"out must not hold '{out / 'masks' / 'a.png'}' yet" in done.output
    assert kept.read_text() == "mine"
    done = invoke(*arguments, "--overwrite")
    assert done.exit_code == 0, done.output
    assert read_image(kept).shape == (3, 40, 30)


def test_the_documented_script(tmp_path, checkpoint, monkeypatch):
    """Predicts as the command does: with the normalisation of the training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    checkpoint.rename("run/best.pt")
    picture(tmp_path / "photo.jpg", 60, 50)
    picture(tmp_path / "slide.tif", 45, 70)
    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = {}
    exec(script, found)
    for classes, name in (
        (found["logits"].argmax(0), "photo.jpg"),
        (torch.from_numpy(np.load("classes.npy")).long(), "slide.tif"),
    ):
        assert torch.equal(torch.tensor(VALUES)[classes], expected_mask("run/best.pt", name))
        assert len(classes.unique()) == 3


def test_a_damaged_image_does_not_stop_the_others(tmp_path, checkpoint):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        picture(folder / name, 60, 70)
    content = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(content[: len(content) // 2])
    done = invoke(folder, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert done.output.startswith(
        f"Error: image '{folder / 'b.png'}' cannot be read: image file is"
    )
    names = ["a.png", "c.png"]
    assert files(tmp_path / "out") == [f"{f}/{n}" for f in ("masks", "overlays") for n in names]


def test_what_is_said_before_anything_is_written(tmp_path, checkpoint):
    good, out = tmp_path / "good", tmp_path / "out"
    for name in ("good", "empty", "twice", "grey", "broken", "masks"):
        (tmp_path / name).mkdir()
    for path in ("good/a.png", "twice/a.png", "twice/a.tif", "grey/a.png", "broken/a.png",
                 "masks/a.png"):  # fmt: skip
        picture(tmp_path / path, 20, 20)
    Image.new("L", (20, 20)).save(tmp_path / "grey" / "b.png")
    (tmp_path / "broken" / "b.png").write_bytes(b"no picture")
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((tmp_path / "none",), f"image '{tmp_path / 'none'}' is not a file"),
        ((tmp_path / "empty",), "empty' must hold images (.png, .jpg"),
        ((tmp_path / "twice",), "the images' names must differ in more than the suffix, got '"),
        ((tmp_path / "grey",), "b.png' must have the model's n_channels = 3 channels, got 1"),
        ((tmp_path / "broken",), "b.png' cannot be read: cannot identify image file"),
        ((good, "--device", "foo"), "device must be one that is there, got 'foo': "),
        ((good, "--tile", 3), "tile must be an integer of at least 2 * 2**depth = 8, got 3."),
        ((good, "--tile", 30, "--overlap", 20), "overlap must be at most half of a tile, 15"),
        ((good, "--batch-size", 0), "batch_size must be a positive integer, got 0."),
        ((good, "--checkpoint", good / "a.png"), "checkpoint '"),
        ((good, "--checkpoint", good / "b.pt"), "b.pt' is not a file."),
        ((tmp_path / "masks", "--out", tmp_path), "out must not be where it would replace"),
        ((tmp_path / "masks", "--out", tmp_path, "--overwrite"), "out must not be where it would"),
        ((good, "--out", tmp_path / "file"), "file"),
        ((good, "--til", "a"), "No such option"),
    ):
        before = files(tmp_path)
        done = invoke("--checkpoint", checkpoint, "--out", out, *arguments)
        assert done.exit_code in (1, 2)
        assert isinstance(done.exception, SystemExit), done.exception
        last = done.output.strip().splitlines()[-1]
        assert last.startswith("Error: ")
        assert message in last
        assert files(tmp_path) == before


def test_what_is_missing_is_said(monkeypatch, tmp_path, checkpoint):
    monkeypatch.setitem(sys.modules, "fastunet.prediction", None)
    done = invoke(tmp_path, "--checkpoint", checkpoint, "--out", tmp_path)
    assert done.exit_code == 1
    assert "predicting needs more packages, `pip install 'fastunet[predict]'` gets them" in (
        done.output
    )


LARGE = """
import resource, sys
import torch
from fastunet import prediction

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(1)
prediction.PNG_PIXELS = 2**20
idle = peak()
prediction.predict_files("small.tif", "checkpoint.pt", "out", 256, 32)
before = peak()
prediction.predict_files("large.tif", "checkpoint.pt", "out", 256, 32)
print(before - idle, peak() - before)
"""


def test_memory_does_not_follow_the_images_size(tmp_path, checkpoint):
    """The peak is that of an eighth of the image, which alone would be 36 MB as it is stored."""
    tall, wide = 4000, 3000
    stripe = np.add.outer(np.arange(256), np.arange(wide)).astype(np.uint8)
    block = np.stack([stripe, stripe // 2, stripe[:, ::-1]], -1)

    def blocks(height, width):
        for _ in range(-(-height // 256)):
            for left in range(0, width, 256):
                tile = np.zeros((256, 256, 3), np.uint8)
                part = block[:, left : left + 256][:, : width - left]
                tile[:, : part.shape[1]] = part
                yield tile

    for name, height, width in (("small.tif", 500, wide), ("large.tif", tall, wide)):
        tifffile.imwrite(
            tmp_path / name,
            blocks(height, width),
            shape=(height, width, 3),
            dtype=np.uint8,
            tile=(256, 256),
            photometric="rgb",
            compression="zlib",
        )
    ran = subprocess.run(
        [sys.executable, "-c", LARGE], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    first, more = map(float, ran.stdout.split())
    assert first < 300
    assert more < 30
    with ImageFile(tmp_path / "out/masks/large.tif", "mask") as mask:
        assert mask.shape == (1, tall, wide)
        found = mask.pixels(slice(3000, 3200), slice(1800, 2000))[0]
    with ImageFile(tmp_path / "large.tif") as image:
        around = image[:, 2700:3500, 1500:2300]
    model, prepare = checkpoints.load_model(checkpoint)
    classes = fastunet.predict(model, around, classes=True, prepare=prepare)
    expected = torch.tensor(VALUES)[classes][300:500, 300:500]
    assert (torch.from_numpy(found.astype(np.int64)) != expected).double().mean() < 0.1
