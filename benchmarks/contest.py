"""What is measured: cases, their contenders, and the gate that comes before any timing."""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastunet import backend
from fastunet.memory import measure_allocations, saved_for_backward

# A contender's name is made of words. More may follow: fastunet's backend; torch.compile's mode, or
# its memory budget; `graph`: replayed as a CUDA graph; a checkpointing policy.
CONTIGUOUS, CHANNELS_LAST, COMPILED = "eager contiguous", "eager channels_last", "compile"
FROZEN = "compile freezing"  # weights as constants: inference alone
FASTUNET, ORACLE = "fastunet", "float64"
BUDGETED, AUTOTUNED = "compile budget 0.5", "compile max-autotune"
EAGER = (CONTIGUOUS, CHANNELS_LAST)
POLICIES = ("light", "full")
PEERS = ("onnxruntime", "openvino", "ncnn", "mnn")  # inference of networks on CPUs
# Nothing this far from float64 passes, whatever eager's error. Through a whole network in 16 bit
# eager is 0.3 to 0.5 off in its gradients: there the gate finds blunders only.
MOST = {torch.float32: 0.1, torch.bfloat16: 0.9}

# Other libraries' rounding is their own affair, and is reported: the gate finds wrong networks.
PEERS_FLOOR = 1e-2


@dataclass(frozen=True)
class Setting:
    """Where, in which precision and between whom; 16-bit dtypes run under autocast."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    contenders: tuple[str, ...] = (*EAGER, FASTUNET)

    def autocast(self) -> torch.autocast:
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device, self.dtype if low else None, enabled=low)

    def oracle(self) -> "Setting":
        return replace(self, dtype=torch.float64)


def serving(name: str) -> contextlib.AbstractContextManager:
    """The backend that a contender's name asks for: ``fastunet triton``."""
    words = name.split()
    explicit = words[0] == FASTUNET and len(words) > 1
    return backend(words[1]) if explicit else contextlib.nullcontext()


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    run: the work that is timed; returns the tensors that the gate compares.
    record: the forward alone, recorded by autograd; None where the case has no backward.
    parameters: tensors that do not count as saved for backward.
    reads: what the work has to read, where it moves little else than that and its results.
    timed: what is timed, where its memory is not what PyTorch allocates in a call: another library,
        whose results ``run`` fetches, or a recording, which has its memory already.
    """

    run: Callable[[], list[Tensor]]
    record: Callable[[], object] | None = None
    parameters: Iterable[Tensor] = ()
    reads: Iterable[Tensor] = ()
    timed: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """One unit of work that several contenders do from the same data.

    group: ``operators/<operator>`` or ``networks``.
    phase: ``forward`` (inference), ``backward`` (alone) or ``step`` (forward, loss, backward).
    floor: an error (relative L2 from float64) that passes the gate whatever eager's is.
    make: builds one contender, by name.
    """

    group: str
    name: str
    phase: str
    floor: float
    make: Callable[[str, Setting], Contender]
    can_compile: bool = False

    @property
    def id(self) -> str:
        return f"{self.group}/{self.name}/{self.phase}"

    def contenders(self, setting: Setting) -> list[str]:
        """Those of the setting that can do this work."""
        inference_only = (*PEERS, FROZEN)

        def can(name: str) -> bool:
            if name in inference_only or "graph" in name.split():
                return self.can_compile and self.phase == "forward"
            return self.can_compile or not name.startswith(COMPILED)

        return [name for name in setting.contenders if can(name)]


class GateError(AssertionError):
    """A contender's results are wrong, so its speed means nothing."""

    def __init__(self, message: str, contender: str):
        super().__init__(message)
        self.contender = contender


class Gated(NamedTuple):
    """Contenders that may be timed, and their distances from float64."""

    contenders: dict[str, Contender]
    errors: dict[str, float]


def gate(case: Case, setting: Setting) -> Gated:
    """Builds the contenders, and compares what each computes with plain PyTorch in float64.

    Raises:
        GateError: where an error is above the case's floor and above twice that of eager PyTorch
            in the same precision.
    """
    search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:  # in float64 a search for the fastest algorithms takes too long
        oracle = [t.detach() for t in case.make(ORACLE, setting.oracle()).run()]
    finally:
        torch.backends.cudnn.benchmark = search
    contenders, errors = {}, {}
    for name in case.contenders(setting):
        contenders[name] = case.make(name, setting)
        errors[name] = distance(contenders[name].run(), oracle)
    eager = max(errors[name] for name in EAGER)
    allowed = min(MOST[setting.dtype], max(case.floor, 2 * eager))
    for name, error in errors.items():
        most = max(allowed, PEERS_FLOOR) if name in PEERS else allowed
        if not error <= most:
            raise GateError(
                f"{case.id}: {name} is {error:.2g} from float64 (relative L2), "
                f"allowed is {most:.2g}; eager PyTorch is {eager:.2g} from it",
                name,
            )
    return Gated(contenders, errors)


def distance(results: list[Tensor], oracle: list[Tensor]) -> float:
    """Relative L2 distance, root mean square over the tensors; infinite where a result is not
    finite."""
    assert len(results) == len(oracle), f"{len(results)} results, expected {len(oracle)}"
    squares = []
    for result, expected in zip(results, oracle, strict=True):
        difference = result.detach().double().reshape(expected.shape) - expected
        squares.append(float(difference.norm() / expected.norm()) ** 2)
    error = math.sqrt(sum(squares) / len(squares))
    return error if math.isfinite(error) else math.inf


def memory(contender: Contender, device: str) -> dict[str, int | None]:
    """peak_bytes of the work, and saved_bytes of its recorded forward, for a warm contender.

    The peak is None where calls of PyTorch's allocator do not tell.
    """
    if contender.timed is not None:
        return {"peak_bytes": None, "saved_bytes": None}
    peak = measure_allocations(contender.run, device).peak_bytes
    saved = None
    if contender.record is not None:
        saved = saved_for_backward(contender.record, contender.parameters)
    return {"peak_bytes": peak or None, "saved_bytes": saved}


def traffic(contender: Contender) -> int | None:
    """Bytes of what the work reads and of its results, each once; None where nobody says."""
    reads = list(contender.reads)
    return sum(t.nbytes for t in [*reads, *contender.run()]) if reads else None
