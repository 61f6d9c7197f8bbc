"""Runs jobs in processes of their own, several at a time, and goes on where an earlier run stopped."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from .files import log_of, path_of, result_of, write_result
from .plan import Job

Say = Callable[[str], None]
PRELOADED = [  # for all jobs at once: they take longer to import than most jobs take
    "customdiff.reproduce.cones2.work",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "torchmetrics.image.fid",
    "torchmetrics.image.kid",
]


def run_all(jobs: Sequence[Job], out: Path, workers: int, say: Say = print) -> dict[str, str]:
    """Runs what has no result yet, each job after those that it needs; one that fails holds up no other.

    Returns the failures, {name of the job: why}; jobs that need one of them are among them.
    """
    for folder in ("jobs", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if result_of(job, out) is None]
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} jobs are done already")
    progress = _Progress(len(jobs), waiting, workers, say)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    unfinished, failures = {job.name for job in waiting}, dict[str, str]()
    running: dict[BaseProcess, tuple[Job, float]] = {}
    try:
        while waiting or running:
            for job in list(waiting):
                if lost := [other.name for other in job.needs if other.name in failures]:
                    failures[job.name] = f"needs {lost[0]}"
                    waiting.remove(job)
            while ready := _next(waiting, [job for job, _ in running.values()], unfinished, workers):
                waiting.remove(ready)
                started = context.Process(target=_child, args=(ready, out, workers), name=ready.name)
                started.start()
                running[started] = (ready, time.perf_counter())
            ended = wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in ended]:
                process.join()
                job, since = running.pop(process)
                if result_of(job, out) is None:
                    failures[job.name] = _last_line(job, out, process.exitcode)
                    say(f"FAILED {job.name}: {failures[job.name]}; see {log_of(job, out)}")
                else:
                    unfinished.remove(job.name)
                progress.ended(job, time.perf_counter() - since)
    finally:
        for process in running:
            process.terminate()
            process.join()
    return failures


def _next(waiting: Sequence[Job], running: Sequence[Job], unfinished: set[str], workers: int) -> Job | None:
    """The first job that can start; one that takes times starts alone and stays alone."""
    if len(running) >= workers or any(job.alone for job in running):
        return None
    for job in waiting:
        if not any(other.name in unfinished for other in job.needs):
            return job if not (job.alone and running) else None
    return None


def _child(job: Job, out: Path, workers: int) -> None:
    """One job, in its own process: what it prints goes to its log, its result to its file."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    with open(log_of(job, out), "w", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        import torch

        from ..base import usable_device
        from ..trainer import peak_memory
        from . import work
        from .cones2 import work as cones2

        if workers > 1 and not job.alone:
            torch.set_num_threads(1)  # more would wait for one another
        started = time.perf_counter()
        path_of(job, out).parent.mkdir(parents=True, exist_ok=True)
        result = (work.KINDS | cones2.KINDS)[job.kind](job, out)
        spent = {"peak_memory": peak_memory(usable_device()), "job_seconds": time.perf_counter() - started}
        write_result(job, out, {**result, **spent})
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _end_with_the_parent() -> None:
    """A killed run must not leave children that write the files of the next one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _last_line(job: Job, out: Path, exitcode: int | None) -> str:
    lines = log_of(job, out).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if exitcode is not None and exitcode < 0:
        return f"killed by signal {-exitcode}"
    return lines[-1] if lines else f"ended with code {exitcode}"


class _Progress:
    """A line a job, with the time left by the jobs' costs and the pace so far."""

    def __init__(self, total: int, waiting: Sequence[Job], workers: int, say: Say):
        self.done, self.total, self.workers, self.say = total - len(waiting), total, workers, say
        self.left = sum(job.cost for job in waiting)
        self.spent, self.started = 0.0, time.perf_counter()

    def ended(self, job: Job, seconds: float) -> None:
        self.done, self.left, self.spent = self.done + 1, self.left - job.cost, self.spent + job.cost
        left = (time.perf_counter() - self.started) / self.spent * self.left / 60
        self.say(f"[{self.done}/{self.total}] {job.name}: {seconds:.0f} s; about {left:.0f} min left")
