"""Every operator forward and backward, once each on small odd shapes: what the sanitizers watch."""

from collections.abc import Iterator

import torch
from torch import Tensor

import fastunet
from fastunet import backends, self_check
from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    MAX_POOL,
    NEAREST,
    NONE,
    Activation,
    Concat,
)
from fastunet.ops import conv_norm_act, conv_transpose, head, materialize

BATCH, DTYPES = 2, (torch.bfloat16, torch.float16)
# Channels of the source and of the result, height, width: of partial tiles and odd channels, and
# such that tensor descriptors read plain maps, two tiles wide.
SHAPES = ((5, 11, 13, 19), (40, 48, 3, 134))
MODES = (NONE, MAX_POOL, BILINEAR, BILINEAR_ALIGN_CORNERS, NEAREST)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def source(c: int, h: int, w: int, dtype: torch.dtype, *, plain: bool = False) -> Activation:
    y = leaf(BATCH, c, h, w, dtype=dtype).detach()
    x = Activation.of(y.contiguous(memory_format=torch.channels_last).requires_grad_())
    rows = [leaf(1, c) for _ in range(3)]
    return x if plain else x._replace(center=rows[0], scale=rows[1], shift=rows[2], slope=0.0)


def results(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(what it is, its result with gradients) of each work, one after the other."""
    for cin, cout, h, w in SHAPES:

        def read(mode: int, c: int = cin, h: int = h, w: int = w) -> Activation:
            if mode == NONE:
                return source(c, h, w, dtype)
            if mode == MAX_POOL:
                return source(c, 2 * h + 1, 2 * w + 1, dtype).pool()
            return source(c, h // 2, w // 2, dtype).upsample(mode).place((h, w))

        def conv(x: Activation | Concat, cin: int, norm: str, cout: int = cout) -> Tensor:
            weight, gamma, beta = leaf(cout, cin, 3, 3), leaf(cout), leaf(cout)
            frozen = norm == "frozen"
            made = conv_norm_act(
                *(x, weight),
                norm=norm,
                gamma=gamma,
                beta=beta,
                running_mean=torch.randn(cout) if frozen else None,
                running_var=torch.rand(cout) + 0.5 if frozen else None,
                slope=0.0,
            )
            return materialize(made.output)

        at = f"{cin} -> {cout} channels, {h}x{w}, {dtype}"
        for mode in MODES:
            yield f"resample {mode}, {at}", materialize(read(mode))
            pair = Concat(read(NONE), read(mode))
            yield f"conv_norm_act of {NONE} and {mode}, {at}", conv(pair, 2 * cin, "batch")
        for plain in (True, False):
            x = source(cin, h, w, dtype, plain=plain)
            for norm in ("none", "frozen", "batch", "group"):
                yield f"conv_norm_act {norm}, plain {plain}, {at}", conv(x, cin, norm)
            with torch.no_grad():
                inferred = conv(x, cin, "frozen")
            yield f"conv_norm_act in inference, plain {plain}, {at}", inferred
            up = conv_transpose(x, leaf(cin, cout, 2, 2), leaf(cout))
            yield f"conv_transpose, plain {plain}, {at}", up.y
        yield f"head, {at}", head(read(NONE), leaf(3, cin, 1, 1), leaf(3))


def run(device: str, backend: str) -> dict[str, int]:
    """How many works ran, by dtype; 0 where the backend cannot serve it.

    Raises:
        RuntimeError: where a result is not finite.
    """
    counts: dict[str, int] = {}
    with torch.device(device), fastunet.backend(backend):
        for dtype in DTYPES:
            key = str(dtype).removeprefix("torch.")
            counts[key] = 0
            if backends.module(backend).why_not(torch.empty(1, dtype=dtype)):
                continue
            for way in self_check.ways(backends.module(backend), "conv_norm_act"):
                with way, torch.autocast(device, dtype):
                    for name, result in results(dtype):
                        if result.requires_grad:
                            result.float().square().mean().backward()
                        if not result.isfinite().all():
                            raise RuntimeError(f"{name}: the result must be finite")
                        counts[key] += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return counts
