"""Singular values of segments and the factors of any rank: fast where that is accurate, exact where not.

Three decompositions of a matrix, each more accurate and slower than the one before it; ``Spectrum.exact``
leads to the next. MATH.md has their errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import _backends, _checks
from .._library import register
from ..stack import as_stack
from .delta import LowRankDelta

# float32 is trusted with singular values down to this share of the largest, the float64 Gram matrix down to
# the other: there both are right to 1e-5 of each, with room (MATH.md).
FLOAT_LIMIT, GRAM_LIMIT = 0.05, 1e-5
FLOAT_FROM = 128  # rows and columns; a smaller matrix takes no time in float64
GRAM_BLOCK = 128  # columns of a Gram matrix computed at a time, up to the diagonal: a third and more is saved


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one segment.

    values: (k,) float64 on the CPU, descending.
    factors: rank -> u (rows,r) with the singular values folded in, v (r,E) with orthonormal rows.
    limit: share of the largest below which a value is not right to 1e-5 of itself.
    error: of the squares, as a share of the largest: ``ranks.share_bounds``.
    exact: the next better decomposition; None where there is none.
    """

    values: Tensor
    factors: Callable[[int], tuple[Tensor, Tensor]]
    limit: float = 0.0
    error: float = 0.0
    exact: Callable[[], Spectrum] | None = None

    def is_accurate(self, rank: int) -> bool:
        """Whether the first ``rank`` values are."""
        return rank == 0 or float(self.values[rank - 1]) >= self.limit * float(self.values[0])


def dense_spectra(matrices: Mapping[str, Tensor]) -> Iterator[dict[str, Spectrum]]:
    """The spectra of {name: (rows,E)}, some segments of one shape at a time, each batch as it is ready.

    Raises ValueError naming the segment that is not finite, before the first.
    """
    largest = _finite(matrices)
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, matrix in matrices.items():
        shapes.setdefault(tuple(matrix.shape), []).append(name)
    some = max(4, 2 * torch.get_num_threads())
    for names in shapes.values():
        for start in range(0, len(names), some):
            batch = names[start : start + some]
            found = _spectra([matrices[name] for name in batch], [largest[name] for name in batch])
            yield dict(zip(batch, found, strict=True))


def low_rank_spectra(delta: LowRankDelta) -> Iterator[dict[str, Spectrum]]:
    """The spectra of u @ v, of which nothing is formed but the triangles of u = Q R and vᵀ = P S: those of
    R Sᵀ.
    """
    for name, (u, v) in delta.factors.items():
        if not bool(torch.isfinite(u).all() & torch.isfinite(v).all()):
            raise ValueError(f"delta[{name!r}] is not finite")
    for name, (u, v) in delta.factors.items():
        (q, r), (p, s) = torch.linalg.qr(u.double()), torch.linalg.qr(v.double().mT)
        left, values, right = torch.linalg.svd(r @ s.mT, full_matrices=False)
        factors = partial(_cut, q @ left, values, right @ p.mT)
        yield {name: Spectrum(_significant(values.cpu(), max(u.shape[0], v.shape[1])), factors)}


def singular_values(
    delta: Mapping[str, Tensor] | LowRankDelta, *, progress: Callable[[int], object] | None = None
) -> dict[str, Tensor]:
    """Every segment's singular values {name: (k,)}, float64 on the CPU, descending.

    delta: {name: (rows,E)}, a ``KVStack`` difference (k = min(rows,E)), or a ``LowRankDelta`` (k = its rank).
    progress: called with the number of segments just done.

    In float64, from the Gram matrix where a segment is dense: right to about 1e-8 of the segment's largest.
    Raises ValueError naming the segment that is not finite.
    """
    found: dict[str, Tensor] = {}
    if isinstance(delta, LowRankDelta):
        for batch in low_rank_spectra(delta):
            found |= {name: spectrum.values for name, spectrum in batch.items()}
            if progress is not None:
                progress(len(batch))
        return found
    stack = as_stack("delta", delta)
    matrices = {name: stack[name].detach() for name in stack}
    for name, largest in _finite(matrices).items():
        matrix, scale = _scaled(matrices[name], largest)
        a = _tall(matrix.double())
        squares = torch.linalg.eigvalsh(a.mT @ a).flip(0).cpu()
        found[name] = squares.clamp_(min=0).sqrt_() / scale
        if progress is not None:
            progress(1)
    return found


