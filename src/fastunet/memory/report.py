"""Where a training step's memory goes, policy by policy: predicted, and measured if asked for."""

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from fastunet.reference.unet import UNet
from fastunet.unet import FAST_BLOCKS, FastUNet

from .budget import format_size, parse_size
from .counters import measure_allocations
from .ledger import CATEGORIES, FORWARD, SAVED, Ledger, autocast_to, training_step
from .planning import MemoryPlan, Step, step_of

EAGER, CHECKPOINT, PLAN = "eager", "eager, torch.utils.checkpoint", "plan"
POLICIES = ("none", "light", "full")
PLAIN: dict[type, type] = {fast: fast.__bases__[0] for fast in (FastUNet, *FAST_BLOCKS)}
MOST_HELD = 12  # rows of a table


class Moment(NamedTuple):
    """An operator, and bytes by category when, during it, most memory is held."""

    operator: str
    layer: str
    phase: str
    nbytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.nbytes.values())


class Held(NamedTuple):
    """What one operator of a layer has made, and is there at the peak."""

    category: str
    layer: str
    operator: str
    nbytes: int


@dataclass
class Run:
    """One way to run the step.

    Attributes:
        name: ``eager`` (the plain U-Net), the same with ``torch.utils.checkpoint`` around each
            block, or FastUNet's policy; ``plan`` is for the budget.
        peak: predicted, in bytes.
        saved: bytes kept for backward when forward ends.
        cost: what is computed again, as a share of the step's FLOPs and memory traffic; None for
            the plain U-Net.
        measured: peak, in bytes, where it was asked for. On CUDA, what it has above the prediction
            is mostly cuDNN's workspace.
        largest_batch, largest_size: what fits the budget, where it was asked for: images of this
            size, or the side of square images in a batch like this.
        timeline: operator by operator.
        held: at the peak, the largest first.
    """

    name: str
    peak: int
    saved: int
    cost: float | None
    measured: int | None
    largest_batch: int | None
    largest_size: int | None
    timeline: list[Moment] = field(repr=False)
    held: list[Held] = field(repr=False)

    @property
    def at_peak(self) -> Moment:
        return max(self.timeline, key=lambda moment: moment.total)


@dataclass
class MemoryReport:
    """What ``profile`` returns; its text is a table.

    Attributes:
        shape: of the batch. dtype: of the computation. device: ``cpu`` or ``cuda``.
        budget: bytes, or None.
        runs: the ways to run the step, eager PyTorch's first.
        choices: every choice of maps worth making: (peak in bytes, share of the work done again).
        plan: the one for the budget; None without a budget, or where none meets it.
    """

    shape: tuple[int, ...]
    dtype: str
    device: str
    budget: int | None
    runs: list[Run]
    choices: list[tuple[int, float]]
    plan: MemoryPlan | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        runs = [
            {
                **vars(run),
                "timeline": [moment._asdict() for moment in run.timeline],
                "held": [held._asdict() for held in run.held],
            }
            for run in self.runs
        ]
        return {**vars(self), "runs": runs, "plan": self.plan and asdict(self.plan)}

    def run(self, name: str) -> Run:
        return next(run for run in self.runs if run.name == name)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        eager = self.runs[0].peak
        rows, categories = (
            [],
            [c for c in CATEGORIES if any(r.at_peak.nbytes[c] for r in self.runs)],
        )
        optional: dict[str, list[Any]] = {
            "again": [None if r.cost is None else f"{r.cost:.1%}" for r in self.runs],
            "measured": [r.measured and format_size(r.measured) for r in self.runs],
            "largest batch": [r.largest_batch for r in self.runs],
            "largest size": [r.largest_size for r in self.runs],
        }
        optional = {
            k: column for k, column in optional.items() if any(c is not None for c in column)
        }
        for i, run in enumerate(self.runs):
            at_peak = run.at_peak
            rows.append(
                [
                    run.name,
                    format_size(run.peak),
                    f"{run.peak / eager:.2f}",
                    *(format_size(at_peak.nbytes[c]) for c in categories),
                    f"{at_peak.phase} {at_peak.layer}",
                    *(column[i] for column in optional.values()),
                ]
            )
        headers = ["", "peak", "of eager", *categories, "at", *optional]
        held = self.runs[-1].held[:MOST_HELD]
        return "\n".join(
            [
                f"training step at {shape}, {self.dtype}, {self.device}; what is held at its peak",
                "",
                tabulate(rows, headers, disable_numparse=True),
                "",
                f"held at the peak of {self.runs[-1].name!r}, the largest first",
                "",
                tabulate([[*h[:3], format_size(h.nbytes)] for h in held], Held._fields),
            ]
        )


