"""Statistics of a map that is there, and the normalisation's backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .language import (
    Source,
    as_source,
    block_of,
    launch,
    pixel_of,
    read_raw,
    row_of,
    tile_of,
    write,
)
from .statistics import (
    channel_block,
    channels_of_groups,
    empty_parts,
    finish,
    tile_statistics,
    to_channels,
)


@triton.jit(do_not_specialize=["H", "W"])
def parts_kernel(y, parts, H, W, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr):
    """The parts of a map that is there."""
    c, tile = block_of(y.channels, BC)
    n, h, w, dh, dw, inside = tile_of(tile, H, W, TH, TW)
    values = read_raw(y, pixel_of(n, h, w, H, W), dh * W + dw, inside, c)
    tile_statistics(values.to(tl.float32), inside, tile, c, y.channels, parts)


@triton.jit(do_not_specialize=["count", "rows", "eps"])
def terms_kernel(
    dscale,
    dshift,
    scale,
    var,
    slope,
    offset,
    dgamma,
    dbeta,
    count,  # values that share a statistic
    rows,
    eps,
    C,
    width,
    STATISTICS: tl.constexpr,
    BG: tl.constexpr,
    BW: tl.constexpr,
):
    """dgamma and dbeta, and dy_total = dy + slope * (y - center) + offset."""
    c = channels_of_groups(C, width, BG, BW)
    known = c < C
    of_gamma = tl.zeros((BG * BW,), tl.float32)
    of_beta = tl.zeros((BG * BW,), tl.float32)
    for row in range(rows):
        at = row * C + c
        s = tl.load(scale + at, mask=known, other=0.0)
        reciprocal = 1.0 / (tl.load(var + at, mask=known, other=1.0) + eps)
        ds = tl.zeros((BG * BW,), tl.float32)
        db = tl.zeros((BG * BW,), tl.float32)
        if dscale is not None:
            ds = tl.load(dscale + at, mask=known, other=0.0)
        if dshift is not None:
            db = tl.load(dshift + at, mask=known, other=0.0)
        of_gamma += ds * tl.sqrt_rn(reciprocal)
        of_beta += db
        if STATISTICS:
            a, b = s * ds, s * db
            if width > 1:
                a, b = tl.sum(a.reshape(BG, BW), 1), tl.sum(b.reshape(BG, BW), 1)
                a, b = to_channels(a, BW), to_channels(b, BW)
            tl.store(slope + at, -a * reciprocal / count, mask=known)
            tl.store(offset + at, -b / count, mask=known)
    tl.store(dgamma + c, of_gamma, mask=known)
    tl.store(dbeta + c, of_beta, mask=known)


@triton.jit(do_not_specialize=["H", "W"])
def apply_kernel(y, dy, out, H, W, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr):
    """out = dy + slope * (y - center) + offset; y carries slope and offset as scale and shift."""
    c, tile = block_of(y.channels, BC)
    n, h, w, dh, dw, inside = tile_of(tile, H, W, TH, TW)
    base, offset = pixel_of(n, h, w, H, W), dh * W + dw
    center, slope, add = row_of(y, n, c)
    total = slope * (read_raw(y, base, offset, inside, c).to(tl.float32) - center) + add
    if dy.y is not None:
        total += read_raw(dy, base, offset, inside, c).to(tl.float32)
    write(out, base, offset, inside, c, total)


class Tiles:
    """Of a map, for kernels that touch each value once."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        self.BC = min(64, triton.next_power_of_2(channels))
        pixels = 4096 // self.BC
        self.TW = min(pixels, 32)
        self.TH = pixels // self.TW
        self.tiles = triton.cdiv(size[0], self.TH) * triton.cdiv(size[1], self.TW)
        self.blocks = triton.cdiv(channels, self.BC)

    def options(self) -> dict[str, int]:
        return {"TH": self.TH, "TW": self.TW, "BC": self.BC}


def normalization(
    y: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, h, w = y.shape
    tiles = Tiles((h, w), c)
    parts = empty_parts(y, n * tiles.tiles, c)
    if y.numel():
        grid = (n * tiles.tiles * tiles.blocks,)
        launch(parts_kernel, grid)(as_source(y), parts, h, w, **tiles.options())
    return finish(parts, n if groups else 1, groups, bias, gamma, beta, eps)


def normalization_bwd(
    dy: Tensor | None,
    dscale: Tensor | None,
    dshift: Tensor | None,
    y: Tensor | None,
    center: Tensor,
    scale: Tensor,
    var: Tensor,
    groups: int,
    eps: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dgamma and dbeta, [C]. Writes the gradient of y to out, a dense map, unless that is None,
    as where the normalisation has no statistics."""
    rows, c = center.shape
    dgamma, dbeta = (center.new_empty(c) for _ in range(2))
    width = c // groups if groups else 1
    BG, BW = channel_block(c, width)
    slope, offset = (torch.empty_like(center) for _ in range(2))
    count = 0
    if y is not None:
        n, _, h, w = y.shape
        count = h * w * (width if groups else n)
    launch(terms_kernel, (triton.cdiv(c // width, BG),))(
        dscale,
        dshift,
        scale,
        var,
        slope,
        offset,
        dgamma,
        dbeta,
        float(max(1, count)),
        rows,
        eps,
        c,
        width,
        STATISTICS=out is not None,
        BG=BG,
        BW=BW,
    )
    if out is None or out.numel() == 0:
        return dgamma, dbeta
    assert y is not None
    tiles = Tiles((h, w), c)
    source = as_source(y)._replace(
        center=center, scale=slope, shift=offset, row=0 if rows == 1 else c
    )
    grad = Source(None) if dy is None else as_source(dy)
    grid = (n * tiles.tiles * tiles.blocks,)
    launch(apply_kernel, grid)(source, grad, as_source(out), h, w, **tiles.options())
    return dgamma, dbeta
