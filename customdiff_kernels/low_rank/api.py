"""The public functions: ``reconstruct`` and ``compress``. They check, name and group; the arithmetic is in
ops.py.
"""

from __future__ import annotations

import math
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

# A singular value from the Gram matrix is right to eps * (largest / it)^2: below this share of the largest it
# is not trusted, and the matrix goes through LAPACK's SVD.
GRAM_LIMIT = 1e-5


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
    weights = _scales(scales, len(deltas))
    sums = _checks.sum_dtype(stack.weight.dtype)
    weight, rows = stack.weight, {name: start for name, start, _ in stack.segments}
    terms: list[tuple[Tensor, Tensor, int, float]] = []
    for index, (delta, scale) in enumerate(zip(deltas, weights, strict=True)):
        if isinstance(delta, LowRankDelta):
            for name, (u, v) in delta.factors.items():
                _check_fits(f"deltas[{index}]", name, (u.shape[0], v.shape[1]), u.device, stack)
                if not u.shape[1]:
                    continue
                if isinstance(scale, Tensor):  # by way of u it is differentiable
                    terms.append((u.to(sums) * scale, v, rows[name], 1.0))
                else:
                    terms.append((u, v, rows[name], 1.0 if scale is None else scale))
        else:
            weight = _add_dense(f"deltas[{index}]", weight.to(sums), stack, delta, scale)
    us, vs, starts, numbers = (list(column) for column in zip(*terms, strict=True)) if terms else ([],) * 4
    if out is not None:
        return cast(Base, _write(out, stack, weight, us, vs, starts, numbers))
    weight = torch.ops.customdiff.reconstruct(weight, us, vs, starts, numbers).to(stack.weight.dtype)
    result = KVStack(weight, stack.segments)
    return cast(Base, result if isinstance(base, KVStack) else dict(result))


def compress(
    delta: Mapping[str, Tensor] | LowRankDelta,
    *,
    energy: float | None = None,
    rank: int | None = None,
    max_bytes: int | None = None,
    dtype: torch.dtype | None = None,
) -> LowRankDelta:
    """The best low-rank factors of every segment's change, by exactly one of three rules.

    delta: {name: (rows,E)}, a ``KVStack`` difference, or a ``LowRankDelta`` to compress further.
    energy: in (0,1]; the smallest rank whose singular values sum to at least that share of all of the
        segment's (Custom Diffusion's "top 60%"). Never 0 for a segment that changes.
    rank: at least 1; that many singular values a segment (fewer where the change has no more).
    max_bytes: of all factors together; spent on the singular values that reduce the total squared error most
        a byte.
    dtype: of the factors; the delta's own by default. ``max_bytes`` counts in it.

    Singular values are computed in float64 and those kept are right to 1e-5 of each. u holds them, v has
    orthonormal rows. Not differentiable (ranks are decisions): factors carry no gradient.
    Raises ValueError naming the segment where a change is not finite, and where the budget does not hold one
    value.
    """
    if isinstance(delta, LowRankDelta):
        delta = delta.dense()
    stack = as_stack("delta", delta)
    select = _rule(energy, rank, max_bytes)
    dtype = dtype or stack.weight.dtype
    if dtype not in _checks.FLOATING:
        raise TypeError(f"dtype must be floating, got {dtype}")
    matrices = {name: stack[name].detach() for name in stack}
    if not bool(torch.isfinite(stack.weight).all()):
        name = next(n for n, matrix in matrices.items() if not bool(torch.isfinite(matrix).all()))
        raise ValueError(f"delta[{name!r}] is not finite")
    spectra = _spectra(matrices)
    costs = [sum(matrix.shape) * dtype.itemsize for matrix in matrices.values()]
    exact: set[str] = set()
    while True:
        ranks = dict(zip(matrices, select([s for s, _ in spectra.values()], costs), strict=True))
        weak = [
            n
            for n, r in ranks.items()
            if r and n not in exact and spectra[n][0][r - 1] < GRAM_LIMIT * spectra[n][0][0]
        ]
        if not weak:
            break
        for name in weak:
            spectra[name] = _lapack(matrices[name])
        exact.update(weak)
    factors = {}
    for name, matrix in matrices.items():
        u, v = _factors(matrix, spectra[name][1][:, : ranks[name]])
        factors[name] = (u.to(dtype), v.to(dtype))
    return LowRankDelta(stack.segments, factors)


