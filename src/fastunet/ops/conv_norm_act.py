"""conv_norm_act: 3x3 convolution over one or two Activations, and its output's normalisation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from fastunet import backends, composed
from fastunet.activation import Activation, Concat
from fastunet.composed import Norm, SourceGrads
from fastunet.recompute import forget
from fastunet.reference.resample import accumulate_dtype

from ._register import define, differentiable, placeholder_for, refuse_transforms
from .source import (
    COUNT,
    FIRST,
    SECOND,
    cast,
    compute_dtype,
    fake_source_grads,
    flatten,
    require_channels,
    unflatten,
)


class ConvNorm(NamedTuple):
    """output: the Activation of the layer; mean, var: [C], of the convolution's output with its
    bias (var biased), for running statistics; None unless the statistics are of the batch."""

    output: Activation
    mean: Tensor | None
    var: Tensor | None


def conv_norm_act(
    x: Activation | Concat,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "none",
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    slope: float = 1.0,
    recompute: bool = False,
) -> ConvNorm:
    """3x3 convolution (stride 1, zero padding 1), then a pending normalisation and activation.

    Args:
        x: one Activation, or two side by side in the channels.
        weight: [Cout, Cin, 3, 3]; bias: [Cout].
        norm: ``none``; ``frozen`` (running_mean, running_var: [Cout]); ``batch``; ``group``
            (``groups`` groups of channels per sample; Cout groups are InstanceNorm).
        gamma, beta: [Cout], of the normalisation.
        slope: of the activation for negative values: 0 ReLU, 1 none.
        recompute: whether backward makes the output again, within ``fastunet.recompute``'s
            ``recomputing``.

    Raises:
        TypeError: where dtypes or devices differ outside autocast.
        ValueError: where shapes, norm or groups do not fit.
    """
    first, second = x if isinstance(x, Concat) else (x, None)
    vectors = {
        "bias": bias,
        "gamma": gamma,
        "beta": beta,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    dtype = compute_dtype(first.y, weight, "conv_norm_act", vectors)
    if second is not None:
        compute_dtype(second.y, weight, "conv_norm_act", {})
    check_shapes(first, second, weight)
    check_norm(weight.size(0), norm, groups, vectors)
    first, second = cast(first, dtype), second and cast(second, dtype)
    refuse_transforms(*first[:4], *(second or ())[:4], weight, bias, gamma, beta)
    arguments = (*flatten(first), *flatten(second), first.size, weight, bias, norm, gamma, beta)
    arguments += (running_mean, running_var, groups, eps)
    backend = backends.requested()
    if norm in ("none", "frozen") and folds(backend, first.y):
        z = torch.ops.fastunet.conv_norm_act_folded(*arguments, slope, backend)
        return ConvNorm(Activation.of(z, first.memory_format), None, None)
    y, center, scale, shift, var = torch.ops.fastunet.conv_norm_act(*arguments, backend)
    if recompute:
        forget(y, torch.ops.fastunet.conv_norm_act, (*arguments, backend))
    size = (y.size(2), y.size(3))
    output = Activation(y, center, scale, shift, slope, 0, size, first.memory_format)
    if norm != "batch":
        return ConvNorm(output, None, None)
    mean = center[0] if bias is None else center[0] + bias.detach()
    return ConvNorm(output, mean, var[0])


def folds(backend: str, x: Tensor) -> bool:
    """Whether to do, in inference, the normalisation and the activation as y is written."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return hasattr(backends.select(backend, "conv_norm_act", x), "conv_norm_act_folded")


def check_shapes(first: Activation, second: Activation | None, weight: Tensor) -> None:
    channels = first.y.size(1) + (second.y.size(1) if second else 0)
    if tuple(weight.shape[1:]) != (channels, 3, 3):
        raise ValueError(
            f"conv_norm_act: weight must be [Cout, {channels}, 3, 3], got {list(weight.shape)}"
        )
    require_channels(weight, "conv_norm_act")
    if second is None:
        return
    one, other = ([a.y.size(0), *a.size] for a in (first, second))
    if one != other:
        raise ValueError(
            "conv_norm_act: both sources must have the same samples, height and width, "
            f"got {one} and {other}"
        )


