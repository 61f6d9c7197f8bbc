"""Registration of ``torch.ops.customdiff.*``: schema, implementation, fake, autograd, autocast in one call.

``Library.define`` costs less a call than ``torch.library.custom_op`` and leaves strides alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

LIBRARY = torch.library.Library("customdiff", "FRAGMENT")


def register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    cast: Sequence[int] = (),
) -> Callable[..., Any]:
    """Define ``customdiff::<schema>`` and return what calls it.

    ``setup_context``, ``backward``: as in ``torch.library.register_autograd``. ``cast``: positions of the
    arguments that a surrounding ``torch.autocast`` casts to its own dtype. Whatever they are, the
    implementation and ``backward`` run with autocast off, so that their dtypes are those of their arguments.
    An operator that writes to an argument, ``Tensor(a!)``, has no autograd: its callers refuse tensors that
    require a gradient.
    """
    name = schema.split("(", 1)[0]
    differentiable = backward is not None
    backward = _without_autocast(backward or _refuse(name))
    LIBRARY.define(schema)
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"customdiff::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.customdiff, name).default
    writes = "(a!)" in schema
    if (
        "Tensor[]" in schema.split("->")[0] and not writes
    ):  # lists of tensors need torch's wrapper of autograd.Function
        torch.library.register_autograd(
            f"customdiff::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
    elif not writes:
        LIBRARY.impl(name, _autograd(op, setup_context, backward), "Autograd")
    for device in ("cpu", "cuda"):
        LIBRARY.impl(name, _autocast(op, device, frozenset(cast)), f"Autocast{device.upper()}")
    return op if differentiable else _past_autograd(op)


def _past_autograd(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """``op`` as a backward pass calls it, where nothing records gradients: one way through Python less."""

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled():
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _autograd(
    op: torch._ops.OpOverload, setup_context: Callable[..., None] | None, backward_: Callable[..., Any]
) -> Callable[..., Any]:
    """What ``torch.library.register_autograd`` does, in a fifth of its time a call (it walks the schema)."""
    below_autograd = torch._C._AutoDispatchBelowAutograd

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with below_autograd():
                output = op(*args)
            if setup_context is not None:
                setup_context(ctx, args, output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward_(ctx, *grads)

    Node.__name__ = Node.__qualname__ = "".join(part.title() for part in op._opname.split("_"))

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled():
            for a in args:
                if isinstance(a, torch.Tensor) and a.requires_grad:
                    return Node.apply(*args)
        with below_autograd():
            return op(*args)

    return kernel


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    def plain(ctx: Any, *grads: torch.Tensor) -> Any:
        device = grads[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return plain


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(f"customdiff::{name} is not differentiable (no gradient of a gradient is offered)")

    return backward


def _autocast(op: Callable[..., Any], device: str, cast: frozenset[int]) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(*(_to(a, dtype, device) if i in cast else a for i, a in enumerate(args)))

    return kernel


def _to(value: Any, dtype: torch.dtype, device: str) -> Any:
    """As torch's own autocast: float64 and tensors of another device stay what they are."""
    wants = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.to(dtype) if wants and value.device.type == device else value
