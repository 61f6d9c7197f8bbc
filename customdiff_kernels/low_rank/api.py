"""The public function ``reconstruct``. It checks, names and groups; the arithmetic is in ops.py."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from .. import _checks
from ..stack import KVStack, as_stack
from . import ops  # noqa: F401  registers torch.ops.customdiff.*
from .delta import LowRankDelta

Base = TypeVar("Base", bound=Mapping[str, Tensor])
Delta = LowRankDelta | Mapping[str, Tensor]


def reconstruct(
    base: Base,
    deltas: LowRankDelta | Mapping[str, Tensor] | Iterable[LowRankDelta | Mapping[str, Tensor]],
    scales: float | Sequence[float] | Tensor | None = None,
    *,
    out: KVStack | None = None,
) -> Base:
    """W = W0 + sum over n of scale_n U_n V_n, every segment of every delta in one call.

    base: ``KVStack`` (the fast path) or {name: (rows,E)}, which is stacked first; the result is of the same
        type.
    deltas: one or many; ``LowRankDelta`` or dense changes {name: (rows,E)}, of all of the base's segments or
        some.
    scales: one number a delta, a single number for one delta, or a tensor (n,); 1 by default.
    out: a ``KVStack`` to write to (``base`` itself for in place); then nothing is allocated and nothing
        differentiable.

    The sum is kept in float32 (float64 for float64) and rounded once to the base's dtype. Differentiable in
    base, in the factors and in ``scales``. Raises ValueError for a segment that the base does not have, or of
    another shape.
    """
    stack = as_stack("base", base)
    deltas = as_deltas(deltas)
    weights = as_scales(scales, len(deltas))
    sums = _checks.sum_dtype(stack.weight.dtype)
    weight, rows = stack.weight, {name: (start, stop) for name, start, stop in stack.segments}
    terms: list[tuple[Tensor, Tensor, int, float]] = []
    for index, (delta, scale) in enumerate(zip(deltas, weights, strict=True)):
        if isinstance(delta, LowRankDelta):
            for name, (u, v) in delta.factors.items():
                _check_fits(f"deltas[{index}]", name, (u.shape[0], v.shape[1]), u.device, stack, rows)
                if not u.shape[1]:
                    continue
                if isinstance(scale, Tensor):  # by way of u it is differentiable
                    terms.append((u.to(sums) * scale, v, rows[name][0], 1.0))
                else:
                    terms.append((u, v, rows[name][0], 1.0 if scale is None else scale))
        else:
            weight = _add_dense(f"deltas[{index}]", weight.to(sums), stack, delta, scale, rows)
    us, vs, starts, alphas = (list(column) for column in zip(*terms, strict=True)) if terms else ([],) * 4
    if out is not None:
        return cast(Base, _write(out, stack, weight, us, vs, starts, alphas))
    weight = torch.ops.customdiff.reconstruct(weight, us, vs, starts, alphas).to(stack.weight.dtype)
    result = KVStack(weight, stack.segments)
    return cast(Base, result if isinstance(base, KVStack) else dict(result))


def as_deltas(deltas: Delta | Iterable[Delta]) -> list[Delta]:
    """One or many as a list; TypeError where something else is among them."""
    if isinstance(deltas, Tensor) or not isinstance(deltas, (LowRankDelta, Iterable)):
        raise TypeError(f"deltas must be one or many LowRankDelta or mappings, got {type(deltas).__name__}")
    found = [deltas] if isinstance(deltas, (LowRankDelta, Mapping)) else list(deltas)
    for index, delta in enumerate(found):
        if not isinstance(delta, (LowRankDelta, Mapping)):
            raise TypeError(
                f"deltas[{index}] must be a LowRankDelta or {{name: change}}, got {type(delta).__name__}"
            )
    return found


def as_scales(scales: float | Sequence[float] | Tensor | None, count: int) -> list[float | Tensor | None]:
    """One for each of ``count`` deltas; None is 1."""
    if scales is None:
        return [None] * count
    single = isinstance(scales, numbers.Real) or (isinstance(scales, Tensor) and scales.dim() == 0)
    if not single and (isinstance(scales, str) or not isinstance(scales, Iterable)):
        raise TypeError(f"scales must be one number for each delta, got {type(scales).__name__}")
    found: list[float | Tensor | None] = [scales] if single else list(scales)  # type: ignore[arg-type, list-item]
    if len(found) != count:
        raise ValueError(f"scales must have one number for each of the {count} deltas, got {len(found)}")
    for index, scale in enumerate(found):
        if isinstance(scale, Tensor):
            if scale.numel() != 1:
                raise ValueError(f"scales[{index}] must be one number, got shape {tuple(scale.shape)}")
            continue
        _checks.number(f"scales[{index}]", scale)
        if isinstance(scale, numbers.Real) and not math.isfinite(scale):
            raise ValueError(f"scales[{index}] must be finite, got {scale}")
    return found


def _check_fits(
    argument: str,
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    stack: KVStack,
    rows: Mapping[str, tuple[int, int]],
) -> None:
    """``rows``: where the segments of the stack begin and end."""
    if name not in rows:
        raise ValueError(
            f"{argument} has the unknown segment {name!r}; the base has e.g. {next(iter(stack))!r}"
        )
    start, stop = rows[name]
    expected = (stop - start, stack.weight.shape[1])
    if shape != expected:
        raise ValueError(f"{argument}[{name!r}] must be {expected} (rows,E) as in the base, got {shape}")
    if device != stack.weight.device:
        raise ValueError(f"{argument} is on {device} and the base on {stack.weight.device}: move one of them")


def _add_dense(
    argument: str,
    weight: Tensor,
    stack: KVStack,
    delta: Mapping[str, Tensor],
    scale: float | Tensor | None,
    rows: Mapping[str, tuple[int, int]],
) -> Tensor:
    """A dense change is added without the operator: there is nothing to multiply. In weight's dtype."""
    for name, change in delta.items():
        _checks.is_tensor(f"{argument}[{name!r}]", change)
        _check_fits(argument, name, tuple(change.shape), change.device, stack, rows)
    changes = [delta[name] if name in delta else torch.zeros_like(stack[name]) for name in stack]
    change = torch.cat(changes).to(weight.dtype)
    return weight + (change if scale is None else change * scale)


def _write(
    out: KVStack,
    stack: KVStack,
    weight: Tensor,
    u: list[Tensor],
    v: list[Tensor],
    starts: list[int],
    scales: list[float],
) -> KVStack:
    if not isinstance(out, KVStack) or out.segments != stack.segments:
        raise ValueError("out must be a KVStack with the segments of base")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out.weight, weight, *u, *v)):
        raise ValueError("out= is not differentiable: leave it out, or call within torch.no_grad()")
    if weight.dtype is stack.weight.dtype:
        torch.ops.customdiff.reconstruct_out(out.weight, weight, u, v, starts, scales)
    else:  # dense changes were added in the dtype of sums: round once, at the end
        _checks.like("out", out.weight, "base", stack.weight)
        out.weight.copy_(torch.ops.customdiff.reconstruct(weight, u, v, starts, scales))
    return out
