"""What the jobs measured, by group, method, metric and cell, with means, spreads and paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .files import result_of
from .plan import Job

Cells = dict[str, float]  # "teal_dog-0" or "teal_dog+lilac_cat-1": a figure
MADE = ("train", "compress", "merge", "together")


@dataclass(frozen=True)
class Difference:
    """The mean of a - b over their common cells, and its standard error, None of a single cell; `a` and `b`
    are the means.
    """

    mean: float
    error: float | None
    a: float
    b: float

    @property
    def clear(self) -> bool | None:
        """Whether it is larger than twice its standard error; None where that is not known."""
        return None if self.error is None else abs(self.mean) > 2 * self.error


@dataclass
class Figures:
    """``cells[group][method][metric][cell]``; the groups are "single", "multi" and "timing"."""

    cells: dict[str, dict[str, dict[str, Cells]]] = field(default_factory=dict)

    @classmethod
    def collect(cls, jobs: Sequence[Job], out: Path) -> Figures:
        """Of all jobs that have a result; with ``gap``, the share of the way from base to true pictures."""
        figures = cls()
        for job in jobs:
            result = result_of(job, out)
            if result is None:
                continue
            if job.kind in ("score", "true"):
                figures.add(job, {**_cost(job, out), **_measured(result)})
            elif job.kind == "timing":
                for method, seconds in _measured(result).items():
                    figures.put("timing", method, "seconds", "", seconds)
        figures._add_gaps()
        figures._add_kid_of_the_base()
        return figures

    def add(self, job: Job, metrics: Mapping[str, float]) -> None:
        concepts = job.settings["concepts"]
        group, cell = ("single" if len(concepts) == 1 else "multi"), "+".join(concepts)
        for metric, value in metrics.items():
            self.put(group, job.settings["method"], metric, f"{cell}-{job.settings['seed']}", value)

    def put(self, group: str, method: str, metric: str, cell: str, value: float) -> None:
        self.cells.setdefault(group, {}).setdefault(method, {}).setdefault(metric, {})[cell] = value

    def of(self, group: str, method: str, metric: str) -> Cells:
        """Empty where it was not measured."""
        return self.cells.get(group, {}).get(method, {}).get(metric, {})

    def mean(self, group: str, method: str, metric: str) -> float | None:
        cells = self.of(group, method, metric)
        return statistics.fmean(cells.values()) if cells else None

    def spread(self, group: str, method: str, metric: str) -> float:
        """The standard deviation over seeds and concepts; 0 of a single cell."""
        values = list(self.of(group, method, metric).values())
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def seeds(self, group: str, method: str, metric: str) -> dict[str, float]:
        """The mean of each seed."""
        values: dict[str, list[float]] = {}
        for cell, value in self.of(group, method, metric).items():
            values.setdefault(cell.rpartition("-")[2], []).append(value)
        return {seed: statistics.fmean(found) for seed, found in values.items()}

    def difference(self, group: str, metric: str, a: str, b: str) -> Difference | None:
        """Of two methods; None where either was not measured."""
        first, second = self.of(group, a, metric), self.of(group, b, metric)
        common = [cell for cell in first if cell in second]
        if not common:
            return None
        deltas = [first[cell] - second[cell] for cell in common]
        error = statistics.stdev(deltas) / len(deltas) ** 0.5 if len(deltas) > 1 else None
        means = (statistics.fmean(side[cell] for cell in common) for side in (first, second))
        return Difference(statistics.fmean(deltas), error, *means)

    def _add_gaps(self) -> None:
        """Of single concepts, by seed: over all concepts at once, as one alone may leave little room."""
        base, true = self.of("single", "base", "image"), self.of("single", "true", "image")
        for method, metrics in self.cells.get("single", {}).items():
            image = metrics.get("image", {})
            for seed in self.seeds("single", method, "image"):
                common = [c for c in image if c in base and c in true and c.rpartition("-")[2] == seed]
                room = sum(true[cell] - base[cell] for cell in common)
                if room > 0:
                    gap = sum(image[cell] - base[cell] for cell in common) / room
                    self.put("single", method, "gap", f"all-{seed}", gap)

    def _add_kid_of_the_base(self) -> None:
        """Textual Inversion changes no weight of the base: without V* both draw the same pictures."""
        for metric in ("kid_validation", "kid_unrelated"):
            if "textual-inversion" in self.cells.get("single", {}):
                for cell, value in self.of("single", "base", metric).items():
                    self.put("single", "textual-inversion", metric, cell, value)


def _measured(result: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in result.items() if name not in ("peak_memory", "job_seconds")}


def _cost(job: Job, out: Path) -> dict[str, float]:
    """Seconds, bytes and peak memory of the job that made the concept, where there is one."""
    made = [other for other in job.needs if other.kind in MADE]
    result = result_of(made[0], out) if made else None
    wanted = ("seconds", "bytes", *(["peak_memory"] if made and made[0].kind == "train" else []))
    return {name: result[name] for name in wanted if name in result} if result else {}
