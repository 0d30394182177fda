"""What is read for training, what is refused, and what becomes of it."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training.runs import command, draw, fails, options, write, write_folder

from fastunet import checkpoints
from fastunet.training import Settings, mni152
from fastunet.training.data import Crops, batches, open_data, survey
from fastunet.training.loop import train


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A tree as the Oxford-IIIT Pet dataset has it."""
    root = tmp_path_factory.mktemp("pets")
    for part, breeds in (("trainval", "abcdef"), ("test", "gh")):
        lines = []
        for breed in breeds:
            image, mask = draw(ord(breed), 30 + ord(breed) % 7, 41)
            write(root / "images" / f"{breed}_1.jpg", image if breed != "b" else image[..., 0])
            edge = mask != np.roll(mask, 1, 0)
            trimap = np.where(edge, 3, np.where(mask == 1, 1, 2)).astype("u1")
            write(root / "annotations" / "trimaps" / f"{breed}_1.png", trimap)
            lines.append(f"{breed}_1 1 1 1\n")
        (root / "annotations" / f"{part}.txt").write_text("".join(lines))
    return root


def pet_options(root, out, **changes) -> dict:
    return options(root, out, data="oxford-pet", root=root, images=None, masks=None, **changes)


@pytest.mark.parametrize(
    "suffixes",
    [
        (".jpg", ".png"),
        (".tif", ".tiff"),
        (".npy", ".npy"),
        (".png", ".npy"),
        (".jpg", "_mask.gif"),
    ],
)
def test_formats(tmp_path, suffixes):
    root = write_folder(tmp_path, suffixes, count=4)
    (root / "images" / "Thumbs.db").write_text("no image")
    changes = {"mask_suffix": "_mask"} if suffixes[1].startswith("_mask") else {}
    data = open_data(Settings(**options(root, tmp_path / "run", **changes)))
    assert len(data.train) == 3
    for part in data.train, data.validation:
        for index in range(len(part)):
            image, mask = part[index]
            number = int(part.pairs[index][0].stem)
            pixels, truth = draw(number, 20 + 7 * number, 50 - 3 * number)
            assert torch.equal(mask, torch.from_numpy(truth).long())
            assert image.dtype == torch.float32
            exact = torch.from_numpy(pixels).permute(2, 0, 1) / 255
            lossy = suffixes[0] == ".jpg"
            assert (image - exact).abs().mean() < (0.1 if lossy else 1e-6)


def test_pets(pets, tmp_path):
    result = train(Settings(**pet_options(pets, tmp_path / "run")))
    assert {"test", "best"} == {*result}
    assert 0 < result["test"]["dice/pet"] < 1
    checkpoint = checkpoints.load(tmp_path / "run" / "last.pt")
    assert checkpoint["classes"] == ["pet", "background", "border"]
    assert checkpoint["mask_values"] == [1, 2, 3]
    assert checkpoint["input"]["channels"] == 3


def test_pets_parts_are_apart(pets, tmp_path):
    data = open_data(Settings(**pet_options(pets, tmp_path)))
    names = [{path.stem[0] for path, _ in part.pairs} for part in data[:3]]
    assert names[0] | names[1] == {*"abcdef"}
    assert not names[0] & names[1]
    assert names[2] == {*"gh"}


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("annotations/trainval.txt", "--root must hold annotations/trainval.txt"),
        ("annotations/test.txt", "--root must hold annotations/test.txt"),
        ("images/c_1.jpg", "names c_1, but"),
        ("annotations/trimaps/h_1.png", "names h_1, but"),
    ],
)
def test_incomplete_pets(pets, tmp_path, gone, message):
    root = shutil.copytree(pets, tmp_path / "pets")
    (root / gone).unlink()
    out = tmp_path / "run"
    given = {"data": "oxford-pet", "root": root, "images": None, "masks": None}
    assert message in fails(command(root, out, **given))
    assert not out.exists()


def test_mni152(tmp_path):
    pytest.importorskip("nilearn", reason="needs nilearn, of fastunet[train]")
    data = open_data(Settings(data="mni152", out=tmp_path))
    train_slices, held_out = mni152.load()
    assert len(data.train) == len(train_slices.z)
    assert torch.equal(data.validation[3][0], held_out.images[3])
    assert data.classes == ["other", "grey", "white"]


