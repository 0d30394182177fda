"""What a training step takes, storage by storage and operator by operator, without running it.

The step runs on fake tensors, which have shapes and no memory. FastUNet's operators run the Python
that allocates for their kernels; the kernels are left out. What PyTorch's own operators allocate
and free inside (a convolution's workspace) is not seen.
"""

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastunet.backends import do_nothing
from fastunet.ops._register import implementations
from fastunet.reference.unet import UNet
from fastunet.unet import FastUNet

from .machine import machine

PARAMETERS, OPTIMIZER, INPUT, GRADIENTS = "parameters", "optimizer", "input", "gradients"
SAVED, RECOMPUTED, TEMPORARY = "saved", "recomputed", "temporary"
CATEGORIES = (PARAMETERS, OPTIMIZER, INPUT, GRADIENTS, SAVED, RECOMPUTED, TEMPORARY)
FORWARD, BACKWARD = "forward", "backward"
OUR_FORWARD = ("fastunet::conv_norm_act", "fastunet::conv_transpose")


@dataclass(eq=False)
class Storage:
    """One piece of memory.

    birth, death: indices of the operators during which it came and went; death None: still there.
    """

    nbytes: int
    itemsize: int
    birth: int
    category: str = TEMPORARY
    death: int | None = None


@dataclass(eq=False)
class Operator:
    """One call from outside of any other, and what autograd does until the next one.

    layer: the module that it belongs to. made: what it returned.
    """

    name: str
    layer: str
    phase: str
    made: list[Storage] = field(default_factory=list)


class Change(NamedTuple):
    """One storage comes (bytes) or goes (negative bytes) during an operator."""

    operator: int
    nbytes: int
    storage: Storage


