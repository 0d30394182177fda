"""The training loop: steps, validation, checkpoints, logs."""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from fastunet import checkpoints
from fastunet.checkpoints import Checkpoint, normalize
from fastunet.reference import UNet
from fastunet.tiling import TILE, predict_bands
from fastunet.weights import find_weights, load_weights, options, read, strip_prefix

from .data import Crops, Data, Whole, batches, open_data, shared, survey
from .processes import Place, Signals, ignore_signals, process_group
from .settings import MODELS, Settings, flag

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
NEWEST, BEST = "last.pt", "best.pt"
WEIGHTS, LOG, RESULT = "model.safetensors", "log.csv", "result.json"
COUNTED = 2**22  # pixels that are scored at once

objective = DiceCELoss(to_onehot_y=True, softmax=True)
"""Cross-entropy plus soft Dice, each a mean over images of one size, so that ranks' means agree."""


class Interrupted(Exception):
    """A signal asked to stop; the newest checkpoint is where the run is."""

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


def train(settings: Settings) -> dict[str, Any]:
    """Trains a U-Net, and writes into ``settings.out``:

    last.pt and best.pt (see ``fastunet.checkpoints``; the second has the best mean Dice of the
    validation images and no optimizer), model.safetensors (its weights), log.csv (a row per epoch),
    tensorboard/ and result.json.

    Under ``torchrun`` the processes share each batch, and the first one writes. BatchNorm's
    statistics are then of each process's own share, or with ``sync_bn`` of all.

    Returns:
        What result.json holds: the scores of the best epoch, and on images of a test part.

    Raises:
        ValueError: the settings or the data do not go together; the sentence says what must hold.
        OSError: a file is missing or cannot be written; the checkpoint before it is intact.
        MemoryError: a step, or a tile to validate on, did not fit; the sentence says what to try.
        Interrupted: by SIGINT or SIGTERM, after the newest checkpoint was written.
    """
    with process_group(settings) as place:
        if settings.sync_bn and settings.model == "reference" and place.device.type == "cpu":
            raise ValueError("--sync-bn of --model reference needs a GPU, as in PyTorch itself")
        newest = settings.out / NEWEST
        checkpoint = checkpoints.load(newest) if settings.resume else None
        if checkpoint is None:
            check_out(settings.out)
        data = open_data(settings)
        check_batch(settings, len(data.train), place)
        if checkpoint is None and settings.weights is not None:
            check_weights(settings, settings.weights, data)
        input, values = survey(data, settings, quiet=not place.writes)
        run = Run(settings, place, data, input, values)
        if checkpoint is not None:
            run.restore(checkpoint, str(newest))
        if place.writes:
            prepare(settings.out)
        try:
            with run.signals:
                return run.finish()
        finally:
            run.wrapped = run.model  # the group ends with ``place``, not whenever a traceback does


def check_out(out: Path) -> None:
    """Nothing that a run would replace is there; of tensorboard/ it replaces nothing."""
    if there := [name for name in (NEWEST, BEST, WEIGHTS, LOG, RESULT) if (out / name).exists()]:
        ways = "pass --resume to continue its run" if NEWEST in there else "choose another"
        raise ValueError(f"--out {out} must be new or empty, it has {', '.join(there)}: {ways}")


def check_weights(settings: Settings, path: Path, data: Data) -> None:
    """Before all images are read: as many classes as the file has, where masks alone tell that."""
    if classes := data.classes or settings.values():
        n_classes = len(classes)
    else:
        where = f"checkpoint {str(path)!r}"
        found = strip_prefix(find_weights(read(str(path), where))[0], where)
        n_classes = int(options(found).get("n_classes", 2))
    load_weights(new_model(settings, len(data.train[0][0]), n_classes)[0], path)


def new_model(settings: Settings, n_channels: int, n_classes: int) -> tuple[UNet, dict[str, Any]]:
    """And its constructor arguments."""
    config: dict[str, Any] = {
        "n_channels": n_channels,
        "n_classes": n_classes,
        "bilinear": settings.bilinear,
        "base_channels": settings.base,
        "depth": settings.depth,
        "norm": settings.norm,
    }
    return MODELS[settings.model](**config, checkpointing=settings.checkpointing), config


