"""The public function ``compress``: ranks from singular values, factors in the dtype asked for, a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Literal, overload

import torch
from torch import Tensor

from .. import _checks
from ..stack import as_stack
from .delta import Factors, LowRankDelta
from .ranks import budget_ranks, energy_is_certain, energy_rank
from .spectrum import Spectrum, dense_spectra, low_rank_spectra


@dataclass(frozen=True)
class CompressedSegment:
    """What compression kept of one segment: rank of full_rank = min(rows,E), bytes of its factors, energy
    (the kept share of the sum of singular values), error ‖ΔW - U V‖_F / ‖ΔW‖_F of the factors as stored.
    """

    name: str
    rows: int
    rank: int
    full_rank: int
    bytes: int
    energy: float
    error: float


@dataclass(frozen=True)
class CompressionReport:
    """What compression kept.

    segments: a ``CompressedSegment`` each, in the delta's order: name, rows, rank, full_rank, bytes, energy,
        error.
    bytes: of all factors together.
    energy: the kept share of all singular values' sum.
    error: ‖ΔW - U V‖_F / ‖ΔW‖_F of all segments together, of the factors as stored.
    """

    segments: tuple[CompressedSegment, ...]
    bytes: int
    energy: float
    error: float


@overload
def compress(
    delta: Mapping[str, Tensor] | LowRankDelta,
    *,
    energy: float | None = None,
    rank: int | None = None,
    max_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    report: Literal[False] = False,
    progress: Callable[[int], object] | None = None,
) -> LowRankDelta: ...


@overload
def compress(
    delta: Mapping[str, Tensor] | LowRankDelta,
    *,
    energy: float | None = None,
    rank: int | None = None,
    max_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    report: Literal[True],
    progress: Callable[[int], object] | None = None,
) -> tuple[LowRankDelta, CompressionReport]: ...


@torch.no_grad()
def compress(
    delta: Mapping[str, Tensor] | LowRankDelta,
    *,
    energy: float | None = None,
    rank: int | None = None,
    max_bytes: int | None = None,
    dtype: torch.dtype | None = None,
    report: bool = False,
    progress: Callable[[int], object] | None = None,
) -> LowRankDelta | tuple[LowRankDelta, CompressionReport]:
    """The best low-rank factors of every segment's change, by exactly one of three rules.

    delta: {name: (rows,E)}, a ``KVStack`` difference, or a ``LowRankDelta`` to compress further (its dense
        change is never formed).
    energy: in (0,1]; the smallest rank whose singular values sum to at least that share of all of the
        segment's (Custom Diffusion's "top 60%"). Never 0 for a segment that changes.
    rank: at least 1; that many singular values a segment (fewer where the change has no more).
    max_bytes: of all factors together; spread over the segments so that the total Frobenius error is least.
    dtype: of the factors; the delta's own by default. ``max_bytes`` counts in it.
    report: also return a ``CompressionReport``: rank, bytes, energy and error of each segment and of all.
    progress: called with the number of segments just decomposed; the counts sum to the number of segments.

    The singular values that are kept are right to 1e-5 of each, and the rank is the one that exact values
    would give. u holds them, v has orthonormal rows; in float16 a power of two a rank moves from one to the
    other so that both keep their digits. Not differentiable (ranks are decisions): factors carry no gradient.
    Raises ValueError naming the segment where a change is not finite or is beyond ``dtype``, and where the
    budget does not hold one value.
    """
    rule = _rule(energy, rank, max_bytes)
    if isinstance(delta, LowRankDelta):
        segments, width, device, own = delta.segments, delta.width, delta.device, delta.dtype
        batches, errors = low_rank_spectra(delta), partial(_low_rank_error, delta.factors)
    else:
        stack = as_stack("delta", delta)
        segments, (_, width) = stack.segments, stack.weight.shape
        device, own = stack.weight.device, stack.weight.dtype
        matrices = {name: stack[name].detach() for name in stack}
        batches, errors = dense_spectra(matrices), partial(_dense_error, matrices)
    dtype = dtype or own
    if dtype not in _checks.FLOATING:
        raise TypeError(f"dtype must be floating, got {dtype}")
    with torch.autocast(device.type, enabled=False):
        spectra: dict[str, Spectrum] = {}
        for batch in batches:
            spectra |= batch
            if progress is not None:
                progress(len(batch))
        costs = {name: (stop - start + width) * dtype.itemsize for name, start, stop in segments}
        ranks = _accurate_ranks(rule, spectra, costs)
        factors = {name: _stored(name, *spectra[name].factors(r), dtype) for name, r in ranks.items()}
        found = LowRankDelta(segments, factors)
        return (found, _report(found, spectra, errors)) if report else found


@dataclass(frozen=True)
class _Rule:
    """ranks: (all segments' singular values, bytes a rank) -> ranks; is_certain: (one segment's spectrum) ->
    whether its errors leave the rank as it is.
    """

    ranks: Callable[[list[Tensor], list[int]], list[int]]
    is_certain: Callable[[Spectrum], bool] = lambda spectrum: True


def _rule(energy: float | None, rank: int | None, max_bytes: int | None) -> _Rule:
    if sum(rule is not None for rule in (energy, rank, max_bytes)) != 1:
        raise ValueError(
            f"give exactly one of energy, rank and max_bytes, got {energy=}, {rank=}, {max_bytes=}"
        )
    if energy is not None:
        _checks.number("energy", energy)
        if not 0 < energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {energy}")
        return _Rule(
            lambda spectra, costs: [energy_rank(values, energy) for values in spectra],
            lambda spectrum: energy_is_certain(spectrum.values, energy, spectrum.error),
        )
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
        most = int(rank)
        return _Rule(lambda spectra, costs: [min(most, int((values > 0).sum())) for values in spectra])
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, Integral) or max_bytes < 1:
        raise ValueError(f"max_bytes must be a positive integer, got {max_bytes!r}")
    budget = int(max_bytes)
    return _Rule(lambda spectra, costs: budget_ranks(spectra, costs, budget))


def _accurate_ranks(rule: _Rule, spectra: dict[str, Spectrum], costs: Mapping[str, int]) -> dict[str, int]:
    """The ranks by the rule; ``spectra`` that are too inaccurate for theirs are replaced by better ones."""
    while True:
        found = rule.ranks([spectra[name].values for name in costs], list(costs.values()))
        ranks = dict(zip(costs, found, strict=True))
        better = {
            name: spectrum.exact()
            for name, spectrum in spectra.items()
            if spectrum.exact and not (spectrum.is_accurate(ranks[name]) and rule.is_certain(spectrum))
        }
        if not better:
            return ranks
        spectra |= better


def _stored(name: str, u: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors in the dtype; in float16, the largest entries of a rank's u and v within a factor of 4."""
    if dtype is torch.float16 and u.numel() and v.numel():
        ratio = u.abs().amax(0).double() / v.abs().amax(1).double()
        half = ratio.sqrt().log2().round().exp2()
        u, v = u.double() / half, v.double() * half[:, None]
    stored = u.to(dtype), v.to(dtype)
    for factor, rounded in zip((u, v), stored, strict=True) if dtype is not u.dtype else ():
        size, change = (torch.linalg.vector_norm(x.double()) for x in (factor, rounded.double() - factor))
        if not change <= 0.1 * size:
            raise ValueError(
                f"delta[{name!r}] is beyond the range of {dtype} with factors of up to "
                f"{float(factor.abs().max()):.1e}: give dtype=torch.bfloat16 or torch.float32"
            )
    return stored