def _finite(matrices: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude in each; ValueError naming the first that holds nan or inf."""
    zero = next(iter(matrices.values())).new_zeros(())
    ends = [torch.stack(torch.aminmax(m)).abs().amax() if m.numel() else zero for m in matrices.values()]
    largest = dict(zip(matrices, torch.stack(ends).tolist(), strict=True))
    for name, size in largest.items():
        if not math.isfinite(size):
            raise ValueError(f"delta[{name!r}] is not finite")
    return largest


def _spectra(matrices: Sequence[Tensor], largest: Sequence[float]) -> list[Spectrum]:
    scaled = [_scaled(*pair) for pair in zip(matrices, largest, strict=True)]
    first = matrices[0]
    fast = (
        first.device.type == "cpu"
        and first.dtype is not torch.float64
        and min(first.shape) >= FLOAT_FROM
        and torch.get_float32_matmul_precision() == "highest"  # products may be in bfloat16 otherwise
        and _backends.is_built()
        and _backends.choose(first.device, first.dtype).name == "cpu"
    )
    return _float_spectra(scaled) if fast else _gram_spectra(scaled)


def _scaled(matrix: Tensor, largest: float) -> tuple[Tensor, float]:
    """The matrix and what it was multiplied by: a power of two that brings the squares of very small and
    very large changes back into range, in float32 at least.
    """
    matrix = matrix.to(_checks.sum_dtype(matrix.dtype))
    if largest == 0 or 1e-6 < largest < 1e6:
        return matrix, 1.0
    scale = 2.0 ** min(-math.frexp(largest)[1], 1000 if matrix.dtype is torch.float64 else 120)
    return matrix * scale, scale


def _float_spectra(scaled: Sequence[tuple[Tensor, float]]) -> list[Spectrum]:
    from .eigen import symmetric_eigen

    short = min(scaled[0][0].shape)
    grams = torch.empty((len(scaled), short, short))
    for (matrix, _), gram in zip(scaled, grams, strict=True):
        a = _tall(matrix)
        for start in range(0, short, GRAM_BLOCK):
            stop = min(start + GRAM_BLOCK, short)
            torch.mm(a[:, start:stop].mT, a[:, :stop], out=gram[start:stop, :stop])
    found = []
    traces = grams.diagonal(dim1=1, dim2=2).double().sum(1).tolist()
    for (matrix, scale), trace, eigen in zip(scaled, traces, symmetric_eigen(grams), strict=True):
        squares = eigen.values.double()
        exact = partial(_one_gram, matrix, scale)
        if not abs(float(squares.sum()) - trace) <= 1e-4 * trace:  # over- or underflow; the sum is the trace
            found.append(exact())
            continue
        values = squares.clamp_(min=0).sqrt_()

        def factors(rank: int, matrix=matrix, scale=scale, eigen=eigen, values=values, exact=exact):
            q = eigen.vectors(rank)
            u, v, kept = _project(matrix, q)
            orthonormal = (q.mT @ q - torch.eye(rank)).abs() <= 1e-5
            agree = (kept - values[:rank]).abs() <= 5e-6 * values[:rank]
            if orthonormal.all() and agree.all():
                return u / scale, v
            return exact().factors(rank)

        error = torch.finfo(torch.float32).eps
        found.append(Spectrum(values / scale, factors, FLOAT_LIMIT, error, exact))
    return found


def _gram_spectra(scaled: Sequence[tuple[Tensor, float]]) -> list[Spectrum]:
    a = torch.stack([matrix.double() for matrix, _ in scaled])
    values, vectors = torch.ops.customdiff.spectrum(a)
    values = values.cpu()  # ranks are decided there: one transfer, not one for every question
    found = []
    for i, (matrix, scale) in enumerate(scaled):

        def factors(rank: int, matrix=matrix, scale=scale, q=vectors[i]):
            u, v, _ = _project(matrix.double(), q[:, :rank])
            return u / scale, v

        kept = _significant(values[i], max(matrix.shape)) / scale
        error = torch.finfo(torch.float64).eps
        found.append(Spectrum(kept, factors, GRAM_LIMIT, error, partial(_lapack, matrix, scale)))
    return found


def _one_gram(matrix: Tensor, scale: float) -> Spectrum:
    return _gram_spectra([(matrix, scale)])[0]


def _lapack(matrix: Tensor, scale: float) -> Spectrum:
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / scale
    return Spectrum(_significant(values.cpu(), max(matrix.shape)), partial(_cut, u, values, v))


def _cut(u: Tensor, values: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return u[:, :rank] * values[:rank], v[:rank]


def _significant(values: Tensor, size: int) -> Tensor:
    """What is below the rounding of the largest singular value is zero."""
    return torch.where(values > values[:1] * size * torch.finfo(torch.float64).eps, values, 0.0)


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def _project(a: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, v and the singular values of the change ``a`` (rows,E) in the span of ``q``: r vectors of its
    shorter side.
    """
    product = _tall(a) @ q
    values = torch.linalg.vector_norm(product, dim=0, dtype=torch.float64)
    if a.shape[0] >= a.shape[1]:
        return product, q.mT, values
    scale = values.to(q.dtype)
    return q * scale, (product / scale).mT, values


def _check_spectrum(matrices: Tensor) -> None:
    _checks.floating("matrices", matrices)
    _checks.rank("matrices", matrices, "G,rows,E")


def _spectrum(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and the singular vectors of the shorter side, as columns, in float64."""
    _check_spectrum(matrices)
    a = matrices.double()
    gram = a @ a.mT if a.shape[1] < a.shape[2] else a.mT @ a
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    values = squares.clamp_(min=0).sqrt_().flip(-1)
    return values, vectors.flip(-1).contiguous()


def _spectrum_fake(matrices: Tensor) -> tuple[Tensor, Tensor]:
    _check_spectrum(matrices)
    count, rows, width = matrices.shape
    k = min(rows, width)
    return matrices.new_empty((count, k), dtype=torch.float64), matrices.new_empty(
        (count, k, k), dtype=torch.float64
    )


register("spectrum(Tensor matrices) -> (Tensor, Tensor)", _spectrum, _spectrum_fake)
