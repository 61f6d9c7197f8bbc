"""How many singular values a segment keeps: by their share of the sum, or by the bytes of all segments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EDGE = 32  # values on either side of where the budget ends that are chosen again


def energy_rank(values: Tensor, energy: float) -> int:
    """The smallest rank that reaches the share; the 1e-12 takes a sum's rounding for reached."""
    total = values.sum()
    return int((values.cumsum(0) < energy * total * (1 - 1e-12)).sum()) + 1 if total > 0 else 0


def energy_is_certain(values: Tensor, energy: float, error: float) -> bool:
    """Whether that rank is the same wherever the true values lie: ``Spectrum.error``."""
    if not len(values) or not error:
        return True
    least, most = share_bounds(values, error)
    return int((least < energy).sum()) == int((most < energy).sum())


def share_bounds(values: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """The least and the most that each rank's share of the sum can be."""
    squares = values.square()
    slack = error * (squares[0] + 8 * squares)
    low, high = (squares - slack).clamp_(min=0).sqrt_(), (squares + slack).sqrt_()
    low = torch.where(squares > 100 * error * squares[0], low, 0.0)
    return _shares(low, high), _shares(high, low)


def _shares(first: Tensor, rest: Tensor) -> Tensor:
    """The share of ``first[: i + 1]`` in it and ``rest[i + 1 :]``, for each i."""
    kept = first.cumsum(0)
    behind = rest.flip(0).cumsum(0).flip(0) - rest
    return kept / (kept + behind)


def budget_ranks(spectra: Sequence[Tensor], costs: Sequence[int], max_bytes: int) -> list[int]:
    """The ranks of least total squared error whose factors take at most ``max_bytes``; ``costs``: bytes a
    rank.

    A knapsack of the squared singular values. Filled in the order of what they take off the error a byte,
    which is optimal where all segments cost the same; the choice at the edge is then made again, exactly.
    Within a segment the values descend at one price, so what is taken is its first few.
    """
    kept = [values[values > 0] for values in spectra]
    owner = torch.cat([torch.full((len(values),), i) for i, values in enumerate(kept)])
    if not len(owner):
        return [0] * len(spectra)
    gain, cost = torch.cat(kept).square(), torch.tensor(costs)[owner]
    if cost.min() > max_bytes:
        raise ValueError(
            f"max_bytes must hold a singular value of the smallest segment ({cost.min()}), got {max_bytes}"
        )
    order = (gain / cost).argsort(descending=True, stable=True)
    fits = int((cost[order].cumsum(0) <= max_bytes).sum())
    sure, edge = order[: max(0, fits - EDGE)], order[max(0, fits - EDGE) : fits + EDGE]
    taken = torch.cat([sure, edge[_knapsack(gain[edge], cost[edge], max_bytes - int(cost[sure].sum()))]])
    rest, left = order[fits + EDGE :], max_bytes - int(cost[taken].sum())
    while len(rest := rest[cost[rest] <= left]):  # a cheap one far behind may still fit
        taken, left = torch.cat([taken, rest[:1]]), left - int(cost[rest[0]])
        rest = rest[1:]
    return torch.bincount(owner[taken], minlength=len(spectra)).tolist()


def _knapsack(gain: Tensor, cost: Tensor, capacity: int) -> Tensor:
    """The indices, ascending, of the most gain that costs at most ``capacity``: dynamic programming."""
    capacity, unit = min(capacity, int(cost.sum())), math.gcd(*cost.tolist())
    weights = (cost // unit).tolist()
    best = torch.zeros(capacity // unit + 1, dtype=torch.float64)  # by what may be spent
    better = []
    for value, weight in zip(gain.tolist(), weights, strict=True):
        found = best.clone()
        if weight < len(best):
            found[weight:] = torch.maximum(best[weight:], best[: len(best) - weight] + value)
        better.append(found > best)
        best = found
    chosen, spent = [], len(best) - 1
    for i in reversed(range(len(weights))):
        if better[i][spent]:
            chosen.append(i)
            spent -= weights[i]
    return torch.tensor(chosen[::-1], dtype=torch.int64)
