"""Programs: the kernel calls of a pass, noted while it runs, and then run without Python.

A ``Recorder`` looks on while PyTorch does a pass. What it understands are the kernels of ``csrc``,
allocations, copies, sums and views. A ``Program`` is a part of what it noted as a row of numbers,
which ``run_program`` (csrc/program) works off. Python takes as long for a layer as the kernels of a
small one: they leave nothing of its code and objects in the caches.
"""

import struct
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .activation import MAX_POOL
from .extension import kernels
from .ops._register import implementations_by_operator

aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
COPIES = {aten.clone.default, aten._to_copy.default}
# The numbers of csrc/program.
EMPTY, VIEW, FREE, RETURN = -1, -2, -3, -4
NONE, TENSOR, MAYBE_TENSOR, INT, FLOAT, TEXT, BOOL = range(7)
KINDS = {
    "Tensor": TENSOR,
    "Optional[Tensor]": MAYBE_TENSOR,
    "int": INT,
    "float": FLOAT,
    "str": TEXT,
    "bool": BOOL,
}
LONGEST_TEXT = 8
# Of c10/core/ScalarType.h.
SCALAR_TYPES = {
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
}


class Layout(NamedTuple):
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # in its storage

    @staticmethod
    def of(t: Tensor) -> "Layout":
        return Layout(t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset()))

    @property
    def bytes(self) -> int:
        """From the first element to behind the last."""
        if 0 in self.sizes:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def dense(self) -> bool:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize == self.bytes


class Step(NamedTuple):
    """``empty`` slot, ``view`` base slot, or a kernel's name and its arguments: (kind, value) each.
    A tensor's value is its slot."""

    what: str
    arguments: list[tuple[int, Any]]

    @property
    def slots(self) -> list[int]:
        return [value for kind, value in self.arguments if kind in (TENSOR, MAYBE_TENSOR)]

    def renamed(self, names: dict[int, int]) -> "Step":
        tensors = (TENSOR, MAYBE_TENSOR)
        return Step(
            self.what, [(k, names.get(v, v) if k in tensors else v) for k, v in self.arguments]
        )


