"""Plans: the cheapest choice of maps to make again that keeps a training step within a budget."""

import json
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from fastunet import backends
from fastunet.files import whole_file
from fastunet.unet import FastUNet

from .budget import available, format_size, parse_size
from .frontier import Choice, frontier
from .ledger import training_step
from .program import program

# Of what a device has left, ``auto`` leaves this: for the loss, the optimizer's temporaries,
# workspaces and what fragmentation wastes.
RESERVED_SHARE = 0.05
RESERVED = 128 * 2**20


class BudgetError(ValueError):
    """No choice keeps a step within the budget.

    Attributes:
        least: the least achievable peak, bytes.
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class MemoryPlan:
    """Which convolutions' outputs a training step keeps, and which backward makes again.

    Attributes:
        shape: of the batch, [N, C, H, W].
        dtype: of the computation, such as ``float32``.
        budget: bytes that the peak had to stay within.
        peak: predicted, in bytes: parameters, their gradients, buffers, the optimizer's state where
            it was asked for, the batch, kept maps and temporaries.
        peak_keeping_all: the same under the policy ``none``.
        cost: what is computed again, as a share of the step's FLOPs and memory traffic.
        layers: ``keep`` or ``recompute`` for each convolution.
    """

    shape: tuple[int, ...]
    dtype: str
    budget: int
    peak: int
    peak_keeping_all: int
    cost: float
    layers: dict[str, str]

    @property
    def recomputed(self) -> set[str]:
        """The names of the layers whose outputs are made again."""
        return {name for name, what in self.layers.items() if what == RECOMPUTE}

    def save(self, path: str | os.PathLike) -> None:
        """Writes JSON, whole or not at all."""
        with whole_file(path) as file:
            file.write((json.dumps(asdict(self), indent=2) + "\n").encode())

    @staticmethod
    def load(path: str | os.PathLike) -> "MemoryPlan":
        """Reads what ``save`` has written.

        Raises:
            ValueError: where the file is not a plan.
        """
        try:
            found = json.loads(Path(path).read_text())
            layers = found["layers"]
            if {*layers.values()} - {KEEP, RECOMPUTE}:
                raise ValueError(f"layers must be {KEEP!r} or {RECOMPUTE!r}")
            return MemoryPlan(**{**found, "shape": tuple(found["shape"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} must be a memory plan in JSON, as MemoryPlan.save writes it ({error!r})"
            ) from None

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        head = (
            f"{shape} {self.dtype}: peak {format_size(self.peak)} of "
            f"{format_size(self.budget)} ({format_size(self.peak_keeping_all)} keeping all), "
            f"{self.cost:.1%} of the step's work again"
        )
        return f"{head}\n{tabulate(self.layers.items(), ['layer', 'output'])}"


KEEP, RECOMPUTE = "keep", "recompute"


class Step(NamedTuple):
    """All choices for a training step. costs: of making each layer's output again; cost: of the
    whole step."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    choices: list[Choice]
    costs: dict[str, float]
    cost: float

    @property
    def least(self) -> int:
        return self.choices[-1].peak

    def within(self, budget: int) -> MemoryPlan | None:
        """The cheapest plan, if there is one."""
        found = next((c for c in self.choices if c.peak <= budget), None)
        return None if found is None else self.plan(found, budget)

    def plan(self, choice: Choice, budget: int) -> MemoryPlan:
        layers = {n: RECOMPUTE if n in choice.forgotten else KEEP for n in self.costs}
        return MemoryPlan(
            self.shape,
            str(self.dtype).removeprefix("torch."),
            budget,
            choice.peak,
            self.choices[0].peak,
            choice.cost / self.cost if self.cost else 0.0,
            layers,
        )


def step_of(
    model: FastUNet,
    shape: Iterable[int],
    dtype: torch.dtype | None = None,
    states: int = 0,
    device: str | None = None,
) -> Step:
    """Every choice worth making for one training step; as ``plan`` takes its arguments."""
    shape = tuple(shape)
    ledger = training_step(model, shape, dtype, states, "none", device)
    found = program(model, ledger)
    choices = frontier(found.levels, found.head)
    costs = {m.name: m.cost for level in found.levels for m in level.maps if not m.fixed}
    return Step(shape, dtype or next(model.parameters()).dtype, choices, costs, found.cost)


