"""``customdiff::reconstruct`` and ``reconstruct_out``: schema, fake, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backends, _checks
from .._library import register


def _check(
    base: Tensor,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float] | None,
) -> None:
    _checks.floating("base", base)
    _checks.rank("base", base, "R,E")
    counts = len(u), len(v), len(starts), len(u) if scales is None else len(scales)
    if len(set(counts)) > 1:
        raise ValueError("u, v, starts and scales must be of one length, got {}, {}, {}, {}".format(*counts))
    rows, width = base.shape
    for i, (left, right, start) in enumerate(zip(u, v, starts, strict=True)):
        for factor, name, dims in ((left, "u", "rows,r"), (right, "v", "r,E")):
            if factor.dtype not in _checks.FLOATING or factor.dim() != 2 or factor.device != base.device:
                _checks.floating(f"{name}[{i}]", factor)
                _checks.rank(f"{name}[{i}]", factor, dims)
                _checks.same_device(f"{name}[{i}]", factor, "base", base)
        if right.shape != (left.shape[1], width):
            _checks.shape(f"v[{i}]", right, (left.shape[1], width), "(r,E) to go with u and base")
        if start < 0 or start + left.shape[0] > rows:
            raise ValueError(
                f"starts[{i}] must leave room for the rows of u[{i}] within the {rows} of base, got rows "
                f"{start} to {start + left.shape[0]}"
            )


def _into(
    out: Tensor,
    base: Tensor,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    starts: Sequence[int],
    scales: Sequence[float] | None,
) -> None:
    scales = [1.0] * len(u) if scales is None else scales
    _backends.for_weights("low_rank", base=base, out=out).low_rank_sum(out, base, u, v, starts, scales)


def _reconstruct(
    base: Tensor, u: list[Tensor], v: list[Tensor], starts: list[int], scales: list[float] | None = None
) -> Tensor:
    out = _reconstruct_fake(base, u, v, starts, scales)
    _into(out, base, u, v, starts, scales)
    return out


def _reconstruct_fake(
    base: Tensor, u: list[Tensor], v: list[Tensor], starts: list[int], scales: list[float] | None = None
) -> Tensor:
    _check(base, u, v, starts, scales)
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, u, v, ctx.starts, ctx.scales = inputs
    ctx.count = len(u)
    ctx.save_for_backward(*u, *v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    u, v = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    sums = _checks.sum_dtype(grad.dtype)
    grad_u, grad_v = [], []
    _, need_u, need_v, *_ = ctx.needs_input_grad
    for i, (left, right, start) in enumerate(zip(u, v, ctx.starts, strict=True)):
        rows = grad[start : start + left.shape[0]].to(sums)
        if ctx.scales is not None and (need_u[i] or need_v[i]):
            rows = rows * ctx.scales[i]
        grad_u.append((rows @ right.to(sums).T).to(left.dtype) if need_u[i] else None)
        grad_v.append((left.to(sums).T @ rows).to(right.dtype) if need_v[i] else None)
    # torch takes any empty list for one of tensors, and may leave out an argument that has its default
    rest: list[Any] = [[] if x == [] else None for x in (ctx.starts, ctx.scales)]
    return (grad, grad_u, grad_v, *rest)[: len(ctx.needs_input_grad)]


register(
    "reconstruct(Tensor base, Tensor[] u, Tensor[] v, int[] starts, float[]? scales=None) -> Tensor",
    _reconstruct,
    _reconstruct_fake,
    setup_context=_setup,
    backward=_backward,
)


def _reconstruct_(
    out: Tensor,
    base: Tensor,
    u: list[Tensor],
    v: list[Tensor],
    starts: list[int],
    scales: list[float] | None = None,
) -> None:
    _check_out(out, base, u, v, starts, scales)
    _checks.in_place(out, base)
    _into(out, base, u, v, starts, scales)


def _check_out(
    out: Tensor,
    base: Tensor,
    u: list[Tensor],
    v: list[Tensor],
    starts: list[int],
    scales: list[float] | None = None,
) -> None:
    _check(base, u, v, starts, scales)
    _checks.like("out", out, "base", base)


register(
    "reconstruct_out(Tensor(a!) out, Tensor base, Tensor[] u, Tensor[] v, int[] starts, "
    "float[]? scales=None) -> ()",
    _reconstruct_,
    _check_out,
)