def check_batch(settings: Settings, images: int, place: Place) -> None:
    if settings.batch_size > images:
        raise ValueError(
            f"--batch-size must be at most the {images} images to train on, "
            f"got {settings.batch_size}"
        )
    if settings.batch_size % place.world:
        raise ValueError(
            f"--batch-size must be a multiple of the {place.world} processes, "
            f"got {settings.batch_size}"
        )


def prepare(out: Path) -> None:
    """Makes the folder, without what a killed run left of a checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    for part in out.glob(".*.part"):
        part.unlink()


class Run:
    """A model in training, and how far it has come."""

    def __init__(
        self,
        settings: Settings,
        place: Place,
        data: Data,
        input: dict[str, Any],
        values: list[int],
    ):
        self.settings, self.place, self.signals = settings, place, Signals()
        self.data, self.input, self.values = data, input, values
        self.classes = data.classes or [*map(str, values)]
        torch.manual_seed(settings.seed)
        self.model, self.config = new_model(settings, input["channels"], len(values))
        if settings.weights is not None and not settings.resume:
            load_weights(self.model, settings.weights)
        self.model.to(place.device)
        self.wrapped: nn.Module = self.model
        if place.world > 1:
            self.wrapped = DistributedDataParallel(self.model)
            if settings.sync_bn:  # after the wrapper, which refuses such a layer on CPUs
                nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.steps = len(data.train) // settings.batch_size  # of an epoch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.lr)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, settings.epochs * self.steps
        )
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=settings.amp == "fp16")
        self.epoch, self.step = 0, 0  # done: whole epochs, and steps of the next
        self.losses = 0.0  # their sum over those steps
        self.best = -math.inf
        self.history: list[dict[str, Any]] = []
        self.board: SummaryWriter | None = None

    def finish(self) -> dict[str, Any]:
        """Everything that is left to do."""
        with self.writer():
            while self.epoch < self.settings.epochs:
                self.train_epoch()
                self.end_epoch(self.validate(self.data.validation))
        best = checkpoints.load(self.settings.out / BEST)
        result = {"best": max(self.history, key=lambda row: row["dice"])}
        if self.data.test is not None:
            self.model.load_state_dict(best["state_dict"])
            result["test"] = self.validate(self.data.test)
        if self.place.writes:
            checkpoints.export_safetensors(self.settings.out / WEIGHTS, best)
            text = json.dumps(result, indent=1).replace(": NaN", ": null")
            checkpoints.write(self.settings.out / RESULT, text.encode())
        return result

    def train_epoch(self) -> None:
        start = time.monotonic()
        settings, place = self.settings, self.place
        keys = batches(
            len(self.data.train),
            settings.batch_size,
            settings.seed,
            self.epoch,
            self.step,
            place.rank,
            place.world,
        )
        crops = Crops(self.data.train, self.values, settings)
        progress = tqdm(
            self.loader(crops, batch_sampler=keys),
            desc=f"epoch {self.epoch + 1}/{settings.epochs}",
            initial=self.step,
            total=self.steps,
            leave=False,
            disable=None if place.writes else True,
        )
        self.model.train()
        for images, masks in progress:
            with explained_memory(self.too_large_a_step):
                loss = self.train_step(images, masks)
            progress.set_postfix_str(f"loss {loss:.4f}, {used_memory(place.device)}")
            self.log("loss", loss)
            if self.step == self.steps or self.step % settings.save_every == 0:
                self.save(NEWEST)
                self.stop_if_asked()
            else:
                self.stop_if_asked(save=True)
        self.seconds = time.monotonic() - start

    def train_step(self, images: Tensor, masks: Tensor) -> float:
        """One step of the optimizer; the loss [.] is the mean of all processes'."""
        self.optimizer.zero_grad()
        images, masks = images.to(self.place.device), masks.to(self.place.device)
        with self.autocast():
            logits = self.wrapped(normalize(images, self.input))
        loss = objective(logits.float(), masks[:, None])
        self.scaler.scale(loss).backward()
        value = self.place.mean(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"the loss must stay finite, got {value} in epoch {self.epoch + 1}, step "
                f"{self.step + 1}: try a smaller --lr, or --amp none"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.step += 1
        self.losses += value
        return value

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.settings.amp]
        return torch.autocast(self.place.device.type, dtype, enabled=dtype is not None)

    def predicted(self, image: Tensor) -> Tensor:
        """The classes [H, W] of an image [C, H, W], by tiles, which alone go to the device."""
        prepare = functools.partial(normalize, input=self.input)
        with self.autocast(), explained_memory(self.too_large_a_tile):
            bands = predict_bands(self.model, image, self.tile, classes=True, prepare=prepare)
            return torch.cat([*bands])

    @property
    def tile(self) -> int:
        return max(TILE, 2 * 2**self.settings.depth)

    @torch.no_grad()
    def validate(self, source: Any) -> dict[str, Any]:
        """Dice and IoU of each class over all pixels of all images, and their means.

        NaN for a class that is neither in the masks nor predicted.
        """
        place = self.place
        confusion = MulticlassConfusionMatrix(len(self.values)).to(place.device)
        whole = Whole(shared(source, place.rank, place.world), self.values)
        loader = iter(self.loader(whole, batch_size=None))
        self.model.eval()
        place.share_buffers(self.model)
        for _ in range(math.ceil(len(source) / place.world)):  # as many in every process
            if (pair := next(loader, None)) is not None:
                image, mask = pair
                rows = max(COUNTED // mask.size(1), 1)
                for part in zip(self.predicted(image).split(rows), mask.split(rows), strict=True):
                    confusion.update(*(classes.to(place.device) for classes in part))
            self.stop_if_asked()
        counts = confusion.compute().double()
        both, either = counts.diag(), counts.sum(0) + counts.sum(1)
        dice, iou = 2 * both / either, both / (either - both)
        return {
            "dice": dice.nanmean().item(),
            "iou": iou.nanmean().item(),
            **{f"dice/{c}": v for c, v in zip(self.classes, dice.tolist(), strict=True)},
            **{f"iou/{c}": v for c, v in zip(self.classes, iou.tolist(), strict=True)},
        }

    def too_large_a_step(self) -> str:
        settings = self.settings
        ways = ["a smaller --batch-size or --size"]
        if settings.checkpointing == "none":
            ways.insert(0, "--checkpointing light, full or auto (the result stays the same)")
        return (
            f"a step must fit in memory, --batch-size {settings.batch_size} of --size "
            f"{settings.size} does not: try {' or '.join(ways)}"
        )

    def too_large_a_tile(self) -> str:
        ways = ["a smaller --base"]
        if self.settings.amp == "none":
            ways.insert(0, "--amp bf16")
        return (
            f"validation must fit in memory, a tile of at most {self.tile}x{self.tile} pixels with "
            f"--base {self.settings.base} does not: try {' or '.join(ways)}"
        )

    def end_epoch(self, scores: dict[str, Any]) -> None:
        row = {
            "epoch": self.epoch + 1,
            "step": (self.epoch + 1) * self.steps,
            "loss": self.losses / self.steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
            **scores,
        }
        self.history.append(row)
        for name, score in scores.items():
            self.log(name, score)
        self.epoch, self.step, self.losses = self.epoch + 1, 0, 0.0
        if scores["dice"] > self.best:
            self.best = scores["dice"]
            self.save(BEST)
        self.write_log()
        self.save(NEWEST)
        if self.place.writes:
            each = ", ".join(f"{c} {row[f'dice/{c}']:.3f}" for c in self.classes)
            tqdm.write(
                f"epoch {self.epoch}/{self.settings.epochs}: loss {row['loss']:.4f}, "
                f"validation Dice {row['dice']:.3f} ({each}), IoU {row['iou']:.3f}"
            )
        self.stop_if_asked()  # so no process goes on before the first has written

    def write_log(self) -> None:
        """All epochs anew, so that a resumed run's file is that of an unbroken one."""
        if not self.place.writes:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.history[0])
        writer.writeheader()
        writer.writerows(self.history)
        checkpoints.write(self.settings.out / LOG, text.getvalue().encode())

    def loader(self, dataset: Any, **options: Any) -> DataLoader:
        return DataLoader(
            dataset,
            num_workers=self.settings.workers,
            pin_memory=self.place.device.type == "cuda",
            worker_init_fn=ignore_signals,
            **options,
        )

    @contextlib.contextmanager
    def writer(self) -> Iterator[None]:
        if self.place.writes:
            folder = str(self.settings.out / "tensorboard")
            self.board = SummaryWriter(folder, purge_step=self.epoch * self.steps + self.step + 1)
        try:
            yield
        finally:
            if self.board is not None:
                self.board.close()

    def log(self, name: str, value: float) -> None:
        if self.board is not None:
            self.board.add_scalar(name, value, self.epoch * self.steps + self.step)

    def stop_if_asked(self, save: bool = False) -> None:
        signal = self.place.largest(self.signals.got)
        if signal:
            if save:
                self.save(NEWEST)
            raise Interrupted(
                signal,
                f"stopped in epoch {self.epoch + 1} after {self.step} of {self.steps} steps; "
                f"--resume goes on from there",
            )

    def save(self, name: str) -> None:
        if self.place.writes:
            checkpoints.save(self.settings.out / name, self.state(resumable=name == NEWEST))

    def state(self, resumable: bool) -> Checkpoint:
        found: Checkpoint = {
            "config": self.config,
            "classes": self.classes,
            "mask_values": self.values,
            "input": self.input,
            "state_dict": self.model.state_dict(),
        }
        if resumable:
            found["training"] = {
                "settings": self.settings.trajectory(),
                "data": fingerprint(self.data),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": random_state(self.place.device),
                "epoch": self.epoch,
                "step": self.step,
                "losses": self.losses,
                "best": self.best,
                "history": self.history,
            }
        return found

    def restore(self, checkpoint: Checkpoint, where: str) -> None:
        """Goes to where a checkpoint was written.

        Raises:
            ValueError: it cannot be resumed, or is of other settings or data.
        """
        training = checkpoint.get("training")
        if not isinstance(training, dict) or not isinstance(training.get("settings"), dict):
            raise ValueError(f"{where} must hold a state of training to resume")
        for name, value in self.settings.trajectory().items():
            before = training["settings"].get(name)
            if before != value:
                raise ValueError(
                    f"{flag(name)} must be as in the run to resume, {before}, got {value}"
                )
        same = checkpoint["input"] == self.input and checkpoint["mask_values"] == self.values
        if not same or training.get("data") != fingerprint(self.data):
            raise ValueError(f"the images and masks must be those of the run to resume, {where}")
        try:
            self.model.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(training["optimizer"])
            self.scheduler.load_state_dict(training["scheduler"])
            self.scaler.load_state_dict(training["scaler"])
            restore_random_state(training["random"], self.place.device)
            self.epoch, self.step = int(training["epoch"]), int(training["step"])
            self.losses, self.best = float(training["losses"]), float(training["best"])
            self.history = [dict(row) for row in training["history"]]
        except Exception as error:  # whatever wrong entries lead to
            raise ValueError(f"{where} is corrupt and cannot be resumed: {error!r}") from error


def fingerprint(data: Data) -> str:
    """Of the names of all images, in order, without their folders."""
    parts = [part for part in data[:3] if part is not None]
    names = [Path(part.name(index)).name for part in parts for index in range(len(part))]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def random_state(device: torch.device) -> dict[str, Tensor]:
    """For layers that draw, such as dropout; order and augmentation derive from the seed."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def used_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB at most"
    return f"{psutil.Process().memory_info().rss / 2**20:.0f} MiB"


@contextlib.contextmanager
def explained_memory(explanation: Callable[[], str]) -> Iterator[None]:
    """Says what to try when a step or a tile does not fit."""
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError)
        if not full and not re.search("DefaultCPUAllocator: .*allocate memory", str(error)):
            raise
        raise MemoryError(explanation()) from error
