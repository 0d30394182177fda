"""A human head to learn from: the MNI152 template, with maps of its grey and white matter.

The average of 152 T1-weighted MR scans (Fonov et al., NeuroImage 54, 2011), 1 mm, brain only. It
comes inside the nilearn package, so nothing is downloaded.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLASSES = ("other", "grey", "white")
HELD_OUT = (range(48, 58), range(94, 104))  # cerebellum to temporal lobes; ventricles
GAP = 8  # slices on either side of a held-out block that nobody sees: neighbours look alike
LEAST_BRAIN = 0.01  # a slice with a smaller part of brain counts as empty


class Slices(NamedTuple):
    images: Tensor  # [N, 1, 197, 233] float32
    labels: Tensor  # [N, 197, 233] int64, an index into CLASSES
    z: list[int]  # [N] where in the volume each slice lies

    def to(self, device: torch.device) -> "Slices":
        return Slices(self.images.to(device), self.labels.to(device), self.z)


def load() -> tuple[Slices, Slices]:
    """The training slices and the held-out slices.

    The image has zero mean and unit variance inside the head. A voxel's label is the likeliest of
    "neither", grey and white matter.
    """
    from nilearn import datasets

    image = datasets.load_mni152_template(resolution=1).get_fdata(dtype=np.float32)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)

    head = image > 0
    brain_part = head.mean(axis=(0, 1))
    image = (image - image[head].mean()) / image[head].std()
    labels = np.stack([1 - grey - white, grey, white]).argmax(axis=0)

    def take(z: list[int]) -> Slices:
        images = torch.from_numpy(image[:, :, z]).permute(2, 0, 1).unsqueeze(1)
        return Slices(images.contiguous(), torch.from_numpy(labels[:, :, z]).permute(2, 0, 1), z)

    full = [z for z in range(image.shape[2]) if brain_part[z] >= LEAST_BRAIN]
    train, held_out = split(full)
    return take(train), take(held_out)


def split(slices: list[int]) -> tuple[list[int], list[int]]:
    """The slices to train on, and those held out; the ones in a gap are in neither."""
    held_out = [z for z in slices if any(z in block for block in HELD_OUT)]
    near = {z + offset for z in held_out for offset in range(-GAP, GAP + 1)}
    return [z for z in slices if z not in near], held_out
