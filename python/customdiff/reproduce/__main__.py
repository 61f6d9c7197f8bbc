"""``make reproduce``: Custom Diffusion's tables on the embedded base; what an earlier run did stands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..base import silence
from . import plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the jobs and writes the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m customdiff.reproduce", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of results (default: out/reproduce)")
    parser.add_argument("--report", type=Path, help="folder of the report (default: report/ in that folder)")
    parser.add_argument("--workers", type=int, help="jobs at a time (default: the cores; 1 with a GPU)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, for tests")
    parser.add_argument(
        "--only", metavar="PATTERN", help="jobs of such names, as 'train-ours-*', and their needs"
    )
    parser.add_argument("--list", action="store_true", help="print the jobs and what they may take, and end")
    options = parser.parse_args(arguments)
    effort = plan.QUICK if options.quick else plan.Effort()
    out = options.out or Path("out/reproduce-quick" if options.quick else "out/reproduce")
    jobs = plan.jobs(effort)
    try:
        chosen = plan.selected(jobs, options.only) if options.only else jobs
    except ValueError as error:
        parser.error(str(error))
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    if options.list:
        for job in chosen:
            print(f"{job.cost:6.0f} s  {job.name}")
        print(f"{len(chosen)} jobs, about {sum(job.cost for job in chosen) / 60:.0f} core minutes")
        return 0
    silence()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from . import pool, report

    failures = pool.run_all(chosen, out, options.workers or _workers())
    if options.only:
        print("no report: --only ran a part")
    else:
        folder = options.report or out / "report"
        report.write(jobs, out, folder, effort, "make reproduce" if not options.quick else "--quick")
        print(f"{folder / report.NAME}.md")
    for name, why in failures.items():
        print(f"FAILED {name}: {why}", file=sys.stderr)
    return 1 if failures else 0


def _workers() -> int:
    import torch

    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