def profile(
    model: FastUNet,
    shape: Iterable[int],
    *,
    dtype: torch.dtype | None = None,
    optimizer_states: int = 0,
    budget: int | float | str | None = None,
    device: str | None = None,
    find_batch: bool = False,
    find_size: bool = False,
    measure: bool = False,
    snapshot: str | os.PathLike | None = None,
) -> MemoryReport:
    """A training step's memory in eager PyTorch, with ``torch.utils.checkpoint``, and under every
    policy: its peak and timeline by category, layer and operator.

    Predicted on fake tensors: nothing is run, and the model may be on the device ``meta``.

    Args:
        model: in the mode in which it will train, with its frozen parts.
        shape: of the batch, [N, C, H, W].
        dtype: of autocast, where it is not the parameters' own.
        optimizer_states: tensors per parameter that the optimizer holds: 1 momentum, 2 Adam.
        budget: as ``plan`` takes it: adds the plan for it.
        device: ``cpu`` or ``cuda``, there or not; where the model is, or ``cpu``, by default. The
            workspaces of a library's convolutions are not predicted.
        find_batch, find_size: also the largest batch, or square image, that fits the budget.
        measure: also run each, and count what is allocated, on the device where the model is.
        snapshot: a file for PyTorch's memory viewer (https://pytorch.org/memory_viz), of the last
            run; CUDA only.

    Raises:
        ValueError: where the shape does not fit the model, or an option lacks what it needs.
    """
    shape = tuple(shape)
    if (find_batch or find_size) and budget is None:
        raise ValueError("finding the largest batch or size needs a budget")
    if snapshot is not None and not (measure and next(model.parameters()).is_cuda):
        raise ValueError("a snapshot needs measure=True and a model on a CUDA device")
    within = None if budget is None else parse_size(budget)
    step = step_of(model, shape, dtype, optimizer_states, device)
    found = None if within is None else step.within(within)

    def ledger_of(network: UNet, policy: str | MemoryPlan, *of_shape: int) -> Ledger:
        return training_step(network, of_shape, dtype, optimizer_states, policy, device)

    def largest(
        name: str, network: UNet, policy: str | MemoryPlan
    ) -> tuple[int | None, int | None]:
        """Batch and size."""
        if within is None:
            return None, None

        def peak(*of_shape: int) -> int:
            if name == PLAN:
                return step_of(model, of_shape, dtype, optimizer_states, device).least
            return ledger_of(network, policy, *of_shape).peak()

        n, *image = shape
        unit = 2**model.depth
        batch = side = None
        if find_batch:
            batch = largest_within(lambda n: peak(n, *image), within)
        if find_size:
            side = unit * largest_within(
                lambda k: peak(n, image[0], k * unit, k * unit), within, least=2, power=2
            )
        return batch, side

    plain = plain_copy(model)
    ways: list[tuple[str, UNet, str | MemoryPlan]] = [
        (EAGER, plain, "none"),
        (CHECKPOINT, plain, "full"),
        *((policy, model, policy) for policy in POLICIES),
    ]
    if found is not None:
        ways.append((PLAN, model, found))
    runs = []
    for name, network, policy in ways:
        ledger = ledger_of(network, policy, *shape)
        measured = None
        if measure:
            last = snapshot if name == ways[-1][0] else None
            measured = measured_peak(network, shape, dtype, optimizer_states, policy, last)
        cost = None if network is plain else cost_of(step, network, policy)
        moments = timeline(ledger)
        saved = max(m.nbytes[SAVED] for m in moments if m.phase == FORWARD)
        batch, side = largest(name, network, policy)
        held = held_at_peak(ledger)
        runs.append(Run(name, ledger.peak(), saved, cost, measured, batch, side, moments, held))
    return MemoryReport(
        shape,
        str(step.dtype).removeprefix("torch."),
        device or ("cuda" if next(model.parameters()).is_cuda else "cpu"),
        within,
        runs,
        [(c.peak, c.cost / step.cost if step.cost else 0.0) for c in step.choices],
        found,
    )


