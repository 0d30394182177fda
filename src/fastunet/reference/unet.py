"""The U-Net in plain PyTorch: what FastUNet is a drop-in for, and what it is verified against.

Module tree and ``state_dict`` keys are those of the most widely used PyTorch U-Net: ``inc``,
``down1..n``, ``up1..n``, ``outc``. FastUNet inherits these classes and replaces their ``forward``.
"""

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORMS = ("batch", "instance", "group", "none")
ACTIVATIONS = ("relu", "leaky_relu", "none")
CONCAT_ORDERS = ("skip_first", "up_first")


def make_norm(norm: str, channels: int) -> list[nn.Module]:
    """The normalisation after a convolution, as a list of zero or one module.

    ``instance`` is affine, as nnU-Net and MONAI use it; ``group`` has gcd(32, channels) groups.
    """
    if norm == "batch":
        return [nn.BatchNorm2d(channels)]
    if norm == "instance":
        return [nn.InstanceNorm2d(channels, affine=True)]
    if norm == "group":
        return [nn.GroupNorm(math.gcd(32, channels), channels)]
    return []


def is_per_channel(module: nn.Module) -> bool:
    """Whether it is a norm over each channel of a sample, which needs more than one pixel."""
    return isinstance(module, nn.InstanceNorm2d) or (
        isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels
    )


def make_activation(activation: str, negative_slope: float) -> list[nn.Module]:
    if activation == "relu":
        return [nn.ReLU(inplace=True)]
    if activation == "leaky_relu":
        return [nn.LeakyReLU(negative_slope, inplace=True)]
    return []


