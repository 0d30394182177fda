"""The script of train.py in Lightning.

Here too one line was changed to train with FastUNet: where UNet comes from.
"""

from pathlib import Path

import click
import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from train import Pairs

from fastunet import FastUNet as UNet  # was: from unet import UNet


class Segmentation(L.LightningModule):
    def __init__(self, classes: int, base_channels: int):
        super().__init__()
        self.unet = UNet(n_channels=3, n_classes=classes, base_channels=base_channels)

    def training_step(self, batch, index):
        image, mask = batch
        loss = F.cross_entropy(self.unet(image), mask)
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=len(image))
        return loss

    def on_train_epoch_end(self):
        loss = self.trainer.callback_metrics["loss"]
        self.print(f"epoch {self.current_epoch + 1}: loss {loss:.4f}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


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
    L.seed_everything(0)
    model = Segmentation(classes, base_channels)
    loader = DataLoader(Pairs(images, masks, size), batch_size, shuffle=True)
    trainer = L.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, loader)
    torch.save(model.unet.state_dict(), output)


if __name__ == "__main__":
    main()
