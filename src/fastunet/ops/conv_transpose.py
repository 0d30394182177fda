"""conv_transpose: 2x2 stride 2 transposed convolution of an Activation."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from fastunet import backends, composed
from fastunet.activation import Activation
from fastunet.recompute import forget
from fastunet.reference.resample import accumulate_dtype

from ._register import define, differentiable, placeholder_for, refuse_transforms
from .source import (
    COUNT,
    FIRST,
    cast,
    compute_dtype,
    fake_source_grads,
    flatten,
    require_channels,
    unflatten,
)


def conv_transpose(
    x: Activation, weight: Tensor, bias: Tensor | None = None, *, recompute: bool = False
) -> Activation:
    """The plain map [N, Cout, 2H, 2W] with nothing pending.

    Args:
        x: the Activation, [N, Cin, H, W] once materialised.
        weight: [Cin, Cout, 2, 2]; bias: [Cout].
        recompute: as ``conv_norm_act`` takes it.

    Raises:
        TypeError: where dtypes or devices differ outside autocast.
        ValueError: where channels do not fit.
    """
    x = cast(x, compute_dtype(x.y, weight, "conv_transpose", {"bias": bias}))
    if weight.size(0) != x.y.size(1) or tuple(weight.shape[2:]) != (2, 2):
        raise ValueError(
            f"conv_transpose: weight must be [{x.y.size(1)}, Cout, 2, 2], got {list(weight.shape)}"
        )
    require_channels(weight, "conv_transpose")
    refuse_transforms(*x[:4], weight, bias)
    arguments = (*flatten(x), x.size, weight, bias, backends.requested())
    y = torch.ops.fastunet.conv_transpose(*arguments)
    if recompute:
        forget(y, torch.ops.fastunet.conv_transpose, arguments)
    return Activation.of(y, x.memory_format)


SCHEMA = f"({FIRST}, SymInt[2] size, Tensor weight, Tensor? bias, str backend) -> Tensor"
BWD_SCHEMA = (
    f"(Tensor dy, {FIRST}, SymInt[2] size, Tensor weight, bool[2] needs, str backend)"
    " -> (Tensor dweight, Tensor dbias, Tensor dy0, Tensor dscale0, Tensor dshift0)"
)
REST = COUNT + 1


def implementation(*args: Any) -> Tensor:
    source = unflatten(args[:COUNT], args[COUNT])
    weight, bias, backend = args[REST:]
    kernels = backends.select_convolution(backend, "conv_transpose", [source], weight)
    return composed.conv_transpose(kernels, source, weight, bias)


def output_shape(args: Any) -> tuple[int, ...]:
    height, width = args[COUNT]
    return args[0].size(0), args[REST].size(1), 2 * height, 2 * width


def fake(*args: Any) -> Tensor:
    return torch.empty(
        output_shape(args),
        dtype=args[0].dtype,
        device=args[0].device,
        memory_format=torch.channels_last,
    )


def implementation_bwd(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    source = unflatten(args[:COUNT], args[COUNT])
    weight, needs, backend = args[REST:]
    kernels = backends.select_convolution(backend, "conv_transpose_bwd", [source], weight)
    dweight, dbias, of_source = composed.conv_transpose_bwd(kernels, dy, source, needs, weight)
    return tuple(placeholder_for(t, args[0]) for t in (dweight, dbias, *of_source))


def fake_bwd(dy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, needs, _ = args[REST:]
    dweight = torch.empty_like(weight) if needs[0] else args[0].new_empty(0)
    dbias = weight.new_empty(weight.size(1), dtype=accumulate_dtype(dy.dtype))
    return dweight, dbias, *fake_source_grads(args[0], args[2], needs[1])


def save(ctx: Any, args: tuple, output: Tensor) -> None:
    weight, bias, backend = args[REST:]
    ctx.save_for_backward(*args[:4], weight)
    ctx.slope_mode_size, ctx.backend = args[4:REST], backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, dy: Tensor | None) -> tuple:
    *source, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:]
    if dy is None:
        return (None,) * len(needs)
    dweight, dbias, dy0, dscale, dshift = torch.ops.fastunet.conv_transpose_bwd(
        dy,
        *source,
        *ctx.slope_mode_size,
        weight,
        [needs[REST], any(needs[:4])],
        ctx.backend,
    )
    return (
        dy0 if needs[0] else None,
        None,
        dscale if needs[2] else None,
        dshift if needs[3] else None,
        None,
        None,
        None,
        dweight if needs[REST] else None,
        dbias.to(ctx.bias_dtype) if needs[REST + 1] else None,
        None,
    )


define("conv_transpose", SCHEMA, implementation, fake)
define("conv_transpose_bwd", BWD_SCHEMA, implementation_bwd, fake_bwd)
differentiable("conv_transpose", save, backward)


@register_flop_formula(torch.ops.fastunet.conv_transpose)
def flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    n, channels = args[0][:2]
    return conv_flop_count([n, channels, *args[COUNT]], args[REST], out_shape, transposed=True)


@register_flop_formula(torch.ops.fastunet.conv_transpose_bwd)
def flops_bwd(dy: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    n, channels = args[0][:2]
    one = conv_flop_count([n, channels, *args[COUNT]], args[REST], dy, transposed=True)
    return one * sum(args[REST + 1])
