"""What was measured, by method and number of subjects: means over the pictures of all combinations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import result_of
from ..plan import Job

METRICS = (
    *("text", "image", "categories_in_region", "in_region", "all_in_region", "seen", "leakage"),
    *("seconds", "bytes"),
)


@dataclass(frozen=True)
class Row:
    """One method, for one number of subjects; what was not measured is missing from `mean`."""

    method: str
    subjects: int
    pictures: int
    combinations: int
    mean: dict[str, float]
    least: float | None  # of the subjects in their regions, the one least often there


@dataclass
class Figures:
    rows: dict[tuple[str, int], Row] = field(default_factory=dict)

    @classmethod
    def collect(cls, jobs: Sequence[Job], out: Path) -> Figures:
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for job in jobs:
            if job.kind == "compose" and (result := result_of(job, out)) is not None:
                key = job.settings["method"], len(job.settings["subjects"])
                found.setdefault(key, []).append({**result, **_spent(job, out)})
        return cls({key: _row(*key, results) for key, results in found.items()})

    def of(self, method: str, subjects: int, metric: str) -> float | None:
        row = self.rows.get((method, subjects))
        return None if row is None else row.mean.get(metric)


def _row(method: str, subjects: int, results: Sequence[dict[str, Any]]) -> Row:
    each = [{**result, "in_region": _mean(result["in_region"])} for result in results]
    mean = {}
    for metric in METRICS:
        known = [(r[metric], r["count"]) for r in each if metric in r and not math.isnan(r[metric])]
        if known:
            mean[metric] = sum(value * n for value, n in known) / sum(n for _, n in known)
    least = min(min(result["in_region"]) for result in results)
    return Row(method, subjects, sum(r["count"] for r in results), len(results), mean, least)


def _spent(job: Job, out: Path) -> dict[str, float]:
    """Seconds and bytes of what draws a combination: residuals, a joint run, or concepts and their merge."""
    made = [other for other in job.needs if other.kind in ("residual", "train", "merge")]
    if not made:
        return {}
    learned = [other for top in made for other in (top, *top.needs) if other.kind in ("residual", "train")]
    results = [result_of(other, out) or {} for other in made]
    seconds = [(result_of(other, out) or {}).get("seconds", 0.0) for other in learned]
    return {"seconds": sum(seconds), "bytes": sum(result["bytes"] for result in results)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
