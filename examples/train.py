"""A plain training script: a U-Net on a folder of images and a folder of masks of the same names.

To train with FastUNet, one line was changed: where UNet comes from.
"""

from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from fastunet import FastUNet as UNet  # was: from unet import UNet


class Pairs(Dataset):
    """Images [3, H, W] in 0..1 and masks [H, W] of class numbers, all resized to one size."""

    def __init__(self, images: Path, masks: Path, size: int):
        self.images = sorted(images.glob("*.png")) + sorted(images.glob("*.jpg"))
        self.masks = masks
        self.size = (size, size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        path = self.images[index]
        image = Image.open(path).convert("RGB").resize(self.size)
        mask = Image.open(self.masks / f"{path.stem}.png")
        mask = mask.resize(self.size, Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return pixels, torch.from_numpy(np.array(mask)).long()


@click.command(help=__doc__)
@click.argument("images", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("masks", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--classes", default=2, show_default=True)
@click.option("--base-channels", default=64, show_default=True)
@click.option("--epochs", default=5, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--size", default=256, show_default=True, help="Height and width in pixels.")
@click.option("--output", default="unet.pth", show_default=True, help="For the state_dict.")
def main(images, masks, classes, base_channels, epochs, batch_size, size, output):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = UNet(n_channels=3, n_classes=classes, base_channels=base_channels).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(Pairs(images, masks, size), batch_size, shuffle=True)
    for epoch in range(epochs):
        total = 0.0
        for image, mask in loader:
            loss = F.cross_entropy(model(image.to(device)), mask.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(image)
        print(f"epoch {epoch + 1}: loss {total / len(loader.dataset):.4f}")
    torch.save(model.state_dict(), output)


if __name__ == "__main__":
    main()