class Ledger(TorchDispatchMode):
    """Within it every storage is entered when an operator returns it, and so is its end."""

    def __init__(self, layers: "Layers") -> None:
        super().__init__()
        self.layers = layers
        self.operators = [Operator("", "", FORWARD)]
        self.changes: list[Change] = []
        self.live: dict[int, Storage] = {}  # by address
        self.depth = 0

    def change(self, nbytes: int, storage: Storage) -> None:
        self.changes.append(Change(len(self.operators) - 1, nbytes, storage))

    def peak(self) -> int:
        return max(accumulate(change.nbytes for change in self.changes))

    def enter(self, tensor: Tensor, category: str = TEMPORARY) -> Storage:
        found = tensor.untyped_storage()
        if storage := self.live.get(found._cdata):
            return storage
        birth = len(self.operators) - 1
        storage = Storage(found.nbytes(), tensor.element_size(), birth, category)
        self.live[found._cdata] = storage
        self.change(storage.nbytes, storage)
        self.watch(found)
        return storage

    def watch(self, found: torch.UntypedStorage) -> None:
        weakref.finalize(found, self.end, found._cdata).atexit = False

    def end(self, address: int) -> None:
        if storage := self.live.pop(address, None):
            storage.death = len(self.operators) - 1
            self.change(-storage.nbytes, storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        if func.namespace.startswith("fastunet_"):
            return None  # a kernel, which writes into its arguments
        name = func._schema.name.removeprefix("aten::")
        backward = torch._C._current_graph_task_id() != -1
        if backward and self.depth == 0 and name == "add":
            return self.add_up(func(*args, **(kwargs or {})), args[0])
        top = self.depth == 0
        if top:
            phase = BACKWARD if backward else FORWARD
            self.operators.append(Operator(name, self.layers.of(args), phase))
        self.depth += 1
        try:
            if func.namespace == "fastunet":
                with self:
                    made = implementations[name.removeprefix("fastunet::")](*args)
            else:
                made = func(*args, **(kwargs or {}))
        finally:
            self.depth -= 1
        storages = [self.enter(t) for t in tree_iter(made) if isinstance(t, Tensor)]
        if top:
            self.operators[-1].made = storages
        if top and backward and (name in OUR_FORWARD or self.layers.running):
            for storage in storages:
                if storage.birth == len(self.operators) - 1:
                    storage.category = RECOMPUTED
        return made

    def add_up(self, total: Tensor, first: Tensor) -> Tensor:
        """Autograd adds up gradients in place, only fake ones out of place: the sum takes the place
        of the first."""
        storage = self.live.pop(first.untyped_storage()._cdata)
        self.live[total.untyped_storage()._cdata] = storage
        self.watch(total.untyped_storage())
        return total


def fake_copy(model: UNet) -> UNet:
    """The model with parameters and buffers that have no memory, on the CPU; to be called within a
    FakeTensorMode. Hooks are there, as layers with hooks run otherwise, and do nothing."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
        is_parameter = isinstance(t, nn.Parameter)
        memo[id(t)] = nn.Parameter(empty, t.requires_grad) if is_parameter else empty
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        if type(module) is nn.SyncBatchNorm:  # there is nobody to talk to
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                for key in hooks:
                    hooks[key] = do_nothing
    return copied


def autocast_to(
    dtype: torch.dtype | None, own: torch.dtype, device: str
) -> contextlib.AbstractContextManager:
    """Autocast where the dtype is not the parameters' own."""
    return torch.autocast(device, dtype or own, enabled=dtype not in (None, own))


def without_hooks() -> contextlib.AbstractContextManager:
    """The caller's saved-tensor hooks shall not see fake tensors."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return contextlib.nullcontext()
    return saved_tensors_hooks(Tensor.detach, lambda kept: kept)


class Layers:
    """Which layer an operator belongs to: the one that owns an argument, or the module that is
    running; in backward, the one whose operator made the node."""

    def __init__(self, model: nn.Module) -> None:
        self.owner = {
            p.untyped_storage()._cdata: name.rpartition(".")[0]
            for name, p in model.named_parameters()
        }
        self.running, self.node = "", -1
        self.of_node: dict[int, str] = {}  # by sequence number
        if not isinstance(model, FastUNet):  # whose layers run otherwise where they have hooks
            for name, module in model.named_modules():
                if not [*module.children()]:
                    module.register_forward_pre_hook(functools.partial(self.enter, name))

    def enter(self, name: str, *_: Any) -> None:
        self.running = name

    def of(self, args: tuple) -> str:
        node = torch._C._current_autograd_node()
        number = torch.autograd._get_sequence_nr() - 1 if node is None else node._sequence_nr()
        if node is not None and number != self.node:
            self.running, self.node = "", number
        for a in args:
            if isinstance(a, Tensor) and (name := self.owner.get(a.untyped_storage()._cdata)):
                break
        else:
            name = self.running or self.of_node.get(number, "")
        if node is None:
            self.of_node[number] = name
        return name


def training_step(
    model: UNet,
    shape: Iterable[int],
    dtype: torch.dtype | None = None,
    states: int = 0,
    policy: Any = None,
    device: str | None = None,
) -> Ledger:
    """The ledger of one forward and backward pass, from a gradient of the logits.

    Args:
        model: a U-Net as it is: in its mode, with its checkpointing policy and frozen parts.
        shape: of the batch, [N, C, H, W].
        dtype: of autocast, where it is not the parameters' own.
        states: tensors per parameter that the optimizer holds: 1 with momentum, 2 for Adam.
        policy: of checkpointing, instead of the model's.
        device: ``cpu`` or ``cuda``, there or not; where the model is, or ``cpu``, by default.
    """
    first = next(model.parameters())
    device = device or ("cuda" if first.is_cuda else "cpu")
    own = first.dtype
    with machine(device, dtype or own), FakeTensorMode():
        model = fake_copy(model)
        if policy is not None:
            model.use_checkpointing(policy)
        x = torch.empty(*shape, dtype=own)
        ledger = Ledger(Layers(model))
        for p in (*model.parameters(), *model.buffers()):
            ledger.enter(p, PARAMETERS)
        ledger.enter(x, INPUT)
        held = [torch.empty_like(p) for p in model.parameters() if p.requires_grad] * bool(states)
        for t in held:
            storage = ledger.enter(t, OPTIMIZER)
            ledger.change((states - 1) * t.untyped_storage().nbytes(), storage)
        collecting = gc.isenabled()
        gc.disable()  # what is freed shall be so by reference counts, as in an ordinary step
        try:
            with torch.enable_grad(), without_hooks(), ledger:
                with autocast_to(dtype, own, "cpu"):
                    logits = model(x)
                output = ledger.enter(logits)
                for storage in ledger.live.values():
                    if storage.category == TEMPORARY and storage is not output:
                        storage.category = SAVED
                logits.backward(torch.empty_like(logits))
        finally:
            if collecting:
                gc.enable()
        for p in model.parameters():
            if p.grad is not None:
                ledger.enter(p.grad).category = GRADIENTS
        ledger.live.clear()  # the fake model's own end is no part of the step
    return ledger
