"""Checkpoints of a training run: one file that says all that training and prediction need.

A checkpoint is a dictionary that ``torch.load(weights_only=True)`` reads:

    format          FORMAT
    config          the model's constructor arguments
    classes         a name for each class
    mask_values     the value of each class in a mask file
    input           channels, and of each its mean and deviation: see ``normalize``
    state_dict      the weights
    training        what resuming needs (see ``fastunet.training``); absent in a checkpoint to use
"""

import functools
import inspect
import io
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .files import whole_file
from .unet import FastUNet
from .weights import options, read

FORMAT = "fastunet checkpoint 1"
NAMES = [*inspect.signature(FastUNet).parameters]

Checkpoint = dict[str, Any]


def save(path: str | os.PathLike, checkpoint: Mapping[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all: what was at ``path`` before is intact until then.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    buffer = io.BytesIO()  # torch.save to a file may abort the process when the disk is full
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    write(path, buffer.getbuffer())


def write(path: str | os.PathLike, content: bytes | memoryview) -> None:
    try:
        with whole_file(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(
            f"{os.fsdecode(path)!r} must be writable, got: {error.strerror or error}; "
            f"what was there before is intact"
        ) from error


def load(path: str | os.PathLike) -> Checkpoint:
    """Reads a checkpoint that ``save`` wrote, its tensors on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, corrupt, or not a FastUNet checkpoint.
    """
    path = os.fsdecode(path)
    where = f"checkpoint {path!r}"
    checkpoint = read(path, where)
    if checkpoint.get("format") != FORMAT:
        raise ValueError(f"{where} must be one that fastunet wrote, it lacks format={FORMAT!r}")
    if fault := fault_of(checkpoint):
        raise ValueError(f"{where} is corrupt: {fault}")
    return dict(checkpoint)


def load_model(
    source: str | os.PathLike | Checkpoint,
) -> tuple[FastUNet, Callable[[Tensor], Tensor]]:
    """The model of a checkpoint, and what an image needs before: ``model(prepare(image))``.

    The model is on the CPU and in evaluation mode; ``prepare`` is ``normalize`` with the
    checkpoint's ``input``, as ``fastunet.predict`` takes it.

    Args:
        source: path of a file that ``save`` wrote, or what ``load`` returned.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, corrupt, or not a FastUNet checkpoint.
    """
    checkpoint = source if isinstance(source, dict) else load(source)
    model = FastUNet(**checkpoint["config"])
    model.load_state_dict(checkpoint["state_dict"])
    return model.eval(), functools.partial(normalize, input=checkpoint["input"])


def normalize(image: Tensor, input: Mapping[str, Any]) -> Tensor:
    """The image [..., C, H, W] in the units of training; ``input`` is the checkpoint's."""
    mean, deviation = (torch.tensor(input[key]).view(-1, 1, 1) for key in ("mean", "deviation"))
    return (image - mean.to(image)) / deviation.to(image)


def export_safetensors(path: str | os.PathLike, checkpoint: Mapping[str, Any]) -> None:
    """Writes the weights of a checkpoint as a .safetensors file, whole or not at all.

    Constructor arguments, classes and normalisation are in its metadata, as text.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    keys = ("config", "classes", "mask_values", "input")
    metadata = {key: repr(checkpoint[key]) for key in keys}
    weights = {key: value.contiguous() for key, value in checkpoint["state_dict"].items()}
    write(path, safetensors.torch.save(weights, metadata))


def fault_of(checkpoint: Mapping) -> str | None:
    """What is wrong with a checkpoint's entries, before any memory is taken for its model."""
    config, weights, input = (checkpoint.get(key) for key in ("config", "state_dict", "input"))
    if not isinstance(config, Mapping) or not {"n_channels", "n_classes"} <= {*config} <= {*NAMES}:
        return f"config must hold the arguments of FastUNet, got {short(config)}"
    if not isinstance(weights, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
    ):
        return f"state_dict must hold tensors, got {short(weights)}"
    # The weights tell the sizes: a config that names others could ask for any amount of memory.
    defaults = {name: p.default for name, p in inspect.signature(FastUNet).parameters.items()}
    for name, value in options(weights).items():
        given = {**defaults, **config}[name]
        if repr(given) != value and name != "norm":
            return f"config must have {name}={value} as the weights do, got {short(given)}"
    try:
        with torch.device("meta"):
            expected = FastUNet(**config).state_dict()
    except Exception as error:  # whatever a wrong value leads to
        return f"config must be that of a FastUNet, got: {error}"
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
        return "config and state_dict must be of the same model"
    for key, kind in (("classes", str), ("mask_values", int)):
        found = checkpoint.get(key)
        if not is_list(found, kind, config["n_classes"]):
            count = config["n_classes"]
            return f"{key} must be a list of {count} {kind.__name__}, got {short(found)}"
    if not isinstance(input, Mapping) or input.get("channels") != config["n_channels"]:
        return f"input must have {config['n_channels']} channels, got {short(input)}"
    for key in ("mean", "deviation"):
        found = input.get(key)
        if not is_list(found, float, config["n_channels"]) or not math.isfinite(sum(found or ())):
            return f"{key} must be {config['n_channels']} finite numbers, got {short(found)}"
    if min(input["deviation"]) <= 0:
        return f"deviation must be above 0, got {short(input['deviation'])}"
    return None


def is_list(value: Any, kind: type, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and {*map(type, value)} == {kind}


def short(value: Any) -> str:
    text = repr(value) if not isinstance(value, Mapping) else f"a mapping with {[*value]}"
    return text if len(text) <= 100 else f"{text[:100]}..."
