"""Whether the kernels compute right on the GPU at hand: seen before they are first chosen.

Each operator runs once, forward and backward, in each of the ways that its backend may take,
against the definitions in float64. The verdict holds for a GPU model, torch's version and that of
the kernels; it is kept in a file, or comes with the package.
"""

import contextlib
import functools
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastunet import aten_convolution, backends, cache, compiled, composed, reference
from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    MAX_POOL,
    NEAREST,
    NONE,
    Activation,
)
from fastunet.aten_convolution import precision_of
from fastunet.composed import Norm, SourceGrads
from fastunet.prepared import keeping
from fastunet.reference.resample import accumulate_dtype

# Verdicts that come with the package, as `make gpu STAGE=verify` finds them.
COMMITTED = Path(__file__).with_name("verified.json")
# Relative L2 distance from float64 that rounding explains: of inputs that are exact in the dtype,
# results and what is formed between the kernels are rounded.
TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
    torch.float32: 5e-3,
    torch.float64: 1e-9,
}

LEAST_CAPABILITY = (8, 0)

Results = dict[str, Tensor]
Run = Callable[[ModuleType, torch.dtype], Results]


def too_old(device: torch.device) -> str:
    """Why the kernels are not for this GPU; empty where they are."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= LEAST_CAPABILITY:
        return ""
    return f"the GPU must have compute capability 8.0 or more, got {capability}"


def distrusted(backend: str, operator: str, x: Tensor) -> str:
    """Why a backend's kernels for an operator are not to be chosen by themselves on the GPU; empty
    where they are.

    Runs the check where no verdict is known: once for a GPU model, a dtype and these versions, as
    verdicts are kept, and some come with the package. Triton kernels must be compiled for it, at
    0.7 seconds of a core each and on all cores: about 94 for conv_norm_act, 15 to 30 for another
    operator. A model needs some of them anyway; with 8 cores it waits for some ten seconds, with
    one for a minute or two.
    """
    key = key_of(backend, operator, x.dtype, x.device)
    found = verdicts().get(key)
    if found is not None:
        if found:
            warn_once(found)
        return found
    if isinstance(x, FakeTensor):  # nothing runs
        return ""
    if torch.cuda.is_current_stream_capturing():
        return "the kernels have not been checked on this GPU, and cannot be in a CUDA graph"
    with checking:
        if key not in verdicts():
            why, lasting = check(backend, operator, x.dtype, x.device)
            verdicts()[key] = why
            if lasting:
                cache.save("self_check", {key: why})
    return distrusted(backend, operator, x)


checking = threading.Lock()


@functools.cache
def warn_once(why: str) -> None:
    warnings.warn(f"FastUNet: {why}", RuntimeWarning, stacklevel=2)


def key_of(backend: str, operator: str, dtype: torch.dtype, device: torch.device) -> str:
    products = f" {precision_of(dtype)}" if dtype == torch.float32 else ""
    version = f"{backends.module(backend).version()} composed {composition()}"
    return f"{backend} {operator} {dtype}{products} {cache.fingerprint(device, version)}"


@functools.cache
def composition() -> str:
    """Of what is put together from kernels."""
    text = hashlib.sha256()
    for module in (aten_convolution, compiled, composed):
        text.update(Path(str(module.__file__)).read_bytes())
    return text.hexdigest()[:16]


@functools.cache
def verdicts() -> dict[str, str]:
    """Known verdicts: empty, or what was wrong."""
    return cache.read(COMMITTED) | cache.read(cache.file("self_check"))


def check(
    backend: str, operator: str, dtype: torch.dtype, device: torch.device
) -> tuple[str, bool]:
    """Empty, or what a backend gets wrong in an operator on the device; and whether that will be
    so again: not where something failed, which need not be the kernels' fault."""
    with contextlib.ExitStack() as stack:
        # Whatever the caller's mode is.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(keeping(None))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        return compare(backend, operator, dtype, device)


def compare(
    backend: str, operator: str, dtype: torch.dtype, device: torch.device
) -> tuple[str, bool]:
    kernels = backends.module(backend)
    cases = list(CASES[operator](device))
    if hasattr(kernels, "compile_ahead"):
        with contextlib.suppress(Exception):  # raised again below
            kernels.compile_ahead(lambda: run_all(kernels, operator, cases, dtype))
    for name, run in cases:
        want = None
        for way in ways(kernels, operator):
            try:
                with way:
                    got = run(kernels, dtype)
                want = want or run(reference, torch.float64)
            except Exception as error:  # a compiler's or a driver's, or no memory
                why = (
                    f"the {backend} kernels of {operator} in {dtype} fail here ({name}): {error!r}"
                )
                return why, False
            for result, exact in want.items():
                distance = (got[result].double() - exact).norm() / exact.norm()
                if not distance <= TOLERANCE[dtype]:
                    why = (
                        f"the {backend} kernels of {operator} in {dtype} are wrong here: {result} "
                        f"({name}) is {distance:.2g} from float64, allowed: {TOLERANCE[dtype]:.2g}"
                    )
                    return why, True
    return "", True