def check_norm(channels: int, norm: str, groups: int, vectors: dict[str, Tensor | None]) -> None:
    if norm not in NORMS:
        raise ValueError(f"conv_norm_act: norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "frozen" and (vectors["running_mean"] is None or vectors["running_var"] is None):
        raise ValueError("conv_norm_act: a frozen norm must have running_mean and running_var")
    if norm == "group" and (groups < 1 or channels % groups):
        raise ValueError(
            "conv_norm_act: groups must divide the channels, "
            f"got {groups} groups of {channels} channels"
        )
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != (channels,):
            raise ValueError(
                f"conv_norm_act: {name} must be [{channels}], got {list(vector.shape)}"
            )


NORMS = ("none", "frozen", "batch", "group")
SIZES = "SymInt[2] size"
PARAMETERS = "Tensor weight, Tensor? bias"
NORM = (
    "str norm, Tensor? gamma, Tensor? beta, Tensor? running_mean, Tensor? running_var, "
    "int groups, float eps"
)
SCHEMA = (
    f"({FIRST}, {SECOND}, {SIZES}, {PARAMETERS}, {NORM}, str backend)"
    " -> (Tensor y, Tensor center, Tensor scale, Tensor shift, Tensor var)"
)
FOLDED_SCHEMA = (
    f"({FIRST}, {SECOND}, {SIZES}, {PARAMETERS}, {NORM}, float slope, str backend) -> Tensor z"
)
BWD_SCHEMA = (
    f"(Tensor? dy, Tensor? dscale, Tensor? dshift, {FIRST}, {SECOND}, {SIZES}, {PARAMETERS}, "
    "str norm, int groups, float eps, Tensor? y, Tensor center, Tensor scale, Tensor var, "
    "bool[3] needs, str backend)"
    " -> (Tensor dweight, Tensor dbias, Tensor dgamma, Tensor dbeta, Tensor dy0, Tensor dscale0, "
    "Tensor dshift0, Tensor dy1, Tensor dscale1, Tensor dshift1)"
)
# Where the arguments after the sources and the size begin.
REST = 2 * COUNT + 1


def sources_of(args: tuple) -> list[Activation]:
    first, second, size = args[:COUNT], args[COUNT : 2 * COUNT], args[2 * COUNT]
    return [unflatten(s, size) for s in (first, second) if s[0] is not None]


def implementation(*args: Any) -> tuple[Tensor, ...]:
    weight, bias, *norm, backend = args[REST:]
    sources = sources_of(args)
    kernels = backends.select_convolution(backend, "conv_norm_act", sources, weight)
    return composed.conv_norm_act(kernels, sources, weight, bias, Norm(*norm))


def fake(*args: Any) -> tuple[Tensor, ...]:
    weight, _, norm, *_ = args[REST:]
    x = args[0]
    shape = (x.size(0), weight.size(0), *args[2 * COUNT])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    rows = x.size(0) if norm == "group" else 1
    vectors = [
        y.new_empty((rows, weight.size(0)), dtype=accumulate_dtype(x.dtype)) for _ in range(4)
    ]
    return y, *vectors


def implementation_folded(*args: Any) -> Tensor:
    weight, bias, *norm, slope, backend = args[REST:]
    sources = sources_of(args)
    kernels = backends.select_convolution(backend, "conv_norm_act", sources, weight)
    return composed.conv_norm_act_folded(kernels, sources, weight, bias, Norm(*norm), slope)


def fake_folded(*args: Any) -> Tensor:
    return fake(*args)[0]


def implementation_bwd(*args: Any) -> tuple[Tensor, ...]:
    grads, args = SourceGrads(*args[:3]), args[3:]
    weight, bias, kind, groups, eps, y, center, scale, var, needs, backend = args[REST:]
    sources = sources_of(args)
    dweight, dbias, dgamma, dbeta, of_sources = composed.conv_norm_act_bwd(
        backends.select_convolution(backend, "conv_norm_act_bwd", sources, weight),
        grads,
        sources,
        needs[: 1 + len(sources)],
        weight,
        bias,
        Norm(kind, None, None, None, None, groups, eps),
        y,
        center,
        scale,
        var,
    )
    flat = [t for s in of_sources for t in s] + [None] * (3 * (2 - len(sources)))
    dweight = placeholder_for(dweight, weight)
    return dweight, dbias, dgamma, dbeta, *(placeholder_for(t, args[0]) for t in flat)


def fake_bwd(*args: Any) -> tuple[Tensor, ...]:
    args = args[3:]
    weight, *_, scale, _, needs, _ = args[REST:]
    dweight = torch.empty_like(weight) if needs[0] else weight.new_empty(0)
    vectors = [scale.new_empty(weight.size(0)) for _ in range(3)]
    flat: list[Tensor] = []
    for i in range(2):
        y, _, source_scale, *_ = args[i * COUNT : (i + 1) * COUNT]
        needed = y is not None and needs[1 + i]
        flat += fake_source_grads(args[0] if y is None else y, source_scale, needed)
    return dweight, *vectors, *flat


def save(ctx: Any, args: tuple, outputs: tuple) -> None:
    y, center, scale, shift, var = outputs
    weight, bias, norm, gamma, beta, _, _, groups, eps, backend = args[REST:]
    batch = norm in ("batch", "group")
    ctx.mark_non_differentiable(center, var)
    trained = [t for t in (gamma, beta, bias) if t is not None and t.requires_grad]
    if not batch and not trained:
        # Nothing trains through them: readers need not form the sums.
        ctx.mark_non_differentiable(scale, shift)
    first, second = args[:COUNT], args[COUNT : 2 * COUNT]
    ctx.save_for_backward(
        *first[:4], *second[:4], weight, bias, y if batch else None, center, scale, var
    )
    ctx.slopes_modes = first[4:], second[4:]
    ctx.size, ctx.norm, ctx.backend = args[2 * COUNT], (norm, groups, eps), backend
    ctx.dtypes = [None if t is None else t.dtype for t in (bias, gamma, beta)]


def backward(ctx: Any, *grads: Tensor | None) -> tuple:
    dy, _, dscale, dshift, _ = grads
    saved = ctx.saved_tensors
    first, second = ctx.slopes_modes
    needs = ctx.needs_input_grad[1:]
    need_sources = [any(needs[i : i + 4]) for i in (0, COUNT)]
    weight, bias, y, center, scale, var = saved[8:]
    dweight, dbias, dgamma, dbeta, *flat = torch.ops.fastunet.conv_norm_act_bwd(
        dy,
        dscale,
        dshift,
        *saved[:4],
        *first,
        *saved[4:8],
        *second,
        ctx.size,
        weight,
        bias,
        *ctx.norm,
        y,
        center,
        scale,
        var,
        [needs[REST], *need_sources],
        ctx.backend,
    )

    def wanted(t: Tensor, argument: int, dtype: torch.dtype | None = None) -> Tensor | None:
        if not needs[argument]:
            return None
        return t if dtype is None else t.to(dtype)

    of_sources: list[Any] = []
    for i, start in enumerate((0, COUNT)):
        of_y, of_scale, of_shift = flat[3 * i : 3 * i + 3]
        of_sources += [
            wanted(of_y, start),
            None,
            wanted(of_scale, start + 2),
            wanted(of_shift, start + 3),
            None,
            None,
        ]
    bias_dtype, gamma_dtype, beta_dtype = ctx.dtypes
    return (
        *of_sources,
        None,
        wanted(dweight, REST),
        wanted(dbias, REST + 1, bias_dtype),
        None,
        wanted(dgamma, REST + 3, gamma_dtype),
        wanted(dbeta, REST + 4, beta_dtype),
        *[None] * 5,
    )


define("conv_norm_act", SCHEMA, implementation, fake)
# Inference only: it has no derivative.
define("conv_norm_act_folded", FOLDED_SCHEMA, implementation_folded, fake_folded)
define("conv_norm_act_bwd", BWD_SCHEMA, implementation_bwd, fake_bwd)
differentiable("conv_norm_act", save, backward)


@register_flop_formula(torch.ops.fastunet.conv_norm_act)
def flops(*args: Any, out_shape: Any = None, **_: Any) -> int:
    return conv_flop_count(input_shape(args), args[REST], out_shape[0])


@register_flop_formula(torch.ops.fastunet.conv_norm_act_folded)
def flops_folded(*args: Any, out_shape: Any = None, **_: Any) -> int:
    return conv_flop_count(input_shape(args), args[REST], out_shape)


@register_flop_formula(torch.ops.fastunet.conv_norm_act_bwd)
def flops_bwd(*args: Any, out_shape: Any = None, **_: Any) -> int:
    args = args[3:]
    n, c, height, width = input_shape(args)
    need_weight, *need_sources = args[-2]
    one = conv_flop_count([n, c, height, width], args[REST], [n, args[REST][0], height, width])
    return one * (need_weight + any(need_sources))


def input_shape(args: tuple) -> list[int]:
    first, second = args[0], args[COUNT]
    return [first[0], first[1] + (second[1] if second else 0), *args[2 * COUNT]]