def plain_copy(model: FastUNet) -> UNet:
    """The same network in plain PyTorch."""
    plain = copy.deepcopy(model)
    plain.use_checkpointing("none")
    for module in plain.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return plain


def cost_of(step: Step, model: UNet, policy: str | MemoryPlan) -> float:
    if isinstance(policy, MemoryPlan):
        return policy.cost
    assert isinstance(model, FastUNet)
    names = {module: name for name, module in model.named_modules()}
    forgotten = {names[m] for m in model.forgotten_by(policy)}
    return sum(cost for name, cost in step.costs.items() if name in forgotten) / (step.cost or 1)


def timeline(ledger: Ledger) -> list[Moment]:
    """Of the operators during which anything comes or goes."""
    now, most = dict.fromkeys(CATEGORIES, 0), dict[int, dict[str, int]]()
    total = 0
    peaks: dict[int, int] = {}
    for change in ledger.changes:
        now[change.storage.category] += change.nbytes
        total += change.nbytes
        if total > peaks.get(change.operator, -1):
            peaks[change.operator], most[change.operator] = total, dict(now)
    operators = ledger.operators
    return [
        Moment(operators[i].name, operators[i].layer, operators[i].phase, nbytes)
        for i, nbytes in sorted(most.items())
    ]


def held_at_peak(ledger: Ledger) -> list[Held]:
    live: Counter = Counter()
    at_peak: Counter = Counter()
    total = peak = 0
    for change in ledger.changes:
        live[change.storage] += change.nbytes
        total += change.nbytes
        if total > peak:
            peak, at_peak = total, live.copy()
    held: Counter = Counter()
    for storage, nbytes in at_peak.items():
        operator = ledger.operators[storage.birth]
        held[storage.category, operator.layer, operator.name] += nbytes
    return [Held(key[0], key[1], key[2], nbytes) for key, nbytes in held.most_common() if nbytes]


def measured_peak(
    model: UNet,
    shape: Sequence[int],
    dtype: torch.dtype | None,
    states: int,
    policy: str | MemoryPlan,
    snapshot: str | os.PathLike | None,
) -> int:
    """Runs the step that the ledger predicts, on a copy of the model."""
    model = copy.deepcopy(model)
    model.use_checkpointing(policy)
    first = next(model.parameters())
    x = torch.randn(*shape, dtype=first.dtype, device=first.device)

    def step() -> None:
        with autocast_to(dtype, first.dtype, first.device.type):
            logits = model(x)
        logits.backward(torch.empty_like(logits))

    step()  # libraries choose algorithms, kernels compile
    model.zero_grad()
    if snapshot is not None:
        torch.cuda.memory._record_memory_history()
    try:
        peak = measure_allocations(step, first.device).peak_bytes
        if snapshot is not None:
            partial = f"{snapshot}.partial"
            torch.cuda.memory._dump_snapshot(partial)
            os.replace(partial, snapshot)
    finally:
        if snapshot is not None:
            torch.cuda.memory._record_memory_history(enabled=None)
    static = [x, *model.parameters(), *model.buffers()]
    held = [p for p in model.parameters() if p.requires_grad] * states
    return peak + sum(t.untyped_storage().nbytes() for t in (*static, *held))


def largest_within(peak: Callable[[int], int], budget: int, least: int = 1, power: int = 1) -> int:
    """The largest number whose peak is within the budget; 0 where the least is too large.

    peak: rises, and is nearly a straight line over the number's power.
    """
    known = {0: 0, least: peak(least)}
    fits, too_many = (least, math.inf) if known[least] <= budget else (0, 1)
    while too_many - fits > 1:
        (a, at_a), (b, at_b) = sorted(known.items())[-2:]
        share = (budget - at_a) / max(1, at_b - at_a)
        guess = int(max(0.0, a**power + share * (b**power - a**power)) ** (1 / power))
        guess = int(min(max(guess, fits + 1), too_many - 1))
        known[guess] = peak(guess)
        if known[guess] <= budget:
            fits = guess
        else:
            too_many = guess
    return fits
