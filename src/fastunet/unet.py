"""FastUNet: the reference's modules, with fused operators in their forward.

The modules hold ordinary Conv2d, BatchNorm2d, ... as parameters; a block reads them and passes
Activations on. Wherever somebody could see the difference (hooks, replaced or parametrized layers,
a block called on its own with a tensor), the reference's forward runs instead.
"""

import contextlib
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import (  # type: ignore[attr-defined]
    _verify_batch_size,
    _verify_spatial_size,
)

from fastunet import backends, recording, reference
from fastunet.activation import (
    BILINEAR,
    BILINEAR_ALIGN_CORNERS,
    NEAREST,
    Activation,
    Concat,
    suggested_format,
)
from fastunet.ops import conv_norm_act, conv_transpose, head, materialize, sync_norm
from fastunet.recompute import is_forgotten, recomputing

if TYPE_CHECKING:
    from fastunet.memory import MemoryPlan

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm
Module = TypeVar("Module", bound=nn.Module)


class DoubleConv(reference.DoubleConv):
    def forward(self, x):
        if isinstance(x, Tensor):
            return super().forward(x)
        layers = conv_layers(self.double_conv)
        if layers is None:
            return Activation.of(super().forward(materialize(x)))
        for conv, norm, slope in layers:
            x = conv_layer(x, conv, norm, slope)
        return x


class Down(reference.Down):
    DoubleConv = DoubleConv

    def forward(self, x):
        if isinstance(x, Tensor):
            return super().forward(x)
        if not is_plain(self.maxpool_conv, nn.Sequential) or len(self.maxpool_conv) != 2:
            return Activation.of(super().forward(materialize(x)))
        pool, block = self.maxpool_conv
        if not is_pool2(pool):
            return Activation.of(super().forward(materialize(x)))
        return call(block, x.pool())


class Up(reference.Up):
    DoubleConv = DoubleConv

    def forward(self, x, skip):
        if isinstance(x, Tensor) or isinstance(skip, Tensor):
            return super().forward(materialize(x), materialize(skip))
        x = call_upsample(self.up, x).place(skip.size)
        pair = Concat(skip, x) if self.concat_order == "skip_first" else Concat(x, skip)
        return call(self.conv, pair)


