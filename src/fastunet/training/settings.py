"""What a training run is told: the options of ``fastunet train``, each once."""
# ruff: noqa: RUF009 (option is dataclasses.field)

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastunet import FastUNet
from fastunet.reference import UNet
from fastunet.reference.unet import NORMS, is_per_channel, make_norm

MODELS: dict[str, type[UNet]] = {"fast": FastUNet, "reference": UNet}


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a run.

    Raises:
        ValueError: for a value outside of what its option allows.
    """

    data: str = option("folder", "What to learn from.", ("folder", "oxford-pet", "mni152"))
    images: Path | None = option(None, "Folder of images.  [folder]")
    masks: Path | None = option(None, "Folder of masks, with the images' stems.  [folder]")
    mask_suffix: str = option(
        "", "Of a mask's stem, after its image's: _mask for photo_mask.gif.  [folder]"
    )
    root: Path | None = option(None, "Folder with images/ and annotations/.  [oxford-pet]")
    mask_values: str | None = option(
        None, "Of the classes, such as 0,255.  [default: those found, from 0 without gaps]"
    )
    out: Path = option(Path("run"), "Folder for checkpoints and logs.")
    resume: bool = option(False, "Continue the run in --out where its newest checkpoint is.")
    weights: Path | None = option(
        None, "File of weights to start from, such as a .pth; with --resume not read again."
    )
    model: str = option("fast", "FastUNet, or the same in plain PyTorch.", (*MODELS,))
    base: int = option(64, "Channels of the first level.")
    depth: int = option(4, "Number of poolings.")
    bilinear: bool = option(False, "Upsample bilinearly instead of by transposed convolutions.")
    norm: str = option("batch", "Normalisation.", NORMS)
    sync_bn: bool = option(False, "BatchNorm's statistics are of all processes' images.")
    checkpointing: str = option("none", "What backward makes again.", FastUNet.policies)
    epochs: int = option(20, "Times that every image is seen.")
    batch_size: int = option(4, "Images per step, of all processes together.")
    size: int = option(256, "Height and width of the crops to train on, in pixels.")
    lr: float = option(1e-3, "Learning rate of AdamW; falls to 0 as a cosine.")
    amp: str = option("none", "Autocast to this type.", ("none", "bf16", "fp16"))
    augment: bool = option(True, "Flip, rotate, scale, and change the colours of crops.")
    val_share: float = option(0.1, "Part of the images to validate on; mni152 has its own.")
    seed: int = option(0, "Of weights, split, order and augmentation.")
    save_every: int = option(100, "Steps between checkpoints; each epoch ends with one too.")
    workers: int = option(2, "Processes that read images; 0 for none.")
    device: str | None = option(None, "cpu or cuda.  [default: cuda where there is one]")

    def __post_init__(self) -> None:
        for name, entry in self.__dataclass_fields__.items():
            value, choices = getattr(self, name), entry.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{flag(name)} must be one of {', '.join(choices)}, got {value!r}")
        needed = {"folder": ("images", "masks"), "oxford-pet": ("root",), "mni152": ()}[self.data]
        for name in ("images", "masks", "root"):
            if (getattr(self, name) is not None) != (name in needed):
                verb = "needs" if name in needed else "takes no"
                raise ValueError(f"--data {self.data} {verb} {flag(name)}")
        if self.mask_suffix and self.data != "folder":
            raise ValueError(f"--data {self.data} takes no --mask-suffix")
        for name in ("base", "depth", "epochs", "batch_size", "size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag(name)} must be at least 0, got {getattr(self, name)}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be a positive number, got {self.lr}")
        if not 0 < self.val_share < 1:
            raise ValueError(f"--val-share must be between 0 and 1, got {self.val_share}")
        if self.depth > 16 or self.size < 2**self.depth:
            raise ValueError(
                f"--size must be at least 2**depth, got {self.size} with --depth {self.depth}"
            )
        if self.lone_pixel() and self.size < 2 * 2**self.depth:
            why = "--batch-size 1" if self.norm == "batch" else f"--norm {self.norm}"
            raise ValueError(
                f"--size must be at least 2 * 2**depth with {why}, "
                f"got {self.size} with --depth {self.depth}"
            )
        if self.sync_bn and self.norm != "batch":
            raise ValueError(f"--sync-bn needs --norm batch, got {self.norm!r}")
        policies = MODELS[self.model].policies
        if self.checkpointing not in policies:
            raise ValueError(
                f"--checkpointing of --model {self.model} must be one of {', '.join(policies)}, "
                f"got {self.checkpointing!r}"
            )
        self.values()

    def lone_pixel(self) -> bool:
        """Whether a deepest map of one pixel would be normalised by that value alone, to 0."""
        channels = self.base * 2**self.depth // (2 if self.bilinear else 1)
        if self.norm == "batch":
            return self.batch_size == 1
        return any(map(is_per_channel, make_norm(self.norm, channels)))

    def values(self) -> list[int] | None:
        """Of the classes in mask files, where they are given."""
        if self.mask_values is None:
            return [1, 2, 3] if self.data == "oxford-pet" else None
        try:
            found = [int(value) for value in self.mask_values.split(",")]
        except ValueError:
            found = []
        if len(found) < 2 or len({*found}) < len(found):
            raise ValueError(
                f"--mask-values must be two or more different integers with commas between them, "
                f"got {self.mask_values!r}"
            )
        for value in found:
            if not 0 <= value <= 65535:  # what a mask file can hold
                raise ValueError(f"--mask-values must be in 0..65535, got {value}")
        return found

    def trajectory(self) -> dict[str, Any]:
        """The options that decide what is computed, which a resumed run must share."""
        free = {"out", "resume", "checkpointing", "save_every", "workers", "device"}
        free |= {"images", "masks", "mask_suffix", "root"}  # data may move, but not change
        free |= {"weights"}  # not read again
        return {name: value for name, value in asdict(self).items() if name not in free}


def flag(name: str) -> str:
    """How the command line spells an option."""
    return f"--{name.replace('_', '-')}"
