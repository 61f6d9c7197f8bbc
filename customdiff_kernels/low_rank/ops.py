"""``customdiff::reconstruct`` and ``reconstruct_out``: schema, fake, autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks
from .._library import register

# One batched product on the CPU covers at most so many bytes of the weight: `beta = 1` first copies the base
# to the output and then adds to it, and a larger piece has left the cache in between.
BLOCK_BYTES = 4 << 20


def _check(base: Tensor, u: Sequence[Tensor], v: Sequence[Tensor], starts: Sequence[int]) -> None:
    _checks.floating("base", base)
    _checks.rank("base", base, "R,E")
    if not len(u) == len(v) == len(starts):
        raise ValueError(f"u, v and starts must be of one length, got {len(u)}, {len(v)} and {len(starts)}")
    end = 0
    for i, (left, right, start) in enumerate(zip(u, v, starts, strict=True)):
        for name, factor, dims in ((f"u[{i}]", left, "rows,r"), (f"v[{i}]", right, "r,E")):
            _checks.floating(name, factor)
            _checks.rank(name, factor, dims)
            _checks.same_device(name, factor, "base", base)
        _checks.shape(f"v[{i}]", right, (left.shape[1], base.shape[1]), "(r,E) to go with u and base")
        if start < end or start + left.shape[0] > base.shape[0]:
            raise ValueError(
                f"starts must ascend without overlap within the {base.shape[0]} rows of base: u[{i}] has "
                f"rows {start} to {start + left.shape[0]} after row {end}"
            )
        end = start + left.shape[0]


def _batches(u: Sequence[Tensor], starts: Sequence[int], most: int) -> Iterator[range]:
    """Runs of factors whose rows follow one another and are equally many, of at most ``most`` rows (or one
    factor).
    """
    first = 0
    for i in range(1, len(u) + 1):
        joined = (
            i < len(u)
            and u[i].shape[0] == u[first].shape[0]
            and starts[i] == starts[i - 1] + u[i - 1].shape[0]
        )
        if not joined or (i + 1 - first) * u[first].shape[0] > most:
            yield range(first, i)
            first = i


def _stack(factors: Sequence[Tensor], rank: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(G,...) with every factor's rank (at ``dim``) padded with zeros."""
    return torch.stack(
        [pad(f, (0, 0) * (1 - dim) + (0, rank - f.shape[dim])) if f.shape[dim] < rank else f for f in factors]
    ).to(dtype)


def _into(out: Tensor, base: Tensor, u: Sequence[Tensor], v: Sequence[Tensor], starts: Sequence[int]) -> None:
    _check(base, u, v, starts)
    sums = _checks.sum_dtype(base.dtype)
    width = base.shape[1]
    most = (
        max(1, BLOCK_BYTES // max(1, width * sums.itemsize)) if base.device.type == "cpu" else base.shape[0]
    )
    done = 0
    for batch in _batches(u, starts, most):
        count, rows, rank = len(batch), u[batch[0]].shape[0], max(u[i].shape[1] for i in batch)
        start, stop = starts[batch[0]], starts[batch[0]] + len(batch) * rows
        if rank == 0 or stop == start:
            continue
        if done < start:
            out[done:start].copy_(base[done:start])
        done = stop
        left = _stack([u[i] for i in batch], rank, 1, sums)  # (G,rows,r)
        right = _stack([v[i] for i in batch], rank, 0, sums)  # (G,r,E)
        old, new = (x[start:stop].unflatten(0, (count, rows)) for x in (base, out))
        if base.dtype is sums:
            torch.baddbmm(old, left, right, out=new)
        else:
            new.copy_(torch.baddbmm(old.to(sums), left, right))
    out[done:].copy_(base[done:])


def _reconstruct(base: Tensor, u: list[Tensor], v: list[Tensor], starts: list[int]) -> Tensor:
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    _into(out, base, u, v, starts)
    return out


def _reconstruct_fake(base: Tensor, u: list[Tensor], v: list[Tensor], starts: list[int]) -> Tensor:
    _check(base, u, v, starts)
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, u, v, starts = inputs
    ctx.starts, ctx.count = starts, len(u)
    ctx.save_for_backward(*u, *v)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    u, v = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    sums = _checks.sum_dtype(grad.dtype)
    grad_u, grad_v = [], []
    _, need_u, need_v, _ = ctx.needs_input_grad
    for i, (left, right, start) in enumerate(zip(u, v, ctx.starts, strict=True)):
        rows = grad[start : start + left.shape[0]].to(sums)
        grad_u.append((rows @ right.to(sums).T).to(left.dtype) if need_u[i] else None)
        grad_v.append((left.to(sums).T @ rows).to(right.dtype) if need_v[i] else None)
    return grad, grad_u, grad_v, None if ctx.starts else []  # torch takes any empty list for one of tensors


register(
    "reconstruct(Tensor base, Tensor[] u, Tensor[] v, int[] starts) -> Tensor",
    _reconstruct,
    _reconstruct_fake,
    setup_context=_setup,
    backward=_backward,
)


def _reconstruct_(out: Tensor, base: Tensor, u: list[Tensor], v: list[Tensor], starts: list[int]) -> None:
    _check_out(out, base, u, v, starts)
    _into(out, base, u, v, starts)


def _check_out(out: Tensor, base: Tensor, u: list[Tensor], v: list[Tensor], starts: list[int]) -> None:
    _check(base, u, v, starts)
    _checks.shape("out", out, tuple(base.shape), "of base")
    _checks.floating("out", out, base.dtype)
    _checks.same_device("out", out, "base", base)


register(
    "reconstruct_out(Tensor(a!) out, Tensor base, Tensor[] u, Tensor[] v, int[] starts) -> ()",
    _reconstruct_,
    _check_out,
)