class Recorder(TorchDispatchMode):
    """Notes what is called within this context, and lets it be done.

    given: the tensors that are there before, slots 0, 1, ...; a slot is a tensor's place.
    why_not: what makes it impossible to write a program; empty while nothing does.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.why_not = ""
        self.steps: list[Step] = []
        self.layouts: list[Layout] = []  # of each slot
        self.bases: list[int] = []  # the slot into which it is a view, else itself
        # Also of storages that are gone, until another one has their address.
        self.by_storage: dict[int, int] = {}
        self.written: set[int] = set()
        self.operators = implementations_by_operator()
        self.namespace = kernels().name
        self.own_allocations = {kernels().empty_map.default, kernels().empty_contiguous.default}
        for t in given:
            if t.untyped_storage()._cdata in self.by_storage:
                self.fail("tensors share memory")
            self.new_base(t)
        self.given = len(self.layouts)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler, which takes a second

    def changed(self) -> list[int]:
        """Of what was given, what is written."""
        return [slot for slot in self.written if slot < self.given]

    def fail(self, why: str) -> int:
        self.why_not = self.why_not or why
        return 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.operators:
            with self:
                return self.operators[func](*args)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if not self.why_not:
            self.note(func, args, kwargs, out)
        return out

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        if func in ALLOCATIONS or func in self.own_allocations:
            self.allocate(out)
        elif func in ZEROS:
            self.call("zero", self.allocate(out))
        elif func is aten.zero_.default:
            self.call("zero", self.slot_of(out))
        elif func in COPIES:
            source = self.slot_of(args[0])
            self.call("copy", self.allocate(out), source)
        elif func is aten.copy_.default:
            self.call("copy", self.slot_of(out), self.slot_of(args[1]))
        elif func in (aten.add.Tensor, aten.add_.Tensor) and is_sum(args, kwargs, out):
            one, other = map(self.slot_of, args)
            self.call("add", one if func is aten.add_.Tensor else self.allocate(out), one, other)
        elif func.namespace == self.namespace and out is None:
            self.call_kernel(func, args)
        elif func._schema.is_mutable or not is_view(out, args):
            self.fail(str(func))
        # else its slot is made where it is read

    def new_slot(self, layout: Layout, base: int | None = None) -> int:
        slot = len(self.layouts)
        self.layouts.append(layout)
        self.bases.append(slot if base is None else base)
        return slot

    def new_base(self, t: Tensor) -> int:
        slot = self.by_storage[t.untyped_storage()._cdata] = self.new_slot(Layout.of(t))
        return slot

    def slot_of(self, t: Tensor) -> int:
        """Where t is; for a view, a new slot."""
        base, layout = self.by_storage.get(t.untyped_storage()._cdata), Layout.of(t)
        if base is None:
            return self.fail(f"a tensor {list(t.shape)} that is not from here")
        if layout == self.layouts[base]:
            return base
        slot = self.new_slot(layout, base)
        self.steps.append(Step("view", [(TENSOR, base), (TENSOR, slot)]))
        return slot

    def allocate(self, t: Tensor) -> int:
        if t.dtype not in SCALAR_TYPES:
            return self.fail(f"a tensor of {t.dtype}")
        slot = self.new_base(t)
        self.steps.append(Step("empty", [(TENSOR, slot)]))
        return slot

    def call(self, name: str, out: int, *slots: int) -> None:
        self.written.add(self.bases[out])
        self.steps.append(Step(name, [(TENSOR, s) for s in (out, *slots)]))

    def call_kernel(self, func: Any, args: Sequence[Any]) -> None:
        arguments: list[tuple[int, Any]] = []
        for parameter, value in zip(func._schema.arguments, args, strict=True):
            kind = NONE if value is None else KINDS.get(str(parameter.type), -1)
            if kind == -1:
                self.fail(f"{func} with {parameter.name}")
            if kind == TEXT and len(value) > LONGEST_TEXT:
                self.fail(f"{value!r}, which is longer than {LONGEST_TEXT} characters")
            if kind in (TENSOR, MAYBE_TENSOR):
                value = self.slot_of(value)
                if parameter.alias_info is not None and parameter.alias_info.is_write:
                    self.written.add(self.bases[value])
            arguments.append((kind, value or 0))
        self.steps.append(Step(func._schema.name.partition("::")[2], arguments))


def is_view(out: Any, args: Sequence[Any]) -> bool:
    storages = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
    return isinstance(out, Tensor) and out.untyped_storage()._cdata in storages


def is_sum(args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> bool:
    """Whether it is one that the kernel ``add`` does."""
    if kwargs or not isinstance(args[1], Tensor):
        return False
    one, other, result = (Layout.of(t)._replace(offset=0) for t in (*args, out))
    return one == other == result and one.dense and one.dtype.is_floating_point


class Program:
    """Steps as numbers.

    returned: the slots whose tensors it returns.
    inputs: the slots that it must be given, in this order: ``first``, others that it reads, and
    of these last the ones in ``own``, whose memory it may free.
    """

    def __init__(
        self,
        recorder: Recorder,
        steps: Sequence[Step],
        returned: Sequence[int],
        first: Sequence[int] = (),
        own: Collection[int] = (),
    ) -> None:
        layouts, bases = recorder.layouts, list(recorder.bases)
        steps = without_unread(steps, bases, returned)
        steps, returned = sums_in_place(steps, bases, returned)
        steps = sums_by_kernels(steps, bases, returned, layouts)
        made = {step.slots[0] for step in steps if step.what == "empty"}
        used = [bases[s] for step in steps for s in step.slots] + [bases[s] for s in returned]
        inputs = dict.fromkeys([*first, *(s for s in used if s not in made)])
        self.inputs = sorted(inputs, key=lambda slot: slot in own)
        numbers = {slot: i for i, slot in enumerate(self.inputs)}
        last = {bases[s]: i for i, step in enumerate(steps) for s in step.slots}
        kept = {bases[s] for s in returned}
        words: list[int] = []
        for i, step in enumerate(steps):
            for slot in step.slots:
                numbers.setdefault(slot, len(numbers))
            words += instruction(step, numbers, layouts)
            gone = {bases[s] for s in step.slots if last[bases[s]] == i} - kept
            if free := [numbers[s] for s in numbers if bases[s] in gone]:
                words += [FREE, len(free), *free]
        words += [RETURN, len(returned), *(numbers[s] for s in returned)]
        self.code = torch.tensor([len(numbers), *words], dtype=torch.int64)

    def run(self, inputs: list[Tensor], own: list[Tensor] | None = None) -> list[Tensor]:
        """own: the last of the inputs; the list is emptied, so that nobody holds them but the
        program, which frees their memory as it goes on."""
        held = 0
        if own:
            held = kernels().hold(own)
            own.clear()
        return kernels().run_program(self.code, inputs, held)


def without_unread(steps: Sequence[Step], bases: list[int], returned: Sequence[int]) -> list[Step]:
    """Without memory and views that no kernel sees."""
    passive = ("empty", "view")
    read = {bases[s] for step in steps if step.what not in passive for s in step.slots}
    read |= {bases[s] for s in returned}
    return [s for s in steps if s.what not in passive or bases[s.slots[0]] in read]


def sums_in_place(
    steps: Sequence[Step], bases: list[int], returned: Sequence[int]
) -> tuple[list[Step], list[int]]:
    """Sums to where their first term was, if nobody reads that later; ``bases`` changes with it."""
    made = {step.slots[0] for step in steps if step.what == "empty"}
    last = {bases[s]: i for i, step in enumerate(steps) for s in step.slots}
    kept = {bases[s] for s in returned}
    names: dict[int, int] = {}
    for i, step in enumerate(steps):
        if step.what != "add":
            continue
        out, one, _ = step.slots
        one = names.get(one, one)
        if out in made and one in made and one not in kept and last[one] == i and out != one:
            names[out] = one
            last[one] = last[out]
            if out in kept:
                kept.add(one)
    bases[:] = [names.get(base, base) for base in bases]
    steps = [s for s in steps if s.what != "empty" or s.slots[0] not in names]
    return [step.renamed(names) for step in steps], [names.get(s, s) for s in returned]


def sums_by_kernels(
    steps: Sequence[Step], bases: list[int], returned: Sequence[int], layouts: list[Layout]
) -> list[Step]:
    """Sums of what has come back to a map, and what comes back from pooling it, by the kernel that
    makes the latter: where that is fp32, which it does not round before it adds."""
    parameters = kernels().conv_norm_act_bwd.default._schema.arguments
    place = {parameter.name: i for i, parameter in enumerate(parameters)}
    uses = Counter(bases[s] for step in steps for s in {*step.slots}) + Counter(returned)
    found: list[Step] = []
    names: dict[int, int] = {}
    for i, step in enumerate(steps):
        if step.what == "add" and step.slots[2] in names:
            continue
        if step.what == "conv_norm_act_bwd":
            made = [step.arguments[place[name]][1] for name in ("dy0", "dscale0", "dshift0")]
            sums = [s.slots for s in steps[i + 1 : i + 4] if s.what == "add"]
            if (
                step.arguments[place["mode0"]] == (INT, MAX_POOL)
                and [other for out, one, other in sums if out == one] == made
                and layouts[made[0]].dtype == torch.float32
                # Memory, the kernel and the sum are all that know them.
                and all(bases[s] == s and uses[s] == 3 for s in made)
            ):
                names.update((other, out) for out, _, other in sums)
                step = step.renamed(names)
                step.arguments[place["add"]] = (BOOL, True)
        found.append(step)
    return [s for s in found if s.what != "empty" or s.slots[0] not in names]


def instruction(step: Step, numbers: dict[int, int], layouts: list[Layout]) -> list[int]:
    slots = [numbers[s] for s in step.slots]
    if step.what in ("empty", "view"):
        dtype, sizes, strides, offset = layout = layouts[step.slots[-1]]
        shape = [len(sizes), *sizes, *strides]
        if step.what == "view":
            return [VIEW, *slots, offset - layouts[step.slots[0]].offset, *shape]
        return [EMPTY, *slots, SCALAR_TYPES[dtype], layout.bytes, *shape]
    words = [kernels().kernel_number(step.what), len(step.arguments)]
    for kind, value in step.arguments:
        words += [kind, numbers[value] if kind in (TENSOR, MAYBE_TENSOR) else word(kind, value)]
    return words


def word(kind: int, value: Any) -> int:
    if kind == FLOAT:
        return struct.unpack("q", struct.pack("d", value))[0]
    if kind == TEXT:
        return int.from_bytes(value.encode(), "little")
    return value
