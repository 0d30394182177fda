"""The networks' cases: inference and a training step of whole U-Nets."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastunet import FastUNet, capture
from fastunet.reference import UNet

from . import peers
from .contest import (
    BUDGETED,
    CHANNELS_LAST,
    COMPILED,
    FASTUNET,
    FROZEN,
    ORACLE,
    PEERS,
    POLICIES,
    Case,
    Contender,
    Setting,
    serving,
)

CLASSES = 2
# Relative L2 from float64, see the design: a training step's rounding differences flip ReLU masks
# and pool winners in eager PyTorch as well, so there its own error is the only measure.
FLOORS = {"forward": 1e-4, "step": 1e-6}


class Network(NamedTuple):
    base: int
    bilinear: bool
    height: int
    width: int
    batch: int = 1

    @property
    def name(self) -> str:
        variant = "bilinear" if self.bilinear else "transposed"
        batch = f"-batch{self.batch}" if self.batch > 1 else ""
        return f"base{self.base}-{variant}-{self.height}x{self.width}{batch}"

    def build(self, kind: type[UNet]) -> UNet:
        return kind(3, CLASSES, self.bilinear, base_channels=self.base)


NETWORKS = [
    Network(base, bilinear, 256, 256) for base in (16, 32, 64) for bilinear in (True, False)
]
NETWORKS += [
    Network(16, True, 640, 959),
    Network(32, True, 256, 256, 2),
    Network(16, True, 256, 256, 4),
]
GPU_NETWORKS = [
    Network(base, bilinear, 512, 512, batch)
    for base in (64, 32)
    for batch in (4, 1, 16)
    for bilinear in (True, False)
]


@functools.lru_cache(maxsize=1)
def data(network: Network, device: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """state_dict, image and labels; running statistics are those of the image."""
    n, h, w = network.batch, network.height, network.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.build(UNet).to(device)
        image = torch.randn(n, 3, h, w).to(device)
        labels = torch.randint(CLASSES, (n, h, w)).to(device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(image)
    return model.state_dict(), image, labels


def make(network: Network, phase: str, name: str, setting: Setting) -> Contender:
    state, image, labels = data(network, setting.device)
    words = name.split()
    with torch.device(setting.device):
        unet = network.build(FastUNet if words[0] == FASTUNET else UNet)
    unet.load_state_dict(state)
    unet.use_checkpointing(next((policy for policy in POLICIES if policy in words), None))
    dtype = torch.float64 if name == ORACLE else torch.float32
    last = name.startswith((CHANNELS_LAST, COMPILED))
    memory_format = torch.channels_last if last else torch.contiguous_format
    model: nn.Module = unet.to(dtype).to(memory_format=memory_format)  # type: ignore
    image = image.to(dtype, memory_format=memory_format)
    parameters = list(model.parameters())
    fixed = [*parameters, *model.buffers()]
    model.train(phase == "step")
    if name in PEERS:
        return peers.make(name, model, image)
    if words[0] == COMPILED:
        # Whatever was compiled before compiles again: have one of these at a time.
        torch.compiler.reset()
        mode = words[1] if len(words) == 2 and name != FROZEN else None
        model = torch.compile(model, mode=mode, dynamic=False)  # type: ignore[assignment]

    def forward() -> list[Tensor]:
        with torch.inference_mode(), setting.autocast(), serving(name):
            return [model(image)]

    if name == FROZEN:
        with torch._inductor.config.patch(freezing=True), torch.no_grad():
            model(image)  # compiles
    if phase == "forward" and "graph" in words:
        with setting.autocast(), serving(name):
            captured = capture(model, image)
        return Contender(lambda: [captured(image)], timed=lambda: captured(image))
    if phase == "forward":
        return Contender(forward)

    def record() -> Tensor:
        with setting.autocast(), serving(name):
            return F.cross_entropy(model(image), labels)

    def step() -> list[Tensor]:
        for p in parameters:
            p.grad = None
        loss = record()
        loss.backward()
        return [loss, *(p.grad for p in parameters if p.grad is not None)]

    if name == BUDGETED:
        with torch._functorch.config.patch(activation_memory_budget=float(words[-1])):
            record()  # compiles: what is kept for backward is decided here
    return Contender(replayed(step) if "graph" in words else step, record, fixed)


def replayed(work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The work as the replay of a CUDA graph, with its results in the same memory every time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def network_case(network: Network, phase: str) -> Case:
    make_one = functools.partial(make, network, phase)
    return Case("networks", network.name, phase, FLOORS[phase], make_one, can_compile=True)


def network_cases(networks: Iterable[Network] = NETWORKS) -> list[Case]:
    return [network_case(network, phase) for network in networks for phase in FLOORS]