Errors = Callable[[str, Tensor, Tensor], tuple[float, float]]


def _report(found: LowRankDelta, spectra: Mapping[str, Spectrum], errors: Errors) -> CompressionReport:
    segments = []
    kept = total = error = size = 0.0
    for name, (u, v) in found.factors.items():
        values, rank = spectra[name].values, u.shape[1]
        some, whole = float(values[:rank].sum()), float(values.sum())
        wrong, norm = errors(name, u, v)
        kept, total = kept + some, total + whole
        error, size = math.hypot(error, wrong), math.hypot(size, norm)
        segments.append(
            CompressedSegment(
                name,
                rows=u.shape[0],
                rank=rank,
                full_rank=len(values),
                bytes=u.nbytes + v.nbytes,
                energy=some / whole if whole else 1.0,
                error=wrong / norm if norm else 0.0,
            )
        )
    return CompressionReport(
        tuple(segments),
        bytes=found.nbytes,
        energy=kept / total if total else 1.0,
        error=error / size if size else 0.0,
    )


def _dense_error(matrices: Mapping[str, Tensor], name: str, u: Tensor, v: Tensor) -> tuple[float, float]:
    """‖ΔW - U V‖_F and ‖ΔW‖_F."""
    change = matrices[name].to(_checks.sum_dtype(matrices[name].dtype))
    return _norm(torch.addmm(change, u.to(change.dtype), v.to(change.dtype), alpha=-1)), _norm(change)


def _low_rank_error(factors: Factors, name: str, u: Tensor, v: Tensor) -> tuple[float, float]:
    """The same from the triangles of [U0, -U] and [V0; V]ᵀ."""
    left, right = factors[name]
    r = torch.linalg.qr(torch.cat([left.double(), -u.double()], 1), mode="r")[1]
    s = torch.linalg.qr(torch.cat([right.double(), v.double()]).mT, mode="r")[1]
    rank = left.shape[1]
    return _norm(r @ s.mT), _norm(r[:, :rank] @ s[:, :rank].mT)


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
