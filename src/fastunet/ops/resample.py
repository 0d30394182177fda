"""resample: materialises an Activation's pending work into an ordinary tensor."""

from typing import Any

import torch
from torch import Tensor

from fastunet import backends
from fastunet.activation import Activation, Concat

from ._register import define, differentiable, placeholder_for, refuse_transforms
from .source import COUNT, FIRST, fake_source_grads, flatten, unflatten


def materialize(x: Activation | Concat | Tensor) -> Tensor:
    """The tensor that an Activation (or two, concatenated) stands for, in its memory format."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, Concat):
        return torch.cat([materialize(x.first), materialize(x.second)], dim=1)
    if not x.pending:
        return x.y.contiguous(memory_format=x.memory_format)
    refuse_transforms(*x[:4])
    z = torch.ops.fastunet.resample(*flatten(x), x.size, backends.requested())
    return z.contiguous(memory_format=x.memory_format)


SCHEMA = f"({FIRST}, SymInt[2] size, str backend) -> Tensor"
BWD_SCHEMA = (
    f"(Tensor dz, {FIRST}, SymInt[2] size, str backend)"
    " -> (Tensor dy0, Tensor dscale0, Tensor dshift0)"
)


def implementation(*args: Any) -> Tensor:
    *_, size, backend = args
    return backends.select(backend, "resample", args[0]).resample(unflatten(args[:COUNT], size))


def fake(*args: Any) -> Tensor:
    y = args[0]
    return torch.empty(
        (y.size(0), y.size(1), *args[COUNT]),
        dtype=y.dtype,
        device=y.device,
        memory_format=torch.channels_last,
    )


def implementation_bwd(dz: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, size, backend = args
    kernels = backends.select(backend, "resample", args[0])
    grads = kernels.resample_bwd(unflatten(args[:COUNT], size), dz)
    return tuple(placeholder_for(t, args[0]) for t in grads)


def fake_bwd(dz: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(fake_source_grads(args[0], args[2], True))


def save(ctx: Any, args: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*args[:4])
    ctx.rest = args[4:]


def backward(ctx: Any, dz: Tensor | None) -> tuple:
    needs = ctx.needs_input_grad[1:]
    if dz is None:
        return (None,) * len(needs)
    dy, dscale, dshift = torch.ops.fastunet.resample_bwd(dz, *ctx.saved_tensors, *ctx.rest)
    return (
        dy if needs[0] else None,
        None,
        dscale if needs[2] else None,
        dshift if needs[3] else None,
        *[None] * 4,
    )


define("resample", SCHEMA, implementation, fake)
define("resample_bwd", BWD_SCHEMA, implementation_bwd, fake_bwd)
differentiable("resample", save, backward)
