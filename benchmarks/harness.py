"""Compare callables in one process: interleaved rounds, medians, the distance to this machine's own limits.

Shared machines are noisy, so no figure stands alone. Every round times every callable once, in a new random
order, and what is reported is the median time and the median of the per-round ratios to the baseline.
"""

import datetime
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

MIN_SAMPLE_SECONDS = 2e-3  # a sample shorter than this repeats the call
FLUSH_BYTES = 128 << 20  # larger than any last-level cache met so far


@dataclass
class Row:
    """One callable in one comparison. Times in microseconds, rates in 1e9 a second."""

    op: str
    case: str
    label: str
    microseconds: float
    speedup: float  # baseline time / this time, the median over rounds; 1.0 for the baseline itself
    baseline: str
    gflops: float | None = None
    gbytes: float | None = None
    limit_share: float | None = (
        None  # of the measured GEMM rate (flops given) or copy bandwidth (bytes given)
    )


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _sample(call: Callable[[], object], repeats: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


class Harness:
    """Collects the rows of a run. With ``smoke`` every callable runs once and nothing is timed."""

    def __init__(self, smoke: bool, rounds: int = 15, seconds: float = 4.0):
        self.smoke, self.rounds, self.seconds = smoke, rounds, seconds
        self.rows: list[Row] = []
        self._limits: dict[str, float] = {}
        self._flush: torch.Tensor | None = None

    def compare(
        self,
        op: str,
        case: str,
        cases: dict[str, Callable[[], object]],
        *,
        baseline: str,
        flops: float | None = None,
        bytes: float | None = None,
        cold: bool = False,
    ) -> dict[str, float]:
        """Time ``cases`` against each other; returns the median seconds of each (empty in a smoke run).

        ``flops``/``bytes``: the useful work of one call, for rates and the share of the machine's limit.
        ``cold``: evict the caches before every sample. ``baseline`` names the peer that ratios refer to.
        """
        if baseline not in cases:
            raise ValueError(f"baseline {baseline!r} is none of the cases {sorted(cases)}")
        if self.smoke:
            for call in cases.values():
                call()
            return {}
        times = self._interleave(cases, cold)
        medians = {label: statistics.median(t) for label, t in times.items()}
        for label, seconds in medians.items():
            ratios = [b / t for b, t in zip(times[baseline], times[label], strict=True)]
            gflops = flops / seconds / 1e9 if flops else None
            gbytes = bytes / seconds / 1e9 if bytes else None
            share = gflops / self.limit("gemm") if gflops else gbytes / self.limit("copy") if gbytes else None
            speedup = statistics.median(ratios)
            self.rows.append(Row(op, case, label, seconds * 1e6, speedup, baseline, gflops, gbytes, share))
        return medians

    def _interleave(self, cases: dict[str, Callable[[], object]], cold: bool) -> dict[str, list[float]]:
        repeats = {}
        for label, call in cases.items():
            call()  # warm-up: first-touch, lazy initialisation
            repeats[label] = 1 if cold else max(1, int(MIN_SAMPLE_SECONDS / max(_sample(call, 1), 1e-7)))
        times: dict[str, list[float]] = {label: [] for label in cases}
        order, end = list(cases), time.perf_counter() + self.seconds
        shuffle = random.Random(0).shuffle
        for done in range(self.rounds):
            if done >= 5 and time.perf_counter() > end:
                break
            shuffle(order)
            for label in order:
                if cold:
                    self._evict()
                times[label].append(_sample(cases[label], repeats[label]))
        return times

    def _evict(self) -> None:
        if self._flush is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._flush.add_(1)

    def limit(self, kind: str) -> float:
        """This machine's own limit, measured once in this run.

        ``gemm``: GFLOP/s of an fp32 matrix product at 2048; ``copy``: GB/s read and written, 256 MB.
        """
        if kind not in self._limits:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if kind == "gemm":
                a, b = (torch.randn(2048, 2048, device=device) for _ in range(2))
                out, work = torch.empty_like(a), 2 * 2048**3
                call = lambda: torch.mm(a, b, out=out)  # noqa: E731
            elif kind == "copy":
                a = torch.ones(64 << 20, device=device)
                out, work = torch.empty_like(a), 2 * a.nbytes
                call = lambda: out.copy_(a)  # noqa: E731
            else:
                raise ValueError(f"kind is 'gemm' or 'copy', not {kind!r}")
            call()
            self._limits[kind] = work / statistics.median(_sample(call, 1) for _ in range(9)) / 1e9
        return self._limits[kind]

    def record(self) -> dict:
        """Everything that a reader needs to trust the rows: machine, versions, commit, command, limits."""
        return {
            "machine": machine_name(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["pytest", *sys.argv[1:]]),
            "commit": _git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "limits": {"gemm_gflops": self._limits.get("gemm"), "copy_gbytes": self._limits.get("copy")},
            "rows": [asdict(row) for row in self.rows],
        }


def machine_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        if names:
            model = f"{names[0]}, {len(names)} cores"
    return model


def _git_commit() -> str:
    where = Path(__file__).parent
    head = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=where, capture_output=True, text=True
    )
    return head.stdout.strip() or "unknown"


def table(rows: list[Row]) -> str:
    """The rows of one operation as aligned text."""
    head = ("case", "what", "µs", "× baseline", "GFLOP/s", "GB/s", "of limit")
    lines = [head]
    for r in rows:
        lines.append(
            (
                r.case,
                r.label + (" (baseline)" if r.label == r.baseline else ""),
                f"{r.microseconds:,.0f}",
                f"{r.speedup:.2f}",
                f"{r.gflops:.0f}" if r.gflops else "",
                f"{r.gbytes:.1f}" if r.gbytes else "",
                f"{r.limit_share:.0%}" if r.limit_share else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def plot(rows: list[Row], path: Path) -> None:
    """Speed-up over the baseline, one bar a callable, one group a case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(r.case for r in rows))
    labels = list(dict.fromkeys(r.label for r in rows))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(rows)))
    for i, label in enumerate(labels):
        found = {r.case: r.speedup for r in rows if r.label == label}
        at = [c + i * 0.8 / len(labels) for c, case in enumerate(cases) if case in found]
        axes.barh(at, [found[c] for c in cases if c in found], 0.8 / len(labels), label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([c + 0.4 - 0.4 / len(labels) for c in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"speed-up over {rows[0].baseline}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(harness: Harness, folder: Path) -> list[Path]:
    """Write one JSON of the whole run and one plot an operation into ``folder``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "benchmarks.json"]
    written[0].write_text(json.dumps(harness.record(), indent=1) + "\n")
    for op in dict.fromkeys(r.op for r in harness.rows):
        path = folder / f"{op}.png"
        plot([r for r in harness.rows if r.op == op], path)
        written.append(path)
    return written
