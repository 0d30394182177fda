"""Whole networks side by side: FastUNet and the plain U-Net of the same parameters, and a step."""

import copy
import os

import torch
from torch import Tensor, nn

from fastunet import FastUNet
from fastunet.reference import UNet

SMALL = {"base_channels": 4, "depth": 2}
NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)
MODES = ("train", "eval", "frozen", "mixed")
FORMATS = (torch.contiguous_format, torch.channels_last)
LAYOUTS = ("contiguous", "input", "model", "both")  # what is channels_last

Step = dict[str, Tensor]


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Nothing neutral is left in the normalisations, nor in the biases."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in module.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        elif value.is_floating_point() and value.dim() == 1:
            value.normal_(1.0 if key.endswith("weight") else 0.0, 0.4, generator=generator)
        elif value.is_floating_point():
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    return module


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values, the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def pair(n_channels: int = 3, n_classes: int = 2, *, seed: int = 0, **options) -> tuple:
    """The plain U-Net and FastUNet, with equal parameters and buffers."""
    plain = randomize(UNet(n_channels, n_classes, **SMALL | options), seed)
    fast = FastUNet(n_channels, n_classes, **SMALL | options)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def double_pair(*args, mode: str = "train", **options) -> tuple:
    return tuple(to_mode(model.double(), mode) for model in pair(*args, **options))


def to_mode(model: nn.Module, mode: str) -> nn.Module:
    """train, eval, frozen (training, but for the norms), or mixed (but for every other norm)."""
    model.train(mode != "eval")
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    for norm in {"frozen": norms, "mixed": norms[::2]}.get(mode, []):
        norm.eval()
    return model


def channels_last(t):
    return t.to(memory_format=torch.channels_last)


def laid_out(model: nn.Module, x: Tensor, layout: str) -> tuple[nn.Module, Tensor]:
    """A copy of the model, and x, in one of the LAYOUTS."""
    model = copy.deepcopy(model)
    if layout in ("model", "both"):
        model = channels_last(model)
    return model, channels_last(x) if layout in ("input", "both") else x


def step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> Step:
    """What a training step yields, by name: the logits, every gradient, the buffers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        logits = model(x)
    if logits.requires_grad:
        logits.backward(random(*logits.shape, seed=7, dtype=logits.dtype))
    found = {"logits": logits.detach(), "input.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    found |= {name: b.clone() for name, b in model.named_buffers()}
    return {name: t for name, t in found.items() if t is not None}


def kind(name: str) -> str:
    """Tensors of one kind are of one accuracy."""
    return "gradients" if name.endswith(".grad") else name if name == "logits" else "buffers"


def distances(actual: Step, expected: Step) -> dict[str, float]:
    """The relative L2 distance of each tensor. A gradient that is nearly zero, because it cancels
    (a bias before a norm), is measured against the typical one."""
    assert actual.keys() == expected.keys()
    norms = {name: t.double().norm().item() for name, t in expected.items()}
    typical = sorted(n for name, n in norms.items() if name.endswith(".grad"))
    floor = 1e-3 * typical[len(typical) // 2] if typical else 0.0
    return {
        name: (actual[name].double() - t.double()).norm().item()
        / max(norms[name], floor if kind(name) == "gradients" else 0.0, 1e-30)
        for name, t in expected.items()
    }


def strides(t: Tensor) -> list[int]:
    """Of the dimensions in which there is more than one."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def assert_same_layout(actual: Step, expected: Step) -> None:
    """The same dtypes, shapes and strides; in the logits, those of single channels too."""
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        read = torch.Tensor.stride if name == "logits" else strides
        for what in (lambda t: t.dtype, lambda t: t.shape, read):
            assert what(actual[name]) == what(t), f"{name}: {what(actual[name])}, not {what(t)}"


def assert_same_step(
    actual: Step, expected: Step, tolerance: float = 1e-9, layouts: bool = True
) -> None:
    """Tensors of one layout, integers equal, and the others within a relative L2 distance."""
    if layouts:
        assert_same_layout(actual, expected)
    far = {
        name: d
        for name, d in distances(actual, expected).items()
        if not d <= (tolerance if expected[name].is_floating_point() else 0)
    }
    assert not far, f"further than {tolerance} from the reference: {far}"


def assert_bitwise(actual: Step, expected: Step) -> None:
    assert actual.keys() == expected.keys()
    differing = [name for name, t in expected.items() if not torch.equal(actual[name], t)]
    assert not differing


def end_process() -> None:
    """Ends a spawned process that trained with others, without taking anything apart: gloo's
    thread may just be letting go of a tensor, for which it needs Python's lock. The group's end may
    hold that lock and wait for the thread; and at Python's end the thread aborts the process."""
    os._exit(0)
