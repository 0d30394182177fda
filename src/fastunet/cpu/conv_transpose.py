"""conv_transpose as matrix products: its 2x2 windows do not overlap.

With pixels as rows, [pixels, Cin] x [Cin, 4 Cout] gives each pixel's window, and the gradients are
products with the same matrices. That is faster than oneDNN's transposed convolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunet.activation import Activation

from .resample import channel_adjacent, empty_map, resample, resample_bwd


def conv_transpose(source: Activation, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = source_map(source)
    n, _, h, w = x.shape
    cout = weight.size(1)
    rows, matrix = as_rows(x), as_matrix(weight)
    windows = rows @ matrix if bias is None else torch.addmm(bias.repeat(4), rows, matrix)
    y = empty_map(x, cout, (2 * h, 2 * w))
    by_window(y).copy_(windows.view(n, h, w, 2, 2, cout))
    return y


def conv_transpose_bwd(
    source: Activation, weight: Tensor, dy: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    need_weight, need_source = needs
    x = source_map(source)
    cin, cout = weight.shape[:2]
    windows = by_window(channel_adjacent(dy)).reshape(-1, 4 * cout)
    dbias = windows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).view(4, cout).sum(0)
    dweight = None
    if need_weight:
        dweight = torch.mm(as_rows(x).T, windows).view(cin, 2, 2, cout).permute(0, 3, 1, 2)
    of_source: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if need_source:
        dx = torch.mm(windows, as_matrix(weight).T)
        n, _, h, w = x.shape
        of_source = resample_bwd(source, dx.view(n, h, w, cin).permute(0, 3, 1, 2))
    return dweight, dbias, *of_source


def source_map(source: Activation) -> Tensor:
    if source.pending:
        return resample(source)
    return source.y.contiguous(memory_format=torch.channels_last)


def as_rows(x: Tensor) -> Tensor:
    """[N, C, H, W], channels_last -> [N * H * W, C]"""
    return x.permute(0, 2, 3, 1).reshape(-1, x.size(1))


def as_matrix(weight: Tensor) -> Tensor:
    """[Cin, Cout, 2, 2] -> [Cin, 4 * Cout], a pixel's window in the order row, column, channel"""
    return weight.permute(0, 2, 3, 1).reshape(weight.size(0), -1)


def by_window(y: Tensor) -> Tensor:
    """[N, C, 2H, 2W] -> its view [N, H, W, 2, 2, C]"""
    n, c, h, w = y.shape
    return y.permute(0, 2, 3, 1).view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