def test_what_mni152_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nilearn", None)
    message = fails(["train", "--data", "mni152", "--out", str(tmp_path / "run")])
    assert "`pip install 'fastunet[train]'` gets them: " in message
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^train = \[(.*?)\]$", text, re.DOTALL | re.MULTILINE)
    assert '"nilearn' in extra


def test_survey_measures_the_training_images(folder, tmp_path):
    settings = Settings(**options(folder, tmp_path))
    data = open_data(settings)
    input, values = survey(data, settings, quiet=True)
    pixels = torch.cat([data.train[i][0].flatten(1) for i in range(len(data.train))], 1).double()
    assert input["channels"] == 3
    assert input["mean"] == pytest.approx(pixels.mean(1).tolist())
    assert input["deviation"] == pytest.approx(pixels.std(1, correction=0).tolist())
    assert values == [0, 1]


def test_mask_values_become_classes(folder, tmp_path):
    """0 and 255, as many tools write them; the smallest value need not be the first class."""
    root = shutil.copytree(folder, tmp_path / "f")
    for index in range(8):
        write(root / "masks" / f"{index}.png", draw(index, 20 + 7 * index, 50 - 3 * index)[1] * 255)
    settings = Settings(**options(root, tmp_path / "run", mask_values="255,0", epochs=1))
    data = open_data(settings)
    crops = Crops(data.train, [255, 0], settings)
    assert crops[0, 0][1].unique().tolist() == [0, 1]
    train(settings)
    assert checkpoints.load(tmp_path / "run" / "last.pt")["mask_values"] == [255, 0]
    message = fails(command(root, tmp_path / "other"))
    assert "masks must hold the classes 0, 1, ... without gaps, got 0, 255" in message
    assert "--mask-values 0,255" in message


