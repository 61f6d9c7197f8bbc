"""``LowRankDelta``: a change of the stacked weights as one pair of factors a segment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..stack import Segment, tile

Factors = dict[str, tuple[Tensor, Tensor]]


class LowRankDelta:
    """A change of weights, ``u @ v`` for each named segment.

    segments: (name, start, stop) of the stack that the delta is made for.
    factors: {name: (u (rows,r), v (r,E))}, one E, dtype and device, singular values folded into u; the rank
        may differ from segment to segment. A segment without factors does not change (rank 0).

    Consumers find the segments by name, so a delta of some of a model's segments is a delta for the model.
    Raises TypeError or ValueError naming the factor where shapes, dtypes or devices do not agree.
    """

    def __init__(
        self, segments: Iterable[tuple[str, int, int]], factors: Mapping[str, tuple[Tensor, Tensor]]
    ):
        self.segments = tile(segments)
        if not isinstance(factors, Mapping):
            raise TypeError(f"factors must map segment names to (u, v), got {type(factors).__name__}")
        names = {segment.name for segment in self.segments}
        if unknown := sorted(factors.keys() - names):
            raise ValueError(f"factors are given for segments that do not exist: {unknown[:3]}")
        if not factors:
            raise ValueError("factors must hold at least one segment's (u, v), got none")
        first_name, (_, first) = next(iter(factors.items()))
        _checks.is_tensor(f"factors[{first_name!r}] v", first)
        _checks.floating(f"factors[{first_name!r}] v", first)
        _checks.rank(f"factors[{first_name!r}] v", first, "r,E")
        self.factors: Factors = {}
        for name, start, stop in self.segments:
            if name in factors:
                u, v = factors[name]
                _check_pair(name, u, v, stop - start, first)
            else:
                u, v = first.new_zeros((stop - start, 0)), first.new_zeros((0, first.shape[1]))
            self.factors[name] = (u, v)

    @classmethod
    def from_factors(cls, factors: Mapping[str, tuple[Tensor, Tensor]]) -> LowRankDelta:
        """A delta whose segments are the factors', in the mapping's order."""
        segments, start = [], 0
        for name, (u, _) in factors.items():
            segments.append(Segment(name, start, start + u.shape[0]))
            start += u.shape[0]
        return cls(segments, factors)

    def rank(self, name: str) -> int:
        """Number of columns of u for this segment; 0 where it does not change."""
        if name not in self.factors:
            raise ValueError(
                f"no segment named {name!r}; there are {len(self.segments)}, e.g. {self.segments[0].name!r}"
            )
        return self.factors[name][0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, as a file holds them."""
        return sum(u.nbytes + v.nbytes for u, v in self.factors.values())

    @property
    def width(self) -> int:
        """E, the text width."""
        return next(iter(self.factors.values()))[1].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.factors.values()))[1].dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.factors.values()))[1].device

    def dense(self) -> dict[str, Tensor]:
        """The change itself: {name: u @ v (rows,E)}, views of one stacked tensor. Differentiable."""
        rows = self.segments[-1].stop
        base = torch.zeros((rows, self.width), dtype=self.dtype, device=self.device)
        pairs = [self.factors[segment.name] for segment in self.segments]
        u, v, starts = (
            [p[0] for p in pairs],
            [p[1] for p in pairs],
            [segment.start for segment in self.segments],
        )
        weight = torch.ops.customdiff.reconstruct(base, u, v, starts)
        return {name: weight[start:stop] for name, start, stop in self.segments}

    def to(self, *args: Any, **kwargs: Any) -> LowRankDelta:
        """The delta with its factors cast or moved as by ``Tensor.to``."""
        moved = {
            name: (u.to(*args, **kwargs), v.to(*args, **kwargs)) for name, (u, v) in self.factors.items()
        }
        return LowRankDelta(self.segments, moved)

    def __mul__(self, scale: float | Tensor) -> LowRankDelta:
        return LowRankDelta(self.segments, {name: (u * scale, v) for name, (u, v) in self.factors.items()})

    __rmul__ = __mul__

    def __add__(self, other: LowRankDelta) -> LowRankDelta:
        """The sum of both changes: the factors side by side, ranks added (``compress`` finds the smaller
        form).
        """
        if not isinstance(other, LowRankDelta):
            return NotImplemented
        if other.segments != self.segments:
            raise ValueError(
                "only deltas of the same segments can be added; reconstruct takes any number of deltas"
            )
        summed = {}
        for name, (u, v) in self.factors.items():
            other_u, other_v = other.factors[name]
            summed[name] = (torch.cat([u, other_u], 1), torch.cat([v, other_v], 0))
        return LowRankDelta(self.segments, summed)

    def __repr__(self) -> str:
        ranks = [u.shape[1] for u, _ in self.factors.values()]
        return (
            f"LowRankDelta({len(ranks)} segments, E={self.width}, rank {min(ranks)} to {max(ranks)}, "
            f"{self.nbytes:,} bytes, {self.dtype}, {self.device})"
        )


def _check_pair(name: str, u: Tensor, v: Tensor, rows: int, like: Tensor) -> None:
    for label, factor, dims in ((f"factors[{name!r}] u", u, "rows,r"), (f"factors[{name!r}] v", v, "r,E")):
        _checks.is_tensor(label, factor)
        _checks.floating(label, factor, like.dtype)
        _checks.rank(label, factor, dims)
        _checks.same_device(label, factor, "the first factor", like)
    _checks.shape(f"factors[{name!r}] u", u, (rows, u.shape[1]), "(rows of the segment, rank)")
    _checks.shape(f"factors[{name!r}] v", v, (u.shape[1], like.shape[1]), "(rank of u, E)")