class DoubleConv(nn.Module):
    """(3x3 convolution, normalisation, activation) twice: [N, in, H, W] -> [N, out, H, W]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mid_channels: int | None = None,
        *,
        norm: str = "batch",
        activation: str = "relu",
        negative_slope: float = 0.01,
        conv_bias: bool = False,
    ):
        super().__init__()
        mid_channels = mid_channels or out_channels
        layers: list[nn.Module] = []
        for cin, cout in ((in_channels, mid_channels), (mid_channels, out_channels)):
            layers.append(nn.Conv2d(cin, cout, kernel_size=3, padding=1, bias=conv_bias))
            layers += make_norm(norm, cout)
            layers += make_activation(activation, negative_slope)
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """2x2 max-pool, then DoubleConv: [N, in, H, W] -> [N, out, H // 2, W // 2]."""

    DoubleConv = DoubleConv

    def __init__(self, in_channels: int, out_channels: int, **block):
        super().__init__()
        self.maxpool_conv = nn.Sequential(
            nn.MaxPool2d(2), self.DoubleConv(in_channels, out_channels, **block)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    """Upsample x2, pad (or crop) to the skip's size, concatenate, DoubleConv.

    ``bilinear`` upsampling (align_corners=True) keeps the channels; the transposed convolution
    halves them. ``in_channels`` counts the channels after the concatenation.
    """

    DoubleConv = DoubleConv

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bilinear: bool = True,
        mid_channels: int | None = None,
        *,
        concat_order: str = "skip_first",
        **block,
    ):
        super().__init__()
        self.concat_order = concat_order
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            mid_channels = mid_channels or in_channels // 2
        else:
            self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = self.DoubleConv(in_channels, out_channels, mid_channels, **block)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x: [N, C, h, w] from below, skip: [N, K, H, W] from the encoder."""
        x = self.up(x)
        dy = skip.size(2) - x.size(2)
        dx = skip.size(3) - x.size(3)
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])  # negative pads crop
        pair = [skip, x] if self.concat_order == "skip_first" else [x, skip]
        return self.conv(torch.cat(pair, dim=1))


class OutConv(nn.Module):
    """1x1 convolution to the logits: [N, in, H, W] -> [N, classes, H, W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UNet(nn.Module):
    """U-Net: [N, n_channels, H, W] -> logits [N, n_classes, H, W], H and W at least 2**depth.

    Args:
        n_channels: channels of the image.
        n_classes: channels of the logits.
        bilinear: upsample bilinearly (and halve the deepest widths) instead of by a 2x2
            transposed convolution.
        base_channels: width of the first level; each level below doubles it.
        depth: number of poolings.
        norm: ``batch``, ``instance`` (affine), ``group`` (gcd(32, channels) groups) or ``none``.
        activation: ``relu``, ``leaky_relu`` or ``none``.
        negative_slope: of ``leaky_relu``.
        conv_bias: whether the 3x3 convolutions have a bias.
        concat_order: ``skip_first`` or ``up_first``.
        checkpointing: ``none``, or ``full`` to recompute each block in backward (in FastUNet also
            ``light`` and ``auto``, and maps instead of blocks: see ``use_checkpointing``).

    Raises:
        ValueError: for an option that is not one of the above, and for an input that does not fit.
    """

    DoubleConv = DoubleConv
    Down = Down
    Up = Up
    OutConv = OutConv
    policies: tuple[str, ...] = ("none", "full")  # of checkpointing

    def __init__(
        self,
        n_channels: int,
        n_classes: int,
        bilinear: bool = False,
        *,
        base_channels: int = 64,
        depth: int = 4,
        norm: str = "batch",
        activation: str = "relu",
        negative_slope: float = 0.01,
        conv_bias: bool = False,
        concat_order: str = "skip_first",
        checkpointing: str = "none",
    ):
        super().__init__()
        for name, value, known in (
            ("norm", norm, NORMS),
            ("activation", activation, ACTIVATIONS),
            ("concat_order", concat_order, CONCAT_ORDERS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name, number in (
            ("n_channels", n_channels),
            ("n_classes", n_classes),
            ("base_channels", base_channels),
            ("depth", depth),
        ):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} must be a positive integer, got {number!r}")
        self.n_channels = n_channels
        self.n_classes = n_classes
        self.bilinear = bilinear
        self.depth = depth
        self.use_checkpointing(checkpointing)

        block: dict[str, Any] = {
            "norm": norm,
            "activation": activation,
            "negative_slope": negative_slope,
            "conv_bias": conv_bias,
        }
        factor = 2 if bilinear else 1
        widths = [base_channels * 2**level for level in range(depth + 1)]
        self.inc = self.DoubleConv(n_channels, widths[0], **block)
        for level in range(1, depth + 1):
            cout = widths[level] // (factor if level == depth else 1)
            self.add_module(f"down{level}", self.Down(widths[level - 1], cout, **block))
        for step in range(1, depth + 1):
            cin = widths[depth - step + 1]
            cout = widths[depth - step] // (factor if step < depth else 1)
            up = self.Up(cin, cout, bilinear, concat_order=concat_order, **block)
            self.add_module(f"up{step}", up)
        self.outc = self.OutConv(widths[0], n_classes)

    @property
    def downs(self) -> list[nn.Module]:
        return [getattr(self, f"down{level}") for level in range(1, self.depth + 1)]

    @property
    def ups(self) -> list[nn.Module]:
        return [getattr(self, f"up{step}") for step in range(1, self.depth + 1)]

    def check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() != 4:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"the input must be a [N, C, H, W] tensor, got {shape}")
        if x.size(1) != self.n_channels:
            raise ValueError(
                f"the input must have n_channels = {self.n_channels} channels, got {x.size(1)}"
            )
        least = 2**self.depth
        if x.size(2) < least or x.size(3) < least:
            raise ValueError(
                f"height and width must be at least 2**depth = {least}, got {x.size(2)}x{x.size(3)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self.levels(x)

    def levels(self, x):
        """Down one side of the U and up the other."""
        skips = [self.run(self.inc, x)]
        for down in self.downs:
            skips.append(self.run(down, skips[-1]))
        x = skips.pop()
        for up in self.ups:
            x = self.run(up, x, skips.pop())
        return self.call(self.outc, x)

    def call(self, block: nn.Module, *inputs):
        return block(*inputs)

    def run(self, block: nn.Module, *inputs):
        """Calls a block, under checkpointing where that is on."""
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.call(block, *inputs)
        if torch.compiler.is_compiling():  # there a recomputation repeats no update
            return checkpoint(self.call, block, *inputs, use_reentrant=False)
        return checkpoint(
            self.call,
            block,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), frozen_running_statistics(block)),
        )

    def use_checkpointing(self, policy: Any = "full") -> None:
        """Recompute each block in backward instead of keeping its maps; None turns it off.

        May be called between steps, for instance after an out-of-memory error. The state_dict
        does not change, and running statistics are still updated once a step.
        """
        policy = policy or "none"
        if policy not in self.policies:
            raise ValueError(
                f"checkpointing must be one of {', '.join(self.policies)}, got {policy!r}"
            )
        self.checkpointing = policy


class frozen_running_statistics:
    """Buffers of ``block`` are copies inside, so that a recomputation does not update them again.

    A class, since backward through a retained graph enters it anew.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __enter__(self) -> None:
        self.saved = [
            (m, name, buffer)
            for m in self.block.modules()
            for name, buffer in m._buffers.items()
            if buffer is not None
        ]
        for m, name, buffer in self.saved:
            m._buffers[name] = buffer.clone()

    def __exit__(self, *error) -> None:
        for m, name, buffer in self.saved:
            m._buffers[name] = buffer
