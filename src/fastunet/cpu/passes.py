"""resample and normalisation by the compiled kernels (csrc/resample, csrc/conv_norm_act)."""

from fastunet.compiled import Passes
from fastunet.extension import kernels

PASSES = Passes(lambda _: kernels())

resample, resample_bwd = PASSES.resample, PASSES.resample_bwd
normalization, normalization_bwd = PASSES.normalization, PASSES.normalization_bwd
