"""head: the 1x1 convolution of an Activation to the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from fastunet import backends
from fastunet.activation import Activation
from fastunet.composed import as_dtype, like_parameter
from fastunet.reference.resample import accumulate_dtype

from ._register import define, differentiable, placeholder_for, refuse_transforms
from .source import COUNT, FIRST, cast, compute_dtype, fake_source_grads, flatten, unflatten


def head(
    x: Activation,
    weight: Tensor,
    bias: Tensor | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """The logits [N, K, H, W] in ``memory_format``.

    Args:
        x: the Activation, [N, C, H, W] once materialised; no resampling may be pending.
        weight: [K, C, 1, 1]; bias: [K].

    Raises:
        TypeError: where dtypes or devices differ outside autocast.
        ValueError: where channels do not fit.
    """
    x = cast(x, compute_dtype(x.y, weight, "head", {"bias": bias}))
    if weight.size(1) != x.y.size(1):
        raise ValueError(f"head: weight must be [K, {x.y.size(1)}, 1, 1], got {list(weight.shape)}")
    if x.resampling_pending:
        raise ValueError("head: no resampling may be pending: materialize() the input first")
    refuse_transforms(*x[:4], weight, bias)
    channels_last = memory_format == torch.channels_last
    return torch.ops.fastunet.head(
        *flatten(x), x.size, weight, bias, channels_last, backends.requested()
    )


SCHEMA = (
    f"({FIRST}, SymInt[2] size, Tensor weight, Tensor? bias, bool channels_last, str backend)"
    " -> Tensor"
)
BWD_SCHEMA = (
    f"(Tensor dlogits, {FIRST}, SymInt[2] size, Tensor weight, bool need_source, str backend)"
    " -> (Tensor dweight, Tensor dbias, Tensor dy0, Tensor dscale0, Tensor dshift0)"
)
REST = COUNT + 1


def matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, C, 1, 1] -> [K, C] in the dtype of arithmetic."""
    return weight.to(accumulate_dtype(dtype)).reshape(weight.shape[:2]).contiguous()


def implementation(*args: Any) -> Tensor:
    source = unflatten(args[:COUNT], args[COUNT])
    weight, bias, *_, backend = args[REST:]
    logits = fake(*args)
    w = matrix(weight, source.y.dtype)
    backends.select(backend, "head", args[0]).head(source, w, as_dtype(bias, w.dtype), logits)
    return logits


def fake(*args: Any) -> Tensor:
    weight, _, channels_last, _ = args[REST:]
    x = args[0]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (x.size(0), weight.size(0), *args[COUNT])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def implementation_bwd(dlogits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    source = unflatten(args[:COUNT], args[COUNT])
    weight, need_source, backend = args[REST:]
    kernels = backends.select(backend, "head", args[0])
    *of_source, dweight, dbias = kernels.head_bwd(
        source, matrix(weight, source.y.dtype), dlogits, need_source
    )
    dweight = like_parameter(dweight.view(weight.shape), weight)
    return dweight, dbias, *(placeholder_for(t, args[0]) for t in of_source)


def fake_bwd(dlogits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, need_source, _ = args[REST:]
    dbias = weight.new_empty(weight.size(0), dtype=accumulate_dtype(dlogits.dtype))
    return torch.empty_like(weight), dbias, *fake_source_grads(args[0], args[2], need_source)


def save(ctx: Any, args: tuple, output: Tensor) -> None:
    weight, bias, _, backend = args[REST:]
    ctx.save_for_backward(*args[:4], weight)
    ctx.slope_mode_size, ctx.backend = args[4:REST], backend
    ctx.bias_dtype = None if bias is None else bias.dtype


def backward(ctx: Any, dlogits: Tensor | None) -> tuple:
    *source, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:]
    if dlogits is None:
        return (None,) * len(needs)
    dweight, dbias, dy, dscale, dshift = torch.ops.fastunet.head_bwd(
        dlogits, *source, *ctx.slope_mode_size, weight, any(needs[:4]), ctx.backend
    )
    return (
        dy if needs[0] else None,
        None,
        dscale if needs[2] else None,
        dshift if needs[3] else None,
        None,
        None,
        None,
        dweight if needs[REST] else None,
        dbias.to(ctx.bias_dtype) if needs[REST + 1] else None,
        None,
        None,
    )


define("head", SCHEMA, implementation, fake)
define("head_bwd", BWD_SCHEMA, implementation_bwd, fake_bwd)
differentiable("head", save, backward)


@register_flop_formula(torch.ops.fastunet.head)
def flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    return conv_flop_count(args[0], args[REST], out_shape)


@register_flop_formula(torch.ops.fastunet.head_bwd)
def flops_bwd(dlogits: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
    return conv_flop_count(args[0], args[REST], dlogits) * (1 + args[REST + 1])
