"""``make reproduce`` and ``make cones2``: the papers' tables on the embedded base; what an earlier run did
stands.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base import silence
from . import plan
from .cones2 import plan as cones2_plan

PAPERS: dict[str, tuple[Any, str]] = {  # its plan, and what make calls it
    "custom-diffusion": (plan, "reproduce"),
    "cones2": (cones2_plan, "cones2"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the jobs and writes the report; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m customdiff.reproduce", description=__doc__)
    parser.add_argument(
        "paper", nargs="?", choices=PAPERS, default="custom-diffusion", help="(default: custom-diffusion)"
    )
    parser.add_argument("--out", type=Path, help="folder of results (default: out/reproduce, out/cones2)")
    parser.add_argument("--report", type=Path, help="folder of the report (default: report/ in that folder)")
    parser.add_argument("--workers", type=int, help="jobs at a time (default: the cores; 1 with a GPU)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, for tests")
    parser.add_argument(
        "--only", metavar="PATTERN", help="jobs of such names, as 'train-ours-*', and their needs"
    )
    parser.add_argument("--list", action="store_true", help="print the jobs and what they may take, and end")
    options = parser.parse_args(arguments)
    planned, name = PAPERS[options.paper]
    effort = planned.QUICK if options.quick else planned.Effort()
    out = options.out or Path(f"out/{name}{'-quick' * options.quick}")
    jobs = planned.jobs(effort)
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
    from .cones2 import report as cones2_report

    failures = pool.run_all(chosen, out, options.workers or _workers())
    if options.only:
        print("no report: --only ran a part")
    else:
        folder = options.report or out / "report"
        written = cones2_report if options.paper == "cones2" else report
        written.write(jobs, out, folder, effort, f"make {name}" if not options.quick else "--quick")
        print(f"{folder / written.NAME}.md")
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
