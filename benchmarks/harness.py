"""Compare callables in one process: interleaved rounds, medians, the distance to this machine's own limits.

Shared machines are noisy, so no figure stands alone. Every round times every callable once, in a new random
order, and what is reported is the median time and the median of the per-round ratios to the baseline.
"""

import datetime
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timing import (
    CUDA,
    device_sample,
    evict,
    host_sample,
    measure_limit,
    peak_bytes,
    queue_seconds,
    synchronize,
)

MIN_SAMPLE_SECONDS = 2e-3  # a sample shorter than this repeats the call


@dataclass
class Row:
    """One callable in one comparison. Times in microseconds, rates and bytes in 1e9 and 1e6."""

    op: str
    case: str
    label: str
    microseconds: float
    speedup: float  # baseline time / this time, the median over rounds; 1.0 for the baseline itself
    baseline: str
    gflops: float | None = None
    gbytes: float | None = None
    limit_share: float | None = None  # floor / time
    floor_microseconds: float | None = None  # the slower of flops and bytes at the rates measured in this run
    peak_mbytes: float | None = None  # most memory that a call held beside what stood before it
    host_microseconds: float | None = None  # GPU only: until the call was queued


def is_ours(label: str) -> bool:
    return label.startswith("ours")


class Harness:
    """Collects the rows of a run. With ``smoke`` every callable runs once and nothing is timed."""

    def __init__(self, smoke: bool, rounds: int | None = None, seconds: float = 4.0):
        self.smoke, self.seconds = smoke, seconds
        self.rounds = rounds or (50 if CUDA else 15)
        self.rows: list[Row] = []
        self.left_out: list[dict[str, str]] = []  # op, case, label, reason
        self._limits: dict[str, float] = {}

    def compare(
        self,
        op: str,
        case: str,
        cases: dict[str, Callable[[], object]],
        *,
        baseline: str | None = None,
        flops: float | None = None,
        bytes: float | None = None,
        dtype: torch.dtype = torch.float32,
        cold: bool = CUDA,
        memory: bool = CUDA,
    ) -> dict[str, float]:
        """Time ``cases`` against each other; returns the median seconds of each (empty in a smoke run).

        ``baseline``: the label that ratios refer to; without one the fastest that is not ours. A peer that
        refuses the case is left out and noted. ``flops``/``bytes``: the useful work of one call, for rates
        and the floor, with the matrix rate of ``dtype``. ``cold``: evict the caches before every sample.
        ``memory``: also the peak of each.
        """
        if baseline is not None and baseline not in cases:
            raise ValueError(f"baseline {baseline!r} is none of the cases {sorted(cases)}")
        cases = self._runnable(op, case, cases, {baseline})
        if self.smoke:
            return {}
        peaks = {label: peak_bytes(call) / 1e6 for label, call in cases.items() if memory}
        queue = {label: min(queue_seconds(call) for _ in range(3)) for label, call in cases.items() if CUDA}
        times = self._interleave(cases, cold, queue)
        medians = {label: statistics.median(t) for label, t in times.items()}
        if baseline is None:
            baseline = min((label for label in cases if not is_ours(label)), key=medians.__getitem__)
        floor = self._floor(flops, bytes, dtype)
        for label, seconds in medians.items():
            ratios = [b / t for b, t in zip(times[baseline], times[label], strict=True)]
            self.rows.append(
                Row(
                    op,
                    case,
                    label,
                    seconds * 1e6,
                    statistics.median(ratios),
                    baseline,
                    gflops=flops / seconds / 1e9 if flops else None,
                    gbytes=bytes / seconds / 1e9 if bytes else None,
                    limit_share=floor / seconds if floor else None,
                    floor_microseconds=floor * 1e6 if floor else None,
                    peak_mbytes=peaks.get(label),
                    host_microseconds=queue[label] * 1e6 if label in queue else None,
                )
            )
        return medians

    def _runnable(
        self, op: str, case: str, cases: dict[str, Callable[[], object]], needed: Iterable[str | None]
    ) -> dict[str, Callable[[], object]]:
        """The cases that run; also their first call: compilation, first touch, lazy initialisation."""
        found = {}
        for label, call in cases.items():
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                try:
                    call()
                    synchronize()
                    found[label] = call
                except (RuntimeError, ValueError) as error:
                    if is_ours(label) or label in needed:
                        raise
                    reason = _reason(error, [str(note.message) for note in notes])
                    self.left_out.append({"op": op, "case": case, "label": label, "reason": reason})
        return found

    def _floor(self, flops: float | None, bytes: float | None, dtype: torch.dtype) -> float | None:
        """The least seconds for that work, at the rates measured in this run."""
        seconds = []
        if flops:
            seconds.append(flops / self.limit("gemm", dtype) / 1e9)
        if bytes:
            seconds.append(bytes / self.limit("copy") / 1e9)
        return max(seconds, default=None)

    def _interleave(
        self, cases: dict[str, Callable[[], object]], cold: bool, queue: dict[str, float]
    ) -> dict[str, list[float]]:
        repeats = {}
        for label, call in cases.items():
            once = cold or CUDA
            repeats[label] = 1 if once else max(1, int(MIN_SAMPLE_SECONDS / max(host_sample(call, 1), 1e-7)))
        times: dict[str, list[float]] = {label: [] for label in cases}
        order, end = list(cases), time.perf_counter() + self.seconds
        shuffle = random.Random(0).shuffle
        for done in range(self.rounds):
            if done >= 5 and time.perf_counter() > end:
                break
            shuffle(order)
            for label in order:
                if cold:
                    evict()
                if CUDA:
                    times[label].append(device_sample(cases[label], queue[label]))
                else:
                    times[label].append(host_sample(cases[label], repeats[label]))
        return times

    def limit(self, kind: str, dtype: torch.dtype = torch.float32) -> float:
        """This machine's own limit, measured once in this run.

        ``gemm``: GFLOP/s of a matrix product in ``dtype``, 2048 wide (GPU 8192); ``copy``: GB/s read and
        written, 256 MB (GPU 1 GB).
        """
        key = kind if kind == "copy" or dtype == torch.float32 else f"{kind}_{str(dtype).split('.')[1]}"
        if key not in self._limits:
            self._limits[key] = measure_limit(kind, dtype)
        return self._limits[key]

    def record(self) -> dict:
        """Everything that a reader needs to trust the rows: machine, versions, commit, command, limits."""
        units = {name: f"{name}_{'gbytes' if name == 'copy' else 'gflops'}" for name in self._limits}
        limits = {"gemm_gflops": None, "copy_gbytes": None}
        return {
            "machine": machine_name(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["pytest", *sys.argv[1:]]),
            "commit": _git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if CUDA else None,
            "threads": torch.get_num_threads(),
            "limits": limits | {units[name]: rate for name, rate in self._limits.items()},
            "rows": [asdict(row) for row in self.rows],
            "left_out": self.left_out,
        }


