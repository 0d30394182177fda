"""resample and normalisation by the compiled kernels (csrc/resample, csrc/conv_norm_act)."""

from typing import Any

import torch
from torch import Tensor

from fastunet.compiled import Passes
from fastunet.extension import kernels
from fastunet.maps import note_changes

PASSES = Passes(lambda _: kernels())

resample, resample_bwd = PASSES.resample, PASSES.resample_bwd
normalization, normalization_bwd = PASSES.normalization, PASSES.normalization_bwd


def running_statistics(norm: Any, mean: Tensor, var: Tensor, count: int | Tensor) -> bool:
    """BatchNorm's step towards a batch's statistics (of ``count`` values each), in one call; False
    where that is not possible, and nothing was done."""
    kept = norm.running_mean, norm.running_var
    if norm.momentum is None or not isinstance(count, int) or count < 2:
        return False
    if any(t is None or t.dtype != torch.float32 for t in (*kept, mean, var)):
        return False
    kernels().running_statistics(
        *kept, norm.num_batches_tracked, mean, var, count / (count - 1), norm.momentum
    )
    note_changes([t for t in (*kept, norm.num_batches_tracked) if t is not None])
    return True
