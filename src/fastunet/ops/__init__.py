"""The fused operators, ``torch.ops.fastunet.*``: schema, fake, autograd and public function."""

from .conv_norm_act import conv_norm_act
from .conv_transpose import conv_transpose
from .head import head
from .resample import materialize
from .sync_norm import sync_norm

__all__ = ["conv_norm_act", "conv_transpose", "head", "materialize", "sync_norm"]