def _reason(error: Exception, notes: list[str]) -> str:
    """One line: what was warned beside the error, where SDPA says why it refuses; else the error's own."""
    said = [note.partition("(Triggered")[0].strip() for note in notes]
    said = [note for note in said if note and "not used because" not in note and "disabled" not in note]
    return (said or [str(error).strip().partition("\n")[0]])[0][:200]


def machine_name() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        names = [value.strip() for key, _, value in pairs if key.strip() == "model name"]
        family = next((value.strip() for key, _, value in pairs if key.strip() == "cpu family"), None)
        if names:  # a virtual machine may hide the model, and generations differ by a factor of two
            model = f"{names[0]}{f' (family {family})' if family else ''}, {len(names)} cores"
    return model


def _git_commit() -> str:
    """Of this checkout; of a copy without git what ``CK_COMMIT`` says."""
    if not shutil.which("git"):
        return os.environ.get("CK_COMMIT", "unknown")
    command = ["git", "describe", "--always", "--dirty"]
    head = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return head.stdout.strip() or os.environ.get("CK_COMMIT", "unknown")


COLUMNS = {  # of the table of one operation; one that no row has is left out
    "case": lambda r: r.case,
    "what": lambda r: r.label + (" (baseline)" if r.label == r.baseline else ""),
    "µs": lambda r: _number(r.microseconds),
    "× baseline": lambda r: f"{r.speedup:.2f}",
    "GFLOP/s": lambda r: f"{r.gflops:,.0f}" if r.gflops else "",
    "GB/s": lambda r: f"{r.gbytes:,.1f}" if r.gbytes else "",
    "floor µs": lambda r: _number(r.floor_microseconds) if r.floor_microseconds else "",
    "of limit": lambda r: f"{r.limit_share:.0%}" if r.limit_share else "",
    "peak MB": lambda r: f"{r.peak_mbytes:,.1f}" if r.peak_mbytes is not None else "",
    "host µs": lambda r: _number(r.host_microseconds) if r.host_microseconds else "",
}


def _number(microseconds: float) -> str:
    return f"{microseconds:,.1f}" if microseconds < 100 else f"{microseconds:,.0f}"


def table(rows: list[Row]) -> str:
    """The rows of one operation as aligned text."""
    columns = [[name, *map(cell, rows)] for name, cell in COLUMNS.items()]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    )


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up over the baseline, one bar a callable, one group a case; ours alone where there are many."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in rows if is_ours(r.label)] if len(rows) > 150 else rows
    cases = list(dict.fromkeys(r.case for r in rows))
    labels = list(dict.fromkeys(r.label for r in rows))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(rows)))
    for i, label in enumerate(labels):
        found = {r.case: r.speedup for r in rows if r.label == label}
        at = [c + i * 0.8 / len(labels) for c, case in enumerate(cases) if case in found]
        lengths = [found[c] - 1 for c in cases if c in found]  # from 1: what is slower points to the left
        axes.barh(at, lengths, 0.8 / len(labels), left=1, label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")  # ratios: half as fast is as far from 1 as twice
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.margins(y=0.01)
    axes.set_yticks([c + 0.4 - 0.4 / len(labels) for c in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    baselines = {r.baseline for r in rows}
    axes.set_xlabel(f"speed-up over {baselines.pop() if len(baselines) == 1 else 'the fastest peer'}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_record(harness: Harness, folder: Path) -> Path:
    """The run so far as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmarks.json"
    path.write_text(json.dumps(harness.record(), indent=1) + "\n")
    return path


def write(harness: Harness, folder: Path) -> list[Path]:
    """Write one JSON of the whole run and one plot an operation into ``folder``; returns the paths."""
    written = [write_record(harness, folder)]
    for op in dict.fromkeys(r.op for r in harness.rows):
        path = folder / f"{op}.png"
        plot([r for r in harness.rows if r.op == op], path)
        written.append(path)
    return written