def plan(
    model: FastUNet,
    shape: Iterable[int],
    budget: int | float | str,
    dtype: torch.dtype | None = None,
    optimizer_states: int = 0,
    device: str | None = None,
) -> MemoryPlan:
    """The cheapest plan with which a training step's peak stays within the budget.

    Exact: no other choice of maps meets the budget with less work (FLOPs, and bytes moved). Nothing
    is run; the model may be on the device ``meta``. Give the plan to ``model.use_checkpointing``.

    Args:
        model: in the mode in which it will train, with its frozen parts.
        shape: of the batch, [N, C, H, W].
        budget: bytes, or a text such as ``"6GiB"``; for parameters, buffers, their gradients, the
            optimizer's state, the batch, and all that forward and backward allocate, with logits
            and a gradient of theirs. What the loss takes besides, the workspaces of a library's
            convolutions and an allocator's fragmentation are not counted.
        dtype: of autocast, where it is not the parameters' own.
        optimizer_states: tensors per parameter that the optimizer holds: 1 momentum, 2 Adam.
        device: ``cpu`` or ``cuda``, there or not; where the model is, or ``cpu``, by default.

    Raises:
        BudgetError: where no choice meets the budget, with the least achievable peak.
        ValueError: where the budget is not a size, or the shape does not fit the model.
    """
    budget = parse_size(budget)
    step = step_of(model, shape, dtype, optimizer_states, device)
    found = step.within(budget)
    if found is None:
        advice = what_helps(model, step, budget, optimizer_states, device)
        raise BudgetError(
            f"the budget of {format_size(budget)} cannot be met: the least peak of a training step "
            f"at {'x'.join(map(str, step.shape))} is {format_size(step.least)}; {advice}",
            step.least,
        )
    return found


def what_helps(model: FastUNet, step: Step, budget: int, states: int, device: str | None) -> str:
    """Smaller batches, tiles or widths with which the budget could be met."""
    n, c, h, w = step.shape

    def least(*shape: int) -> int:
        return step_of(model, shape, step.dtype, states, device).least

    if n > 1:
        one, two = least(1, c, h, w), least(2, c, h, w)
        if one <= budget:
            fits = min(n - 1, 1 + int((budget - one) / max(1, two - one)))
            while fits > 1 and least(fits, c, h, w) > budget:
                fits -= 1
            return f"a batch of {fits} would fit"
    multiple = 2**model.depth
    smallest = least(1, c, 2 * multiple, 2 * multiple)
    if smallest <= budget:
        share = (budget - smallest) / max(1, least(1, c, h, w) - smallest)
        side = int(math.sqrt(share * h * w + (2 * multiple) ** 2)) // multiple * multiple
        while side > 2 * multiple and least(1, c, side, side) > budget:
            side -= multiple
        return f"a batch of 1 with tiles of {side}x{side} would fit"
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    share = math.sqrt(budget / smallest)  # parameters go with the square of the width
    return (
        f"the parameters, their gradients and the optimizer's state alone take more "
        f"({format_size(parameters)} of parameters): a base width of at most {share:.0%} would fit"
    )


def fit(model: FastUNet, x: Tensor) -> MemoryPlan:
    """The cheapest plan for a forward pass on x and its backward in the memory that is left now.

    Where nothing fits, the plan with the least peak, and a warning.
    """
    device = x.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
    key = (
        tuple(x.shape),
        dtype,
        backends.requested(),
        *(m.training for m in model.modules()),
        *(p.requires_grad for p in model.parameters()),
    )
    steps = model.__dict__.setdefault("_steps", {})
    if key not in steps:
        steps[key] = step_of(model, x.shape, dtype)
    step: Step = steps[key]
    there = [x, *model.parameters(), *model.buffers()]
    there += [p.grad for p in model.parameters() if p.grad is not None]
    held = sum(t.untyped_storage().nbytes() for t in there)
    left = available(device)
    budget = held + max(0, int(left * (1 - RESERVED_SHARE)) - RESERVED)
    found = step.within(budget)
    if found is None:
        warnings.warn(
            f"{format_size(left)} of memory are left on {device}, and a training step at "
            f"{'x'.join(map(str, x.shape))} needs {format_size(step.least - held)} at least",
            stacklevel=3,
        )
        found = step.plan(step.choices[-1], budget)
    return found