class OutConv(reference.OutConv):
    def forward(self, x):
        if isinstance(x, Tensor):
            return super().forward(x)
        conv = self.conv
        if not is_plain(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or not is_simple(conv, 0):
            return super().forward(materialize(x))
        memory_format = x.memory_format
        if suggested_format(conv.weight) == torch.channels_last:
            memory_format = torch.channels_last
        return head(x, conv.weight, conv.bias, memory_format)


class FastUNet(reference.UNet):
    """A drop-in for the widely used PyTorch U-Net, and for ``fastunet.reference.UNet``: faster and
    in less memory, with the same parameters, ``state_dict``, outputs and gradients.
    """

    if reference.UNet.__doc__:  # python -OO has none
        __doc__ += reference.UNet.__doc__.split("\n", 1)[1]

    DoubleConv = DoubleConv
    Down = Down
    Up = Up
    OutConv = OutConv
    policies = ("none", "light", "full", "auto")
    memory_plan: "MemoryPlan | None" = None  # in force: given, or made by ``auto``

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if torch.compiler.is_compiling():
            return self.layers(x)
        return recording.run(self, x)

    def layers(self, x: Tensor) -> Tensor:
        """The logits, layer by layer."""
        memory_format = suggested_format(x)
        if any(
            suggested_format(p) == torch.channels_last
            for p in self.inc.parameters()
            if p.dim() == 4
        ):
            memory_format = torch.channels_last
        with self.forgetting(x):
            return materialize(self.levels(Activation.of(x, memory_format)))

    def is_plain(self) -> bool:
        """Whether nobody can see from within that the layers are called."""
        own = all(getattr(type(self), name) is getattr(FastUNet, name) for name in OWN)
        return own and all(is_plain(m, *PLAIN) for m in self.modules() if m is not self)

    def call(self, block, *inputs):
        return call(block, *inputs)

    def run(self, block, *inputs):
        if torch.compiler.is_compiling() and self.checkpointing == "full":
            return super().run(block, *inputs)
        return self.call(block, *inputs)

    def forgetting(self, x: Tensor) -> contextlib.AbstractContextManager:
        off = self.checkpointing == "none" or not torch.is_grad_enabled()
        if off or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        if self.checkpointing == "auto":
            if isinstance(x, FakeTensor):  # which takes no memory
                return contextlib.nullcontext()
            from fastunet.memory import fit

            self.memory_plan = fit(self, x)
        return recomputing(self.forgotten())

    def forgotten(self) -> set[nn.Module]:
        """The convolutions whose outputs backward makes again."""
        if self.memory_plan is None:
            return self.forgotten_by(self.checkpointing)
        names = self.memory_plan.recomputed
        return {module for name, module in self.named_modules() if name in names}

    def forgotten_by(self, policy: str) -> set[nn.Module]:
        """The same under one of the policies.

        ``light``: of the encoder's blocks all but the last, of the decoder's all but the first, the
        one with the most products. ``full``: all but the last of a block, from which its level can
        be made again; and of the two blocks at the bottom, whose maps are small, and of the
        uppermost one, which backward reaches first, all.
        """
        encoder = [of_kind(block, nn.Conv2d) for block in (self.inc, *self.downs)]
        decoder = [of_kind(block, nn.Conv2d) for block in self.ups]
        if policy == "none":
            return set()
        if policy == "light":
            return {*chain(*(c[:-1] for c in encoder), *(c[1:] for c in decoder))}
        kept = chain(*(c[-1:] for c in (*encoder[:-1], *decoder[1:-1])))
        upsamplings = (of_kind(block, nn.ConvTranspose2d) for block in self.ups)
        return {*chain(*encoder, *decoder, *upsamplings)} - {*kept}

    def use_checkpointing(self, policy: "str | MemoryPlan | None" = "full") -> None:
        """Make some maps again in backward instead of keeping them; None turns it off.

        ``light`` makes one of two convolutions' outputs again, ``full`` nearly all; ``auto``, at
        each forward pass, the cheapest choice that the memory then left allows (a third of a second
        for the first batch of a size); a plan, as ``fastunet.memory.plan`` makes it, what it says.
        Gradients and running statistics are those of ``none``, bit for bit. May be called between
        steps, for instance after an out-of-memory error; the state_dict does not change. Under
        torch.compile ``full`` recomputes by blocks, and the others leave the choice to the
        compiler.

        Raises:
            ValueError: for another policy, and for a plan with layers that this model has not.
        """
        self.memory_plan = None
        self.__dict__.pop("_steps", None)
        if policy is None or isinstance(policy, str):
            return super().use_checkpointing(policy)
        if other := sorted({*policy.layers} - {name for name, _ in self.named_modules()}):
            raise ValueError(f"the plan must be for this model, which has no layer {other[0]!r}")
        self.checkpointing, self.memory_plan = "plan", policy


def of_kind(module: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [m for m in module.modules() if type(m) in kinds]


def call(block: nn.Module, *inputs):
    """Calls one of our blocks with Activations; a hooked or foreign one with tensors."""
    if type(block) in FAST_BLOCKS and not is_hooked(block):
        return block(*inputs)
    return Activation.of(block(*map(materialize, inputs)))


FAST_BLOCKS = (DoubleConv, Down, Up, OutConv)
PLAIN = (
    *FAST_BLOCKS,
    nn.Sequential,
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.InstanceNorm2d,
    nn.GroupNorm,
    nn.ReLU,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.Upsample,
)
# Of FastUNet's methods, those that a forward pass goes through.
OWN = ("layers", "levels", "run", "call", "forgetting", "forgotten", "forgotten_by")


def is_hooked(module: nn.Module) -> bool:
    """Whether anything observes or alters calls of this module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or nn.modules.module._has_any_global_hook()
    )


def is_plain(module: nn.Module, *kinds: type[Module]) -> TypeGuard[Module]:
    """Exactly one of these types (a parametrized module has its own type), without hooks."""
    return type(module) in kinds and not is_hooked(module)


def is_simple(conv: nn.Conv2d, padding: int) -> bool:
    return (
        conv.stride == (1, 1)
        and conv.padding == (padding, padding)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def is_pool2(pool: nn.Module) -> bool:
    return (
        is_plain(pool, nn.MaxPool2d)
        and pool.kernel_size in (2, (2, 2))
        and pool.stride in (2, (2, 2))
        and pool.padding in (0, (0, 0))
        and pool.dilation in (1, (1, 1))
        and not pool.ceil_mode
        and not pool.return_indices
    )


def conv_layers(layers: nn.Module) -> list[tuple[nn.Conv2d, nn.Module | None, float]] | None:
    """(convolution, normalisation, activation's negative slope) of each layer of a Sequential;
    None unless it is a row of 3x3 convolutions, each with an optional norm and activation."""
    if not is_plain(layers, nn.Sequential):
        return None
    found: list[tuple[nn.Conv2d, nn.Module | None, float]] = []
    for module in layers:
        if is_plain(module, nn.Conv2d):
            if module.kernel_size != (3, 3) or not is_simple(module, 1):
                return None
            found.append((module, None, 1.0))
            continue
        if not found:
            return None
        conv, norm, slope = found[-1]
        if is_plain(module, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.SyncBatchNorm):
            if isinstance(module, nn.SyncBatchNorm) and torch.compiler.is_compiling():
                return None
            tracked = getattr(module, "track_running_stats", False)
            if norm is not None or slope != 1 or (tracked and type(module) is nn.InstanceNorm2d):
                return None
            found[-1] = (conv, module, slope)
        elif is_plain(module, nn.ReLU, nn.LeakyReLU):
            if slope != 1:
                return None
            found[-1] = (conv, norm, getattr(module, "negative_slope", 0.0))
        else:
            return None
    return found or None


def conv_layer(
    x: Activation | Concat, conv: nn.Conv2d, norm: nn.Module | None, slope: float
) -> Activation:
    if isinstance(norm, nn.SyncBatchNorm) and (group := group_of(norm)):
        return sync_norm_layer(x, conv, norm, slope, group)
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
        return batch_norm_layer(x, conv, norm, slope)
    if norm is None:
        return conv_norm_act(
            x, conv.weight, conv.bias, slope=slope, recompute=is_forgotten(conv)
        ).output
    assert isinstance(norm, nn.InstanceNorm2d | nn.GroupNorm)
    n, c, h, w = size = output_size(x, conv)
    if isinstance(norm, nn.InstanceNorm2d):
        groups = norm.num_features
        _verify_spatial_size(size)
    else:
        groups = norm.num_groups
        _verify_batch_size([n * c // groups, groups, h, w])
    output = conv_norm_act(
        x,
        conv.weight,
        conv.bias,
        norm="group",
        gamma=norm.weight,
        beta=norm.bias,
        groups=groups,
        eps=norm.eps,
        slope=slope,
        recompute=is_forgotten(conv),
    ).output
    if isinstance(norm, nn.InstanceNorm2d):  # PyTorch's returns contiguous maps
        return output._replace(memory_format=torch.contiguous_format)
    return output


def batch_norm_layer(
    x: Activation | Concat, conv: nn.Conv2d, norm: BatchNorm, slope: float
) -> Activation:
    batch = norm.training or norm.running_mean is None
    if batch:
        _verify_batch_size(output_size(x, conv))
    y, mean, var = conv_norm_act(
        x,
        conv.weight,
        conv.bias,
        norm="batch" if batch else "frozen",
        gamma=norm.weight,
        beta=norm.bias,
        running_mean=None if batch else norm.running_mean,
        running_var=None if batch else norm.running_var,
        eps=norm.eps,
        slope=slope,
        recompute=is_forgotten(conv),
    )
    if norm.training and norm.track_running_stats:
        assert mean is not None
        assert var is not None
        update_running_statistics(norm, mean, var, y.y.numel() // y.y.size(1))
    return y


def group_of(norm: nn.SyncBatchNorm) -> Any:
    """The process group over which its statistics are taken now; None for this batch alone."""
    if not norm.training or not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group if group.size() > 1 else None


def sync_norm_layer(
    x: Activation | Concat, conv: nn.Conv2d, norm: nn.SyncBatchNorm, slope: float, group: Any
) -> Activation:
    plain = conv_norm_act(x, conv.weight, recompute=is_forgotten(conv)).output
    y, mean, var, count = sync_norm(
        plain, conv.bias, norm.weight, norm.bias, norm.eps, slope, group
    )
    if norm.track_running_stats:
        update_running_statistics(norm, mean, var, count)
    return y


@torch.no_grad()
def update_running_statistics(
    norm: BatchNorm, mean: Tensor, var: Tensor, count: int | Tensor
) -> None:
    """What BatchNorm does in training, but not when a checkpoint recomputes the layer."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    if type(mean) is Tensor and not torch.compiler.is_compiling():
        kernels = backends.select(backends.requested(), "resample", mean)
        move = getattr(kernels, "running_statistics", None)
        if move is not None and move(norm, mean, var, count):
            return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    empty = isinstance(count, int) and count == 0
    if norm.running_mean is None or norm.running_var is None or empty:
        return
    momentum = norm.momentum
    if momentum is None:
        assert norm.num_batches_tracked is not None
        momentum = 1.0 / float(norm.num_batches_tracked)
    unbiased = var * (count / (count - 1))
    for running, of_batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        # A call that changes nothing costs as much as one that does.
        running.lerp_(
            of_batch if of_batch.dtype == running.dtype else of_batch.to(running.dtype), momentum
        )


def output_size(x: Activation | Concat, conv: nn.Conv2d) -> torch.Size:
    first = x.first if isinstance(x, Concat) else x
    return torch.Size((first.y.size(0), conv.out_channels, *first.size))


def call_upsample(up: nn.Module, x: Activation) -> Activation:
    """The x2 upsampling: pending where it is a plain Upsample, or run as an operator."""
    if is_plain(up, nn.Upsample) and up.size is None and up.scale_factor in (2, (2, 2)):
        if up.mode == "bilinear":
            return x.upsample(BILINEAR_ALIGN_CORNERS if up.align_corners else BILINEAR)
        if up.mode == "nearest":
            return x.upsample(NEAREST)
    if (
        is_plain(up, nn.ConvTranspose2d)
        and up.kernel_size == (2, 2)
        and up.stride == (2, 2)
        and up.padding == (0, 0)
        and up.output_padding == (0, 0)
        and up.dilation == (1, 1)
        and up.groups == 1
    ):
        return conv_transpose(x, up.weight, up.bias, recompute=is_forgotten(up))
    return Activation.of(up(materialize(x)))
