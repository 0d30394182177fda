"""Images with masks: where they come from, what is in them, and how crops are made of them.

Whatever is random follows from (seed, epoch, index) alone, so that a run can go on from any step.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandScaleIntensityd,
    RandSpatialCropd,
    SpatialPadd,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from fastunet.images import SUFFIXES, read_image, read_mask

from . import mni152
from .settings import Settings

Pair = tuple[Tensor, Tensor]  # image [C, H, W] float32, mask [H, W] int64
Key = tuple[int, int]  # epoch, index

PET = ["pet", "background", "border"]  # 1, 2 and 3 in a trimap


class Files(Dataset[Pair]):
    """Pairs of an image's and a mask's file."""

    def __init__(self, pairs: list[tuple[Path, Path]], rgb: bool = False):
        self.pairs = pairs
        self.rgb = rgb  # greys too become three channels

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        image, mask = read_image(self.pairs[index][0]), read_mask(self.pairs[index][1])
        if self.rgb and len(image) == 1:
            image = image.expand(3, -1, -1)
        if image.shape[1:] != mask.shape:
            raise ValueError(
                f"{self.name(index)} and its mask must be of one size, got "
                f"{by(image.shape[1:])} and {by(mask.shape)}"
            )
        return image, mask

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])


class Slices(Dataset[Pair]):
    """Slices of the MNI152 head."""

    def __init__(self, slices: mni152.Slices):
        self.slices = slices

    def __len__(self) -> int:
        return len(self.slices.z)

    def __getitem__(self, index: int) -> Pair:
        return self.slices.images[index], self.slices.labels[index]

    def name(self, index: int) -> str:
        return f"mni152 slice {self.slices.z[index]}"


class Data(NamedTuple):
    train: Any  # a Dataset of Pairs with name(index)
    validation: Any
    test: Any | None  # what neither of them sees
    classes: list[str] | None  # names, where they are known


def open_data(settings: Settings) -> Data:
    """Finds the files of a run; none is read yet, but for the mni152 template.

    Raises:
        FileNotFoundError: a folder or file that the layout asks for is missing.
        ValueError: the folder is empty, or an image lacks its mask.
    """
    if settings.data == "mni152":
        train, held_out = map(Slices, mni152.load())
        return Data(train, held_out, None, [*mni152.CLASSES])
    if settings.data == "oxford-pet":
        assert settings.root is not None
        pairs, test = (pets(settings.root, part) for part in ("trainval", "test"))
        return Data(*split(pairs, settings), Files(test, rgb=True), PET)
    assert settings.images is not None
    assert settings.masks is not None
    pairs = pair_up(settings.images, settings.masks, settings.mask_suffix)
    return Data(*split(pairs, settings), None, None)


def pair_up(images: Path, masks: Path, suffix: str = "") -> list[tuple[Path, Path]]:
    """Each image with the mask of its stem and the suffix, in the order of names."""
    by_stem: dict[str, Path] = {}
    for mask in files_in(masks, "masks"):
        if mask.stem in by_stem:
            raise ValueError(f"{masks} must have one mask of a stem, got two of {mask.stem!r}")
        by_stem[mask.stem] = mask
    found = files_in(images, "images")
    for image in found:
        if (stem := image.stem + suffix) not in by_stem:
            raise ValueError(f"{image} must have a mask of the stem {stem!r} in {masks}, got none")
    return [(image, by_stem[image.stem + suffix]) for image in found]


def files_in(folder: Path, what: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"--{what} must be a folder, got {str(folder)!r}")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} must hold {what} ({', '.join(SUFFIXES)}), got none")
    return found


def pets(root: Path, part: str) -> list[tuple[Path, Path]]:
    """Images and trimaps of a part of the Oxford-IIIT Pet dataset, in its own layout."""
    names = root / "annotations" / f"{part}.txt"
    if not names.is_file():
        raise FileNotFoundError(f"--root must hold annotations/{part}.txt, got {str(root)!r}")
    stems = [
        line.split()[0] for line in names.read_text(errors="replace").splitlines() if line.strip()
    ]
    if not stems:
        raise ValueError(f"{names} must name images, got none")
    trimaps = root / "annotations" / "trimaps"
    pairs = [(root / "images" / f"{stem}.jpg", trimaps / f"{stem}.png") for stem in stems]
    for path in (path for pair in pairs for path in pair):
        if not path.is_file():
            raise FileNotFoundError(f"{names} names {path.stem}, but {path} is not a file")
    return pairs


def split(pairs: list[tuple[Path, Path]], settings: Settings) -> tuple[Files, Files]:
    """For training and for validation, shuffled by the seed alone."""
    if len(pairs) < 2:
        raise ValueError(f"two images are needed, to train and to validate on, got {len(pairs)}")
    order = permutation(len(pairs), settings.seed)
    held_out = min(max(1, round(settings.val_share * len(pairs))), len(pairs) - 1)
    rgb = settings.data == "oxford-pet"
    parts = sorted(order[held_out:]), sorted(order[:held_out])
    train, validation = (Files([pairs[i] for i in part], rgb) for part in parts)
    return train, validation


class Seen(NamedTuple):
    """What one look at an image and its mask tells."""

    shape: tuple[int, int, int]
    sums: Tensor  # [2, C] float64, of values and of squares
    values: list[int]


class Survey(Dataset):
    """Looks at every image once; a fault is a sentence, whole across processes."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Seen | str:
        try:
            image, mask = self.source[index]
        except (OSError, ValueError) as error:
            return str(error)
        exact = image.double().flatten(1)
        sums = torch.stack([exact.sum(1), exact.square().sum(1)])
        c, h, w = image.shape
        return Seen((c, h, w), sums, mask.unique().tolist())

    def look(self, workers: int, quiet: bool) -> Iterator[tuple[str, Seen]]:
        loader = DataLoader(self, batch_size=None, num_workers=workers)
        progress = tqdm(loader, desc="checking images", leave=False, disable=quiet or None)
        for index, seen in enumerate(progress):
            if isinstance(seen, str):
                raise ValueError(seen)
            yield self.source.name(index), seen


