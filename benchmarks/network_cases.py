"""The networks' cases: inference and a training step of whole U-Nets, batch 1."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import FastUNet
from fastunet.reference import UNet

from .contest import CHANNELS_LAST, COMPILED, FASTUNET, ORACLE, Case, Contender, Setting

CLASSES = 2
# Relative L2 from float64, see the design: a training step's rounding differences flip ReLU masks
# and pool winners in eager PyTorch as well, so there its own error is the only measure.
FLOORS = {"forward": 1e-4, "step": 1e-6}


class Network(NamedTuple):
    base: int
    bilinear: bool
    height: int
    width: int

    @property
    def name(self) -> str:
        variant = "bilinear" if self.bilinear else "transposed"
        return f"base{self.base}-{variant}-{self.height}x{self.width}"

    def build(self, kind: type[UNet]) -> UNet:
        return kind(3, CLASSES, self.bilinear, base_channels=self.base)


NETWORKS = [
    Network(base, bilinear, 256, 256) for base in (16, 32, 64) for bilinear in (True, False)
]
NETWORKS.append(Network(16, True, 640, 959))


@functools.lru_cache(maxsize=1)
def data(network: Network) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """state_dict, image and labels; running statistics are those of the image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.build(UNet)
        image = torch.randn(1, 3, network.height, network.width)
        labels = torch.randint(CLASSES, (1, network.height, network.width))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(image)
    return model.state_dict(), image, labels


def make(network: Network, phase: str, name: str, setting: Setting) -> Contender:
    state, image, labels = data(network)
    model: nn.Module = network.build(FastUNet if name == FASTUNET else UNet)
    model.load_state_dict(state)
    dtype = torch.float64 if name == ORACLE else torch.float32
    memory_format = (
        torch.channels_last if name in (CHANNELS_LAST, COMPILED) else torch.contiguous_format
    )
    model = model.to(setting.device, dtype).to(memory_format=memory_format)  # type: ignore
    image = image.to(setting.device, dtype, memory_format=memory_format)
    labels = labels.to(setting.device)
    parameters = list(model.parameters())
    fixed = [*parameters, *model.buffers()]
    model.train(phase == "step")
    if name == COMPILED:
        torch.compiler.reset()
        model = torch.compile(model)  # type: ignore[assignment]

    def forward() -> list[Tensor]:
        with torch.inference_mode(), setting.autocast():
            return [model(image)]

    if phase == "forward":
        return Contender(forward)

    def record() -> Tensor:
        with setting.autocast():
            return F.cross_entropy(model(image), labels)

    def step() -> list[Tensor]:
        for p in parameters:
            p.grad = None
        loss = record()
        loss.backward()
        return [loss, *(p.grad for p in parameters if p.grad is not None)]

    return Contender(step, record, fixed)


def network_case(network: Network, phase: str) -> Case:
    make_one = functools.partial(make, network, phase)
    return Case("networks", network.name, phase, FLOORS[phase], make_one, can_compile=True)


def network_cases() -> list[Case]:
    return [network_case(network, phase) for network in NETWORKS for phase in FLOORS]
