"""Checkpoints into a model: what they carry besides the weights, and what makes them not fit."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

# Where training scripts put the weights in a checkpoint that also holds an optimizer, an epoch...
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "model_state")
FIRST = "inc.double_conv.0.weight"  # every U-Net has it, whatever its options

Weights = dict[str, Tensor]


def load_weights(model: nn.Module, source: str | os.PathLike | Mapping) -> dict[str, Any]:
    """Loads a checkpoint into a U-Net and returns what else the checkpoint holds.

    Takes a ``torch.save`` file, a ``.safetensors`` file or a mapping, with the weights at the top
    or under ``state_dict``, ``model_state_dict``, ``model``, ``net`` or ``model_state``, and with
    the prefixes of DataParallel, ``torch.compile`` or Lightning (``module.``, ``_orig_mod.``,
    ``model.``) on every key. Also converts old checkpoints: convolution biases that the model does
    not have are folded into the running means, biases and ``num_batches_tracked`` that the
    checkpoint does not have become zero. The weights are copied into the model's own parameters
    and keep the dtype and device of those. Files are never loaded with ``weights_only=False``.

    Weights do not tell ``concat_order``, ``relu`` from ``leaky_relu``, or ``instance`` from
    ``group``: construct the model with what the checkpoint was trained with.

    Args:
        model: a UNet or FastUNet, also one wrapped by ``torch.compile`` or data parallelism.
        source: path of the file, or the mapping that was loaded from it (which is not changed).

    Returns:
        Every other entry, for example ``{"mask_values": [0, 1]}``; of a safetensors file its
        metadata, as strings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds other objects than tensors and plain Python
            values, or the weights do not fit the model. The model is then unchanged.
    """
    model = unwrap(model)
    expected = model.state_dict()
    if FIRST not in expected:
        raise ValueError(f"the model must be a UNet or FastUNet, got {type(model).__name__}")
    if isinstance(source, Mapping):
        where, checkpoint = "the checkpoint", source
    else:
        path = os.fsdecode(source)
        where = f"checkpoint {path!r}"
        checkpoint = read(path, where)
    weights, extras = find_weights(checkpoint)
    if not weights:
        entries = ", ".join(map(str, checkpoint)) or "nothing"
        raise ValueError(f"{where} holds no weights, its entries are: {entries}")
    weights = strip_prefix(weights, where)
    compare_options(weights, expected, where)
    convert_biases(weights, model, expected, where)
    for key, value in expected.items():
        if key.endswith(".num_batches_tracked") and key not in weights:
            weights[key] = torch.zeros_like(value)  # PyTorch before 0.4.1 did not count
    compare_tensors(weights, expected, where)
    model.load_state_dict(weights, strict=True)
    return extras


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel."""
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrap(inner)
    return model


