"""Where a run keeps what: each job's result, log and files, in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..data import replacing
from .plan import Job

FOLDERS = {
    "regularization": "pictures/{}",
    "pictures": "pictures/{}",
    "generated": "pictures/{}",
    "reference": "references/{}.safetensors",
    "train": "concepts/{}.safetensors",
    "compress": "concepts/{}.safetensors",
    "merge": "concepts/{}.safetensors",
    "together": "concepts/{}.safetensors",
    "score": "samples/{}.png",
    "true": "samples/{}.png",
    "timing": "concepts/{}.safetensors",  # gone when the job ends
    "detector": "references/{}",  # nothing but its result
    "residual": "concepts/{}.safetensors",
    "compose": "samples/{}.png",
}


def path_of(job: Job, out: Path) -> Path:
    """The file or folder that a job leaves beside its result."""
    return out / FOLDERS[job.kind].format(job.name)


def log_of(job: Job, out: Path) -> Path:
    return out / "logs" / f"{job.name}.txt"


def result_of(job: Job, out: Path) -> dict[str, Any] | None:
    """What the job returned, if it ended, and with these settings."""
    try:
        held = json.loads(_result_file(job, out).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return held["result"] if held["key"] == job.key else None


def write_result(job: Job, out: Path, result: dict[str, Any]) -> None:
    """Whole or not at all: that it is there says that the job is done."""
    held = {"name": job.name, "key": job.key, "result": result}
    with replacing(_result_file(job, out)) as partial:
        partial.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def _result_file(job: Job, out: Path) -> Path:
    return out / "jobs" / f"{job.name}.json"
