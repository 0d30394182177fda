"""One way to register an operator: schema, implementation, fake, and autograd, side by side."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
library = torch.library.Library("fastunet", "DEF")
implementations: dict[str, Callable] = {}  # by the operator's name


def define(name: str, schema: str, implementation: Callable, fake: Callable) -> None:
    """Defines ``fastunet::name``. ``implementation`` chooses a backend, so serves all devices."""
    implementations[name] = implementation
    library.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    library.impl(name, without_autocast(implementation), "CompositeExplicitAutograd")

    def fake_for_compiler(*args: Any) -> Any:
        call_from_inductor(getattr(torch.ops.fastunet, name).default)
        return fake(*args)

    torch.library.register_fake(f"fastunet::{name}", fake_for_compiler, lib=library)


def call_from_inductor(op: Any) -> None:
    """Tells torch.compile's inductor to call the operator as it is, which it would find out itself.
    But before torch 2.13 (seen in 2.11) it composes a message for its log then, with all that the
    arguments were computed from: in a U-Net, exponentially long in the number of layers."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is None or TORCH >= (2, 13) or op in lowering.lowerings:
        return
    tag = torch._library.utils.get_layout_constraint_tag(op, with_default=True)
    lowering.make_fallback(op, lowering.tag_to_layout_constraint(tag), warn=False)


def implementations_by_operator() -> dict[Any, Callable]:
    """What runs where an operator is called, for who wants to see the calls below."""
    return {
        getattr(torch.ops.fastunet, name).default: without_autocast(implementation)
        for name, implementation in implementations.items()
    }


def without_autocast(implementation: Callable) -> Callable:
    """Operators follow autocast in their public functions; inside, dtypes are what they are. And
    Triton launches on the current device, whatever that of the tensors is."""

    def run(*args: Any) -> Any:
        tensor = next(a for a in args if isinstance(a, Tensor))
        device = tensor.device.type
        if device != "cuda" and not torch.is_autocast_enabled(device):
            return implementation(*args)
        with torch.autocast(device, enabled=False), torch.cuda.device_of(tensor):
            return implementation(*args)

    return run


def differentiable(name: str, save: Callable, backward: Callable) -> None:
    """Registers autograd for ``fastunet::name``, once differentiable.

    An autograd.Function over the operator below autograd: the same as
    torch.library.register_autograd at half its cost per call, which matters with wide schemas.

    Args:
        save: (ctx, args, outputs) -> None
        backward: (ctx, *grads) -> one gradient (or None) per operator argument
    """
    op = getattr(torch.ops.fastunet, name).default

    def below_autograd(keyset: Any, args: tuple) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
            outputs = below_autograd(keyset, args)
            ctx.set_materialize_grads(False)
            save(ctx, args, outputs)
            return outputs

        @staticmethod
        @differentiable_once
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return None, *backward(ctx, *grads)

    Function.__name__ = Function.__qualname__ = name

    def kernel(keyset: Any, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return Function.apply(keyset, *args)
        return below_autograd(keyset, args)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def differentiable_once(backward: Callable) -> Callable:
    """The gradients raise when they are differentiated in turn.

    torch.autograd.function.once_differentiable returns constants, silently, where the incoming
    gradients are constant, as those of a sum or a mean are.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return outputs
        message = b"FastUNet cannot be differentiated twice; fastunet.reference.UNet can"
        refuse = torch._C._functions.DelayedError(message, len(outputs))
        return refuse(*(t if t is None else t.detach().requires_grad_() for t in outputs))  # type: ignore[arg-type]

    return run


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Forward-mode AD and functorch transforms would silently lose gradients: raise instead."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "FastUNet's operators support torch.autograd only, not torch.func transforms; "
            'run the model under fastunet.backend("reference") is no way around it: '
            "use fastunet.reference.UNet there"
        )
    if torch.autograd.forward_ad._current_level >= 0:
        for t in tensors:
            if t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None:
                raise NotImplementedError(
                    "FastUNet's operators have no forward-mode derivative; "
                    "use fastunet.reference.UNet for it"
                )


def placeholder_for(t: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors only: an empty one stands for None."""
    return like.new_empty(0) if t is None else t