def read(path: str, where: str) -> Mapping:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{where} is not a file")
    with open(path, "rb") as file:
        head = file.read(9)  # safetensors: 8 bytes of length, then JSON
    try:
        if head[8:] == b"{" or path.endswith(".safetensors"):
            with safe_open(path, "pt", device="cpu") as tensors:
                weights = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
                return (tensors.metadata() or {}) | weights
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{where} holds {refused[1]}, which torch.load(weights_only=True) refuses: save "
                f"model.state_dict() alone, or load a file that you trust yourself and pass that"
            ) from error
        raise ValueError(
            f"{where} cannot be read: it is truncated, or was not written by torch.save of a "
            f"state_dict or by safetensors"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{where} holds a {type(checkpoint).__name__} instead of a state_dict")
    return checkpoint


def find_weights(checkpoint: Mapping) -> tuple[Weights, dict[str, Any]]:
    """The tensors of the nested or flat state_dict, and all other entries."""
    for entry in ENTRIES:
        nested = checkpoint.get(entry)
        if isinstance(nested, Mapping):
            weights, extras = find_weights(nested)
            if weights:
                return weights, {k: v for k, v in checkpoint.items() if k != entry} | extras
    weights = {k: v for k, v in checkpoint.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return weights, {k: v for k, v in checkpoint.items() if k not in weights}


def strip_prefix(weights: Weights, where: str) -> Weights:
    """Removes whatever is before ``inc.double_conv.0.weight`` from every key."""
    first = min((key for key in weights if f".{key}".endswith(f".{FIRST}")), key=len, default=None)
    if first is None:
        raise ValueError(f"{where} is not of a U-Net: no {FIRST} among {some(weights)}")
    prefix = first.removesuffix(FIRST)
    others = [key for key in weights if not key.startswith(prefix)]
    if others:
        raise ValueError(
            f"{where} has the U-Net under {prefix!r} and beside it {some(others)}: "
            f"pass a mapping of the U-Net's weights alone"
        )
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def options(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The constructor's arguments, as far as the weights tell them."""
    down = {key.split(".")[0] for key in weights if re.match(r"down\d+\.", key)}
    transposed = any(re.fullmatch(r"up\d+\.up\.weight", key) for key in weights)
    found = {"bilinear": str(not transposed), "depth": str(len(down))}
    for name, key, dim in (
        ("n_channels", FIRST, 1),
        ("n_classes", "outc.conv.weight", 0),
        ("base_channels", FIRST, 0),
    ):
        if is_conv(weights, key):
            found[name] = str(weights[key].size(dim))
    norm = "inc.double_conv.1"  # or the activation, or (without either) the second convolution
    if f"{norm}.running_mean" in weights:
        found["norm"] = "'batch'"
    elif f"{norm}.weight" in weights and not is_conv(weights, f"{norm}.weight"):
        found["norm"] = "'instance' or 'group'"
    else:
        found["norm"] = "'none'"
    return found


def compare_options(weights: Weights, expected: Mapping[str, Tensor], where: str) -> None:
    theirs, ours = options(weights), options(expected)
    differ = [name for name in theirs if theirs[name] != ours.get(name)]
    if differ:
        needed = ", ".join(f"{name}={theirs[name]}" for name in differ)
        have = ", ".join(f"{name}={ours.get(name)}" for name in differ)
        raise ValueError(
            f"{where} is of a model with {needed} and this one has {have}: "
            f"construct the model with {needed}"
        )


def convert_biases(
    weights: Weights, model: nn.Module, expected: Mapping[str, Tensor], where: str
) -> None:
    """Makes the convolution biases in ``weights`` those of the model, computing the same."""
    theirs, ours = conv_biases(weights), conv_biases(expected)
    if not theirs:
        weights.update({key: torch.zeros_like(expected[key]) for key in ours})
    if ours:
        return
    modules = dict(model.named_modules())
    for key in sorted(theirs):
        block, index = key.removesuffix(".bias").rsplit(".", 1)
        after = f"{block}.{int(index) + 1}"
        mean = f"{after}.running_mean"
        bias = weights.pop(key)
        # Statistics of the batch contain the bias and subtract it again, so training does not see
        # it. Running statistics collected it: (x + b) - mean = x - (mean - b), in evaluation and
        # after any further update.
        if mean in weights and mean in expected:
            dtype = expected[mean].dtype
            if bias.shape != weights[mean].shape:
                raise ValueError(f"{where} has {key} {list(bias.shape)}, which does not fit {mean}")
            weights[mean] = weights[mean].to(dtype) - bias.to(dtype)
        elif not isinstance(modules.get(after), nn.modules.batchnorm._NormBase):
            raise ValueError(
                f"{where} has convolution biases ({key}) and this model has none to load them "
                f"into: construct the model with conv_bias=True"
            )


def compare_tensors(weights: Weights, expected: Mapping[str, Tensor], where: str) -> None:
    faults = []
    if missing := expected.keys() - weights.keys():
        faults.append(f"it lacks {some(sorted(missing))}")
    if unexpected := weights.keys() - expected.keys():
        faults.append(f"the model lacks {some(sorted(unexpected))}")
    for key in sorted(expected.keys() & weights.keys()):
        theirs, ours = weights[key], expected[key]
        if theirs.shape != ours.shape:
            faults.append(f"{key} is {list(theirs.shape)} instead of {list(ours.shape)}")
        elif theirs.is_meta or (ours.is_floating_point() and not theirs.is_floating_point()):
            faults.append(f"{key} is {theirs.dtype} on {theirs.device}")
        elif ours.is_meta:
            faults.append(f"{key} of the model is on the meta device")
    if faults:
        raise ValueError(f"{where} does not fit the model: {some(faults, '; ')}")


def conv_biases(weights: Mapping[str, Tensor]) -> set[str]:
    """Keys of the biases of the 3x3 convolutions, which all of them have or none."""
    keys = (key for key in weights if re.search(r"\bdouble_conv\.\d+\.bias$", key))
    return {key for key in keys if is_conv(weights, key.removesuffix("bias") + "weight")}


def is_conv(weights: Mapping[str, Tensor], key: str) -> bool:
    return key in weights and weights[key].dim() == 4


def some(items, separator: str = ", ") -> str:
    """The first three, and how many more."""
    items = list(items)
    more = f"{separator}and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(items[:3]) + more
