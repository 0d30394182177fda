"""FastUNet's training step as ``frontier`` takes it, read from its ledger."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from fastunet.unet import FastUNet, of_kind

from .frontier import Level, Map, Slot
from .ledger import BACKWARD, FORWARD, SAVED, Ledger, Operator, Storage

OPERATORS = ("conv_norm_act", "conv_transpose", "head")
# What making a map again costs: its FLOPs, and as many for each byte that it reads or writes. CPUs
# do some 10 FLOPs in the time that a byte takes, GPUs over 100.
FLOPS_PER_BYTE = 50
ABSENT = Slot(0, 0)


class Program(NamedTuple):
    """cost: of the whole step, in the maps' unit."""

    levels: list[Level]
    head: tuple[Slot, Slot]
    cost: float


class Reader:
    """Of the ledger of a step under policy ``none``."""

    def __init__(self, model: FastUNet, ledger: Ledger) -> None:
        self.ledger = ledger
        self.calls = {
            (operator.phase, operator.layer): i
            for i, operator in enumerate(ledger.operators)
            if is_ours(operator)
        }
        self.names = {module: name for name, module in model.named_modules()}
        blocks = [
            of_kind(block, nn.Conv2d, nn.ConvTranspose2d)
            for block in (model.inc, *model.downs, *model.ups)
        ]
        self.planned = {m for block in blocks if all(map(self.is_saved, block)) for m in block}
        self.slots = self.count(id(self.made(m)) for m in self.planned)

    def call(self, phase: str, layer: nn.Module) -> int | None:
        return self.calls.get((phase, self.names[layer]))

    def is_saved(self, layer: nn.Module) -> bool:
        """Whether the layer is one of our operators, which trains."""
        both = all(self.call(phase, layer) is not None for phase in (FORWARD, BACKWARD))
        return both and self.made(layer).category == SAVED

    def made(self, layer: nn.Module) -> Storage:
        call = self.call(FORWARD, layer)
        assert call is not None
        return self.ledger.operators[call].made[0]

    def count(self, maps: Iterable[int]) -> dict[int, Slot]:
        """What is there besides these maps, by the index of our operators."""
        maps, starts = set(maps), sorted(self.calls.values())
        slots = dict.fromkeys(starts, ABSENT)
        total, slot = 0, -1
        for change in self.ledger.changes:
            while starts and starts[0] <= change.operator:
                slot = starts.pop(0)
                slots[slot] = Slot(total, total)
            if id(change.storage) not in maps:
                total += change.nbytes
            if slot >= 0:
                slots[slot] = Slot(slots[slot].before, max(slots[slot].peak, total))
        return slots

    def slot(self, phase: str, layer: nn.Module) -> Slot | None:
        call = self.call(phase, layer)
        return None if call is None else self.slots[call]

    def map(self, layer: nn.Module) -> Map:
        forward = self.slot(FORWARD, layer) or ABSENT
        backward = self.slot(BACKWARD, layer)
        name = self.names[layer]
        if layer not in self.planned:  # it keeps what it keeps, which is in the slots
            return Map(name, 0, 0, 0, forward, backward, own=False, fixed=True)
        made, own = self.made(layer), self.call(BACKWARD, layer)
        assert own is not None
        return Map(
            name,
            made.nbytes,
            work(layer, made),
            forward.peak - forward.before,
            forward,
            backward,
            own=made.death is None or made.death >= own,
        )


def is_ours(operator: Operator) -> bool:
    name = operator.name.removeprefix("fastunet::")
    return name != operator.name and name.removesuffix("_bwd") in OPERATORS


def work(layer: nn.Module, made: Storage) -> float:
    """FLOPs and bytes of forward."""
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    outputs = made.nbytes / made.itemsize
    transposed = isinstance(layer, nn.ConvTranspose2d)
    flops = 2 * outputs * layer.in_channels * (1 if transposed else 9)
    source = made.nbytes * layer.in_channels / layer.out_channels / (4 if transposed else 1)
    return flops + FLOPS_PER_BYTE * (made.nbytes + source)


def program(model: FastUNet, ledger: Ledger) -> Program:
    """The maps of a step under policy ``none``, when they come and go, and what is there besides.

    A block of which some layer runs as in plain PyTorch, or does not train, keeps what it keeps.
    """
    reader = Reader(model, ledger)
    levels = []
    for i, down in enumerate((model.inc, *model.downs)):
        encoder = [reader.map(m) for m in of_kind(down, nn.Conv2d)]
        if i == model.depth:
            levels.append(Level(encoder))
            break
        up = model.ups[model.depth - 1 - i]
        convolutions = of_kind(up, nn.Conv2d)
        upsampling = [reader.map(m) for m in of_kind(up, nn.ConvTranspose2d)]
        if any(reader.call(FORWARD, m) is None for m in convolutions):
            # Plain PyTorch keeps a map of its own that is made of the skip.
            encoder[-1] = replace(encoder[-1], fixed=True)
        levels.append(
            Level(
                encoder,
                upsampling[0] if upsampling else None,
                [reader.map(m) for m in convolutions],
                getattr(up, "concat_order", "skip_first") == "skip_first",
            )
        )
    logits = model.outc.conv
    head = (reader.slot(FORWARD, logits) or ABSENT, reader.slot(BACKWARD, logits) or ABSENT)
    cost = 3 * sum(work(m, reader.made(m)) for m in reader.planned)  # backward: twice the products
    return Program(levels, head, cost)
