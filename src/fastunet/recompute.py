"""Maps that are not kept for backward: made again when the first layer wants one.

Within ``recomputing``, saved-tensor hooks see what every layer keeps. A map that an operator was
told not to keep (``forget``) becomes a recipe there: the operator and its arguments, in which other
such maps are recipes again. Backward makes a map again, bit for bit, when the first layer reads it,
and drops it after the last. Outside, nothing changes. When the forward pass ends, what is kept goes
to the caller's own hooks, if there are any.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Recipe = Callable[[], Tensor]


class Kept:
    """What several layers keep of one map: the map, or how to make it again.

    reads: how many layers keep it; left: how many of them have not read it in this backward.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()
        self.version = tensor._version
        self.layout = layout(tensor)
        self.recipe: Recipe | None = None
        self.dropped = False  # after use
        self.reads = self.left = 0

    def make_again(self, recipe: Recipe) -> None:
        self.tensor, self.recipe, self.dropped = None, recipe, True

    def hand_over(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        """To the hooks of whoever called the network."""
        if self.recipe is None and self.tensor is not None:
            self.check_version()
            packed = pack(self.tensor)
            self.tensor, self.recipe = None, lambda: unpack(packed)

    def check_version(self) -> None:
        if self.tensor is not None and self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {list(self.tensor.shape)}"
            )

    def get(self) -> Tensor:
        if self.recipe is None:
            self.check_version()
        elif self.tensor is None:
            made = self.recipe()
            if not self.dropped:
                return made
            self.tensor = made
        assert self.tensor is not None
        return self.tensor

    def read(self) -> Tensor:
        """For one of the layers; a map that can be made again is dropped after the last."""
        tensor = self.get()
        self.left = (self.left or self.reads) - 1
        if self.dropped and self.left == 0:
            self.tensor = None
        return tensor


def layout(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


class Forward:
    """One forward pass, and the modules whose outputs it shall forget."""

    def __init__(self, forgotten: Collection[nn.Module]) -> None:
        self.forgotten = forgotten
        self.all: list[Kept] = []
        # By storage. Where the map itself is forgotten, the address alone could be another's.
        self.maps: dict[int, tuple[Kept, Callable[[], Tensor | None]]] = {}

    def kept(self, tensor: Tensor) -> Kept | None:
        found, alive = self.maps.get(tensor.untyped_storage()._cdata, (None, None))
        return found if alive is not None and alive() is not None else None

    def pack(self, tensor: Tensor) -> Kept:
        kept = self.kept(tensor)
        if kept is None or kept.layout != layout(tensor):
            kept = Kept(tensor)
            self.all.append(kept)
            if tensor.dim() == 4:
                detached = kept.tensor
                self.maps[tensor.untyped_storage()._cdata] = kept, lambda: detached
        kept.reads += 1
        return kept

    def forget(self, y: Tensor, operator: Callable[..., Any], arguments: tuple) -> None:
        kept = self.kept(y) or Kept(y)
        self.maps[y.untyped_storage()._cdata] = kept, weakref.ref(y)
        kept.make_again(self.recipe(operator, arguments))

    def recipe(self, operator: Callable[..., Any], arguments: tuple) -> Recipe:
        def held(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            return self.kept(argument) or argument.detach()

        parts = tuple(map(held, arguments))

        def make() -> Tensor:
            with torch.no_grad():
                made = operator(*(p.get() if isinstance(p, Kept) else p for p in parts))
            return made[0] if isinstance(made, tuple | list) else made

        return make


class Current(threading.local):
    forward: Forward | None = None


current = Current()


@contextlib.contextmanager
def recomputing(modules: Collection[nn.Module]) -> Iterator[None]:
    """A forward pass that forgets the outputs of these modules."""
    before, forward = current.forward, Forward(modules)
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    current.forward = forward
    try:
        with saved_tensors_hooks(forward.pack, Kept.read):
            yield
        for kept in forward.all if outer else ():
            kept.hand_over(*outer)
    finally:
        current.forward = before
        forward.maps.clear()  # autograd holds on to the hooks, and so to this
        forward.all.clear()


def is_forgotten(module: nn.Module) -> bool:
    return current.forward is not None and module in current.forward.forgotten


def forget(y: Tensor, operator: Callable[..., Any], arguments: tuple) -> None:
    """Backward shall make y again, the (first) result of ``operator(*arguments)``; without effect
    outside of ``recomputing``."""
    if current.forward is not None:
        current.forward.forget(y, operator, arguments)
