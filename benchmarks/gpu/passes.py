"""The stage that measures each pass over memory by itself, against the bandwidth of a copy."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import interleave, quantile
from fastunet import backends, reference
from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    MAX_POOL,
    NEAREST,
    NONE,
    Activation,
)
from fastunet.self_check import TOLERANCE

from .job import Job
from .measurements import ceilings

MODES = {
    "affine": NONE,
    "max-pool": MAX_POOL,
    "bilinear": BILINEAR,
    "bilinear align_corners": BILINEAR_ALIGN_CORNERS,
    "nearest": NEAREST,
}
Results = tuple[Tensor | None, ...]


class Pass(NamedTuple):
    """run: a backend's kernel. bytes: what it has to read and write, each map once."""

    name: str
    run: Callable[[ModuleType, "Inputs"], Results]
    bytes: int


class Inputs:
    """Maps of one size and what reads them; source: with an affine and an activation pending."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).bfloat16().float()

        def laid_out(x: Tensor) -> Tensor:
            return x.to(dtype).contiguous(memory_format=torch.channels_last)

        vectors = torch.float64 if dtype == torch.float64 else torch.float32
        self.y, self.dy = (laid_out(draw(*shape)) for _ in range(2))
        center, scale, shift, self.dscale, self.dshift = (
            draw(1, shape[1]).to(vectors) for _ in range(5)
        )
        self.source = Activation.of(self.y)._replace(
            center=center, scale=scale, shift=shift, slope=0.0
        )
        self.statistics = reference.normalization(self.y, None, None, None, 0, 1e-5)
        self.out = torch.empty_like(self.y)
        self.dz = {
            mode: laid_out(draw(*shape[:2], *self.resampled(mode).size)) for mode in MODES.values()
        }

    def resampled(self, mode: int) -> Activation:
        if mode == NONE:
            return self.source
        return self.source.pool() if mode == MAX_POOL else self.source.upsample(mode)


def normalization_bwd(kernels: ModuleType, x: Inputs) -> Results:
    center, scale, _, var = x.statistics
    sums = kernels.normalization_bwd(
        x.dy, x.dscale, x.dshift, x.y, center, scale, var, 0, 1e-5, x.out
    )
    return x.out, *sums


def passes(shape: tuple[int, int, int, int], itemsize: int) -> list[Pass]:
    n, c, h, w = shape
    size = itemsize * n * c * h * w
    share = {"affine": 1.0, "max-pool": (h // 2) * (w // 2) / (h * w)}
    found = []
    for name, mode in MODES.items():
        other = int(share.get(name, 4.0) * size)

        def forward(kernels: ModuleType, x: Inputs, mode: int = mode) -> Results:
            return (kernels.resample(x.resampled(mode)),)

        def backward(kernels: ModuleType, x: Inputs, mode: int = mode) -> Results:
            return kernels.resample_bwd(x.resampled(mode), x.dz[mode])

        found.append(Pass(f"resample {name}", forward, size + other))
        found.append(Pass(f"resample_bwd {name}", backward, 2 * size + other))

    def statistics(kernels: ModuleType, x: Inputs) -> Results:
        return kernels.normalization(x.y, None, None, None, 0, 1e-5)

    found.append(Pass("statistics", statistics, size))
    found.append(Pass("normalization_bwd", normalization_bwd, 3 * size))
    return found


def measure(
    job: Job,
    shape: tuple[int, int, int, int] = (4, 64, 512, 512),
    names: tuple[str, ...] = ("triton", "cuda"),
    **sizes: int,
) -> None:
    """Those of each backend that are right, in turns: bytes per second, also as a part of what a
    copy reaches here."""
    job.result["shape"] = shape
    limit = ceilings(job, **sizes)
    dtype, device = job.setting.dtype, job.setting.device
    inputs, exact = Inputs(shape, dtype, device), Inputs(shape, torch.float64, device)
    for one in passes(shape, dtype.itemsize):

        def work(one: Pass = one) -> None:
            works = {}
            want = one.run(reference, exact)
            for name in names:
                kernels = backends.module(name)
                try:
                    why = kernels.why_not(inputs.y)
                    why = why or wrong(one.run(kernels, inputs), want, dtype)
                except Exception as error:
                    why = repr(error)
                if why:
                    job.fail(f"{one.name}/{name}", why)
                else:
                    works[name] = lambda kernels=kernels: one.run(kernels, inputs)
            times = interleave(works, job.rounds, job.min_time, device)
            row: dict[str, Any] = {"pass": one.name, "MB": f"{one.bytes / 1e6:.0f}"}
            for name, each in times.items():
                rate = one.bytes / quantile(each, 0.5)
                part = rate / limit["copy"]
                found = {"pass": one.name, "backend": name, "bytes": one.bytes, "seconds": each}
                found |= {"bytes_per_second": rate, "of_copy_ceiling": part}
                job.result["results"].append(found)
                row[f"{name}, GB/s"] = f"{rate / 1e9:.0f} ({part:.0%})"
            job.rows[one.name] = row

        job.do(one.name, "operator", work)


def wrong(got: Results, want: Results, dtype: torch.dtype) -> str:
    for result, exact in zip(got, want, strict=True):
        if result is not None and exact is not None:
            distance = (result.double() - exact).norm() / exact.norm().clamp(min=1e-6)
            if not distance <= TOLERANCE[dtype]:
                return f"{distance:.2g} from float64, allowed: {TOLERANCE[dtype]:.2g}"
    return ""
