"""Registration of ``torch.ops.customdiff.*``: schema, implementation, fake, autograd and autocast in one
call.

``Library.define`` costs a few microseconds less a call than ``torch.library.custom_op`` and leaves strides
alone.
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
) -> None:
    """Define ``customdiff::<schema>``.

    ``cast``: positions of the arguments that a surrounding ``torch.autocast`` casts to its own dtype.
    Whatever they are, the implementation runs with autocast off, so that its dtypes are those of its
    arguments.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"customdiff::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"customdiff::{name}", backward or _once(name), setup_context=setup_context, lib=LIBRARY
    )
    op = getattr(torch.ops.customdiff, name).default
    for device in ("cpu", "cuda"):
        LIBRARY.impl(name, _autocast(op, device, frozenset(cast)), f"Autocast{device.upper()}")


def _once(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            f"customdiff::{name} is not differentiable (a gradient of a gradient is not offered)"
        )

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