def test_order_of_an_epoch():
    whole = batches(20, 6, seed=1, epoch=2, start=0, rank=0, world=1)
    assert len(whole) == 3
    seen = [index for batch in whole for epoch, index in batch]
    assert len({*seen}) == 18
    assert whole[1:] == batches(20, 6, seed=1, epoch=2, start=1, rank=0, world=1)
    assert batches(20, 6, seed=1, epoch=2, start=3, rank=0, world=1) == []
    ranks = [batches(20, 6, seed=1, epoch=2, start=0, rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    for seed, epoch in ((1, 3), (2, 2)):
        others = batches(20, 6, seed=seed, epoch=epoch, start=0, rank=0, world=1)
        assert [index for batch in others for _, index in batch] != seen


@pytest.mark.parametrize("augment", [False, True])
def test_crops_follow_from_seed_epoch_and_index(folder, tmp_path, augment):
    def crop(epoch: int, index: int, seed: int = 0, noise: int = 0):
        torch.manual_seed(noise)
        settings = Settings(**options(folder, tmp_path, seed=seed, augment=augment, size=24))
        data = open_data(Settings(**options(folder, tmp_path)))
        return Crops(data.train, [0, 1], settings)[epoch, index]

    image, mask = crop(3, 4)
    again, mask_again = crop(3, 4, noise=1)
    assert torch.equal(image, again)
    assert torch.equal(mask, mask_again)
    assert image.shape == (3, 24, 24)
    assert mask.shape == (24, 24)
    assert mask.dtype == torch.long
    assert type(image) is type(mask) is torch.Tensor
    for other in crop(2, 4)[0], crop(3, 4, seed=1)[0]:
        assert not torch.equal(image, other)


def test_masks_move_with_their_images(tmp_path):
    """An image that is its own mask stays so, but for interpolation at edges, where no class may
    appear that lies between two others."""
    root = tmp_path / "f"
    for index in range(2):
        mask = draw(index, 60, 70)[1]
        write(root / "images" / f"{index}.png", np.repeat(mask[..., None] * 255, 3, 2))
        write(root / "masks" / f"{index}.png", mask * 2)
    settings = Settings(**options(root, tmp_path))
    crops = Crops(open_data(settings).train, [0, 1, 2], settings)
    masks = set()
    for epoch in range(20):
        image, mask = crops[epoch, 0]
        middle = (image.amin() + image.amax()) / 2
        assert {*mask.unique().tolist()} <= {0, 2}
        if mask.unique().numel() == 2:
            assert ((image[0] > middle) != (mask == 2)).float().mean() < 0.05
            masks.add(mask.numpy().tobytes())
    assert len(masks) > 10


def test_crops_of_smaller_images(tmp_path):
    root = tmp_path / "f"
    for index in range(2):
        image, mask = draw(index, 5, 7)
        write(root / "images" / f"{index}.png", image)
        write(root / "masks" / f"{index}.png", mask)
    settings = Settings(**options(root, tmp_path, augment=False, size=64))
    image, mask = Crops(open_data(settings).train, [0, 1], settings)[0, 0]
    assert image.shape == (3, 64, 64)
    assert mask.float().mean() > 0.1  # mirrored, not filled


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def another(path, *size: int) -> None:
    """Another image or mask in its place, of this shape."""
    write(path, np.random.default_rng(0).integers(0, 2, size, dtype="u1"))


SPOILT = {  # folders of images and masks, and what is said of them
    "no image": (lambda i, m: [p.unlink() for p in i.iterdir()], "must hold images (.png"),
    "no mask": (lambda i, m: [p.unlink() for p in m.iterdir()], "must hold masks (.png"),
    "no folder": (lambda i, m: shutil.rmtree(m), "--masks must be a folder, got"),
    "one image": (
        lambda i, m: [(i / f"{n}.png").unlink() for n in range(1, 8)],
        "two images are needed, to train and to validate on, got 1",
    ),
    "mask missing": (
        lambda i, m: (m / "3.png").unlink(),
        "3.png must have a mask of the stem '3' in",
    ),
    "two masks": (lambda i, m: shutil.copy(m / "3.png", m / "3.tif"), "got two of '3'"),
    "truncated image": (lambda i, m: truncate(i / "3.png"), "3.png' cannot be read"),
    "truncated mask": (lambda i, m: truncate(m / "3.png"), "3.png' cannot be read"),
    "empty file": (lambda i, m: (i / "3.png").write_bytes(b""), "3.png' cannot be read"),
    "sizes": (lambda i, m: another(m / "3.png", 9, 8), "must be of one size, got 41x41 and 9x8"),
    "channels": (
        lambda i, m: another(i / "3.png", 41, 41),
        "images must have the same channels, got",
    ),
    "small": (
        lambda i, m: (another(i / "3.png", 3, 41, 3), another(m / "3.png", 3, 41)),
        "3.png must be at least 2**depth = 4 high and wide, got 3x41",
    ),
    "class": (
        lambda i, m: write(m / "3.png", np.full((41, 41), 7, "u1")),
        "masks must hold the classes 0, 1, ... without gaps, got 0, 1, 7",
    ),
}


@pytest.mark.parametrize("fault", [*SPOILT])
def test_bad_images(folder, tmp_path, fault):
    spoil, message = SPOILT[fault]
    root, out = shutil.copytree(folder, tmp_path / "f"), tmp_path / "run"
    spoil(root / "images", root / "masks")
    assert message in fails(command(root, out))
    assert not out.exists()


def test_bad_images_in_other_processes(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "f")
    truncate(root / "masks" / "3.png")
    message = fails(command(root, tmp_path / "run", workers=1))
    assert message.startswith("mask '")
    assert "cannot be read" in message


def test_mask_value_that_is_not_given(folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "f")
    write(root / "masks" / "3.png", np.full((41, 41), 7, "u1"))
    message = fails(command(root, tmp_path / "run", mask_values="0,1"))
    assert message.endswith("3.png must hold 0, 1 alone, got 7.")


def test_file_that_changes_during_training(folder, tmp_path):
    settings = Settings(**options(folder, tmp_path))
    with pytest.raises(ValueError, match="must hold 0, 5 alone"):
        Crops(open_data(settings).train, [0, 5], settings)[0, 0]