def _spectra(matrices: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (singular values descending, vectors of the shorter side)}, one batched eigenproblem a shape."""
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, matrix in matrices.items():
        shapes.setdefault(tuple(matrix.shape), []).append(name)
    found = {}
    for names in shapes.values():
        values, vectors = torch.ops.customdiff.spectrum(torch.stack([matrices[name] for name in names]))
        values = values.cpu()  # ranks are decided there: one transfer, not one for every question
        found.update({name: (values[i], vectors[i]) for i, name in enumerate(names)})
    return {name: _significant(*found[name], max(matrices[name].shape)) for name in matrices}


def _lapack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return _significant(s.cpu(), u if matrix.shape[0] < matrix.shape[1] else v.mT, max(matrix.shape))


def _significant(values: Tensor, vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What is below the rounding of the largest singular value is zero."""
    return torch.where(values > values[:1] * size * torch.finfo(torch.float64).eps, values, 0.0), vectors


def _factors(matrix: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """u (rows,r) with the singular values folded in, v (r,E) with orthonormal rows; float64. ``q``: r vectors
    of the shorter side.
    """
    a = matrix.double()
    if a.shape[0] >= a.shape[1]:
        return a @ q, q.mT
    v = q.mT @ a
    values = v.norm(dim=1)
    return q * values, v / values[:, None]


def _rule(energy: float | None, rank: int | None, max_bytes: int | None):
    """The rule as a function (all segments' singular values, bytes a rank) -> ranks."""
    if sum(rule is not None for rule in (energy, rank, max_bytes)) != 1:
        raise ValueError(
            f"give exactly one of energy, rank and max_bytes, got {energy=}, {rank=}, {max_bytes=}"
        )
    if energy is not None:
        _checks.number("energy", energy)
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {energy}")
        return lambda spectra, costs: [_energy_rank(values, energy) for values in spectra]
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
        return lambda spectra, costs: [min(rank, int((values > 0).sum())) for values in spectra]
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise ValueError(f"max_bytes must be a positive integer, got {max_bytes!r}")
    return lambda spectra, costs: _budget_ranks(spectra, costs, max_bytes)


def _energy_rank(values: Tensor, energy: float) -> int:
    """The smallest rank that reaches the share; the 1e-12 takes a sum's rounding for reached."""
    total = values.sum()
    return int((values.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1 if total > 0 else 0


def _budget_ranks(spectra: Sequence[Tensor], costs: Sequence[int], max_bytes: int) -> list[int]:
    """Greedy by squared singular value a byte; a value that no longer fits gives way to cheaper ones behind
    it.

    Within a segment the values descend at one price, so what is taken is always its first few.
    """
    kept = [values[values > 0] for values in spectra]
    owner = torch.cat([torch.full((len(values),), i) for i, values in enumerate(kept)])
    cost = torch.tensor(costs)[owner]
    order = (torch.cat(kept).square() / cost).argsort(descending=True, stable=True)
    if len(order) and cost.min() > max_bytes:
        raise ValueError(
            f"max_bytes must hold a singular value of the smallest segment ({cost.min()}), got {max_bytes}"
        )
    taken, left = [], max_bytes
    while len(order):
        spent = cost[order].cumsum(0)
        fits = int((spent <= left).sum())
        taken.append(order[:fits])
        left -= int(spent[fits - 1]) if fits else 0
        order = order[fits:]
        order = order[cost[order] <= left]
    ranks = (
        torch.bincount(owner[torch.cat(taken)], minlength=len(spectra))
        if taken
        else torch.zeros(len(spectra))
    )
    return [int(r) for r in ranks]


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


def _scales(scales: float | Sequence[float] | Tensor | None, count: int) -> list[float | Tensor | None]:
    if scales is None:
        return [None] * count
    single = isinstance(scales, (int, float)) or (isinstance(scales, Tensor) and scales.dim() == 0)
    found: list[float | Tensor | None] = [scales] if single else list(scales)  # type: ignore[arg-type, list-item]
    if len(found) != count:
        raise ValueError(f"scales must have one number for each of the {count} deltas, got {len(found)}")
    for index, scale in enumerate(found):
        if isinstance(scale, (int, float)) and not math.isfinite(scale):
            raise ValueError(f"scales[{index}] must be finite, got {scale}")
    return found


def _check_fits(
    argument: str, name: str, shape: tuple[int, ...], device: torch.device, stack: KVStack
) -> None:
    if name not in stack:
        raise ValueError(
            f"{argument} has the unknown segment {name!r}; the base has e.g. {next(iter(stack))!r}"
        )
    expected = tuple(stack[name].shape)
    if shape != expected:
        raise ValueError(f"{argument}[{name!r}] must be {expected} (rows,E) as in the base, got {shape}")
    if device != stack.weight.device:
        raise ValueError(f"{argument} is on {device} and the base on {stack.weight.device}: move one of them")


def _add_dense(
    argument: str, weight: Tensor, stack: KVStack, delta: Mapping[str, Tensor], scale: float | Tensor | None
) -> Tensor:
    """A dense change is added without the operator: there is nothing to multiply. In weight's dtype."""
    for name, change in delta.items():
        _checks.is_tensor(f"{argument}[{name!r}]", change)
        _check_fits(argument, name, tuple(change.shape), change.device, stack)
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