def survey(data: Data, settings: Settings, quiet: bool) -> tuple[dict[str, Any], list[int]]:
    """Checks every image and mask, before any work is lost on the way to a bad one.

    Returns:
        A checkpoint's ``input``: channels, and of each its mean and deviation over the pixels of
        the images to train on; and the mask's value of each class.

    Raises:
        ValueError: an image or mask cannot be read, or does not go with the others.
    """
    given = settings.values()
    least = 2**settings.depth
    first: tuple[str, int] | None = None
    found: dict[int, str] = {}
    sums, pixels = torch.zeros(()), 0
    for part in (data.train, data.validation, data.test):
        for name, seen in Survey(part).look(settings.workers, quiet) if part is not None else ():
            c, h, w = seen.shape
            first = first or (name, c)
            if c != first[1]:
                raise ValueError(
                    f"images must have the same channels, got {first[1]} in {first[0]} "
                    f"and {c} in {name}"
                )
            if min(h, w) < least:
                raise ValueError(
                    f"{name} must be at least 2**depth = {least} high and wide, got {h}x{w}"
                )
            for value in seen.values:
                if given is not None and value not in given:
                    raise ValueError(
                        f"the mask of {name} must hold {listed(given)} alone, got {value}"
                    )
                found.setdefault(value, name)
            if part is data.train:
                sums, pixels = sums + seen.sums, pixels + h * w
    values = sorted(found) if given is None else given
    if given is None and (values != [*range(len(values))] or len(values) < 2):
        raise ValueError(
            f"masks must hold the classes 0, 1, ... without gaps, got {listed(values)}: name the "
            f"value of each class, such as --mask-values 0,255"
        )
    mean, square = sums / pixels
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    deviation[deviation < 1e-6] = 1  # a constant channel
    channels = len(mean)
    return {"channels": channels, "mean": mean.tolist(), "deviation": deviation.tolist()}, values


class Crops(Dataset[Pair]):
    """Crops [C, size, size] and the classes [size, size] in them, by (epoch, index)."""

    def __init__(self, source: Any, values: list[int], settings: Settings):
        self.source, self.values, self.seed = source, values, settings.seed
        self.transform = transform(settings.size, settings.augment)

    def __getitem__(self, key: Key) -> Pair:
        epoch, index = key
        image, mask = classes_of(self.source, index, self.values)
        self.transform.set_random_state(derive(self.seed, epoch, index))
        crop = self.transform({"image": image, "mask": mask[None]})
        return crop["image"].as_tensor().contiguous(), crop["mask"].as_tensor()[0].long()


class Whole(Dataset[Pair]):
    """Images as they are, with the classes [H, W] in them."""

    def __init__(self, source: Any, values: list[int]):
        self.source, self.values = source, values

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Pair:
        return classes_of(self.source, index, self.values)


def classes_of(source: Any, index: int, values: list[int]) -> Pair:
    image, mask = source[index]
    classes = torch.full_like(mask, -1)
    for number, value in enumerate(values):
        classes[mask == value] = number
    if (classes < 0).any():
        raise ValueError(f"the mask of {source.name(index)} must hold {listed(values)} alone")
    return image, classes


def transform(size: int, augment: bool) -> Compose:
    """A crop of the image and its mask, mirrored at the edges where they are smaller."""
    both = ("image", "mask")
    steps: list[Any] = [
        SpatialPadd(both, (size, size), mode="symmetric"),
        RandSpatialCropd(both, (size, size), random_size=False),
    ]
    if augment:
        steps += [
            RandFlipd(both, prob=0.5, spatial_axis=1),
            RandAffined(
                both,
                prob=0.5,
                rotate_range=np.pi / 12,
                scale_range=0.2,
                mode=("bilinear", "nearest"),
                padding_mode="reflection",
            ),
            RandScaleIntensityd("image", prob=0.5, factors=0.1, channel_wise=True),
            RandAdjustContrastd("image", prob=0.5, gamma=(0.8, 1.25)),
        ]
    return Compose(steps)


def batches(
    count: int, batch_size: int, seed: int, epoch: int, start: int, rank: int, world: int
) -> Sequence[list[Key]]:
    """A process's share of each step's batch in an epoch, from step ``start`` on."""
    order = permutation(count, seed, epoch)
    share = batch_size // world
    begins = (step * batch_size + rank * share for step in range(start, count // batch_size))
    return [[(epoch, index) for index in order[begin : begin + share]] for begin in begins]


def shared(source: Dataset, rank: int, world: int) -> Subset:
    return Subset(source, range(rank, len(source), world))  # type: ignore[arg-type]


def permutation(count: int, *seeds: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive(*seeds))
    return torch.randperm(count, generator=generator).tolist()


def derive(*seeds: int) -> int:
    return int(np.random.SeedSequence(seeds).generate_state(1)[0])


def listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
