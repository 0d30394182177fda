"""Training a U-Net on people's own images: what ``fastunet train`` does."""

from .settings import Settings

__all__ = ["Settings", "train"]


def __getattr__(name: str):
    if name == "train":  # it takes MONAI, torchmetrics and TensorBoard with it
        from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