def run_all(
    kernels: ModuleType, operator: str, cases: Sequence[tuple[str, Run]], dtype: torch.dtype
) -> None:
    for _, run in cases:
        for way in ways(kernels, operator):
            with way:
                run(kernels, dtype)


def ways(kernels: ModuleType, operator: str) -> Sequence[AbstractContextManager]:
    """The ways that a backend can go, to enter one by one."""
    return kernels.ways(operator) if hasattr(kernels, "ways") else [nullcontext()]


class Draw:
    """Random tensors, exact in every dtype, the same for every reader."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, *shape: int, scale: float = 1.0) -> Tensor:
        t = torch.randn(*shape, generator=self.generator, device="cpu") * scale
        t = t.bfloat16().float().to(self.device)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def source(
        self,
        channels: int,
        size: tuple[int, int],
        mode: int = NONE,
        affine: bool = True,
        rows: int = 1,
    ) -> Activation:
        source = Activation.of(self.tensor(2, channels, *size), torch.channels_last)
        if mode != NONE:
            source = source.pool() if mode == MAX_POOL else source.upsample(mode)
        if not affine:
            return source
        center, scale, shift = (self.tensor(rows, channels) for _ in range(3))
        return source._replace(center=center, scale=scale, shift=shift, slope=0.01)


def of_dtype(source: Activation, dtype: torch.dtype) -> Activation:
    vectors = accumulate_dtype(dtype)
    center, scale, shift = (None if v is None else v.to(vectors) for v in source[1:4])
    return source._replace(y=source.y.to(dtype), center=center, scale=scale, shift=shift)


def named(**results: Any) -> Results:
    """Those that there are; tuples count their members."""
    flat: dict[str, Any] = {}
    for name, result in results.items():
        several = isinstance(result, tuple)
        flat |= {f"{name} {i}": t for i, t in enumerate(result)} if several else {name: result}
    return {name: t for name, t in flat.items() if t is not None and t.numel()}


def conv_norm_act_cases(device: torch.device) -> Iterator[tuple[str, Run]]:
    draw = Draw(device)
    sources = {
        "image": (24, [draw.source(3, (9, 21), affine=False)]),
        "affine": (64, [draw.source(64, (9, 37))]),
        "narrow": (128, [draw.source(128, (11, 12))]),
        "row of 64": (128, [draw.source(128, (3, 50))]),
        "row of 128": (64, [draw.source(64, (3, 140), affine=False)]),
        "wide": (256, [draw.source(128, (3, 140))]),
        "pair": (64, [draw.source(64, (6, 80)), draw.source(40, (3, 40), BILINEAR)]),
        "plain pair": (128, [draw.source(c, (3, 130), affine=False) for c in (72, 128)]),
        "pooled": (48, [draw.source(24, (14, 22), MAX_POOL)]),
        "many tiles": (8, [draw.source(3, (160, 400), affine=False)]),
        "group": (64, [draw.source(64, (9, 20), rows=2)]),
        "instance": (24, [draw.source(24, (9, 20), rows=2)]),
    }
    for name, (outputs, inputs) in sources.items():
        channels = sum(s.y.size(1) for s in inputs)
        weight = draw.tensor(outputs, channels, 3, 3, scale=(9 * channels) ** -0.5)
        vectors = [draw.tensor(outputs) for _ in range(4)]
        dy = draw.tensor(2, outputs, *inputs[0].size)

        def run(
            kernels: ModuleType,
            dtype: torch.dtype,
            inputs: list[Activation] = inputs,
            weight: Tensor = weight,
            vectors: list[Tensor] = vectors,
            dy: Tensor = dy,
            name: str = name,
            outputs: int = outputs,
        ) -> Results:
            wide = accumulate_dtype(dtype)
            gamma, beta, dscale, dshift = (v.to(wide) for v in vectors)
            groups = {"group": 8, "instance": outputs}.get(name, 0)
            kind = "group" if groups else "batch"
            norm = Norm(kind, gamma, beta, None, None, groups, 1e-5)
            read = [of_dtype(s, dtype) for s in inputs]
            made = composed.conv_norm_act(kernels, read, weight.to(wide), None, norm)
            y, center, scale, _, var = made
            rows = center.size(0)
            grads = SourceGrads(dy.to(dtype), dscale.repeat(rows, 1), dshift.repeat(rows, 1))
            needs = [True] * (1 + len(read))
            dweight, _, dgamma, dbeta, of_sources = composed.conv_norm_act_bwd(
                kernels, grads, read, needs, weight.to(wide), None, norm, y, center, scale, var
            )
            found = named(made=made, dweight=dweight, dgamma=dgamma, dbeta=dbeta)
            for i, grads_of_source in enumerate(of_sources):
                found |= named(**{f"grads of source {i}": tuple(grads_of_source)})
            frozen = Norm("frozen", gamma, beta, dscale, dshift.square() + 0.5, 0, 1e-5)
            z = composed.conv_norm_act_folded(kernels, read, weight.to(wide), None, frozen, 0.01)
            return found | named(folded=z)

        yield name, run


def conv_transpose_cases(device: torch.device) -> Iterator[tuple[str, Run]]:
    draw = Draw(device)
    for channels, outputs, size in ((64, 32, (7, 19)), (128, 64, (3, 70)), (256, 128, (2, 130))):
        source = draw.source(channels, size)
        weight = draw.tensor(channels, outputs, 2, 2, scale=channels**-0.5)
        bias, dy = draw.tensor(outputs), draw.tensor(2, outputs, 2 * size[0], 2 * size[1])

        def run(
            kernels: ModuleType,
            dtype: torch.dtype,
            source: Activation = source,
            weight: Tensor = weight,
            bias: Tensor = bias,
            dy: Tensor = dy,
        ) -> Results:
            wide = accumulate_dtype(dtype)
            read, w = of_dtype(source, dtype), weight.to(wide)
            y = composed.conv_transpose(kernels, read, w, bias.to(wide))
            grads = composed.conv_transpose_bwd(kernels, dy.to(dtype), read, [True, True], w)
            return named(y=y, dweight=grads[0], dbias=grads[1], grads=tuple(grads[2]))

        yield f"{channels} to {outputs} channels", run


def resample_cases(device: torch.device) -> Iterator[tuple[str, Run]]:
    draw = Draw(device)
    for mode in (NONE, MAX_POOL, BILINEAR, BILINEAR_ALIGN_CORNERS, NEAREST):
        for channels in (64, 24, 5):
            source = draw.source(channels, (11, 18), mode)
            source = source.place((source.size[0] + 1, source.size[1] - 2))
            dz = draw.tensor(2, channels, *source.size)

            def run(
                kernels: ModuleType,
                dtype: torch.dtype,
                source: Activation = source,
                dz: Tensor = dz,
            ) -> Results:
                read = of_dtype(source, dtype)
                grads = kernels.resample_bwd(read, dz.to(dtype))
                return named(z=kernels.resample(read), grads=tuple(grads))

            yield f"mode {mode}, {channels} channels", run


def head_cases(device: torch.device) -> Iterator[tuple[str, Run]]:
    draw = Draw(device)
    for channels, classes in ((64, 2), (64, 21), (24, 1)):
        source = draw.source(channels, (9, 50))
        weight, bias = draw.tensor(classes, channels, scale=channels**-0.5), draw.tensor(classes)
        dlogits = draw.tensor(2, classes, *source.size)

        def run(
            kernels: ModuleType,
            dtype: torch.dtype,
            source: Activation = source,
            weight: Tensor = weight,
            bias: Tensor = bias,
            dlogits: Tensor = dlogits,
        ) -> Results:
            wide = accumulate_dtype(dtype)
            read, w = of_dtype(source, dtype), weight.to(wide)
            formats = (torch.channels_last, torch.contiguous_format)
            logits = tuple(torch.empty_like(dlogits, dtype=dtype, memory_format=f) for f in formats)
            for out in logits:
                kernels.head(read, w, bias.to(wide), out)
            grads = kernels.head_bwd(read, w, dlogits.to(dtype), True)
            return named(logits=logits, grads=tuple(grads))

        yield f"{channels} channels, {classes} classes", run


CASES = {
    "conv_norm_act": conv_norm_act_cases,
    "conv_transpose": conv_transpose_cases,
    "resample": resample_cases,
    "head": head_cases,
}
