"""What the training stages share: checkpoints written whole or not at all, a schedule, a log."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import torch

from .data import CACHE

LOG = CACHE / "training_log.jsonl"


def save(state: dict, name: str) -> None:
    """Write CACHE/name so that a crash leaves either the old file or the new one."""
    path = CACHE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load(name: str) -> dict | None:
    path: Path = CACHE / name
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def log(stage: str, **values: float) -> None:
    """Print one line and append it to the training log."""
    entry = {"stage": stage, **{k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}}
    print(time.strftime("%H:%M:%S", time.gmtime()), json.dumps(entry), flush=True)
    with open(LOG, "a") as f:
        f.write(json.dumps(entry) + "\n")


class Schedule:
    """Warm-up, constant, then a cosine to zero over the last ``decay`` of the time between now and
    ``finish_at``.

    ``finish_at`` is "HH:MM" in UTC, so that the decay ends when the machine is wanted for something else,
    however fast it was; progress is remembered in seconds of training, which is what a resumed run continues.
    """

    def __init__(self, rate: float, finish_at: str, warmup: int = 200, decay: float = 0.4):
        self.rate, self.warmup, self.decay = rate, warmup, decay
        self.start = time.time()
        hours, minutes = map(int, finish_at.split(":"))
        now = time.gmtime(self.start)
        self.seconds = (
            (hours * 60 + minutes) * 60 - (now.tm_hour * 60 + now.tm_min) * 60 - now.tm_sec
        ) % 86400

    @property
    def progress(self) -> float:
        return (time.time() - self.start) / max(self.seconds, 1)

    def __call__(self, step: int, progress: float | None = None) -> float:
        p = min(self.progress if progress is None else progress, 1.0)
        fall = (
            1.0 if p < 1 - self.decay else 0.5 + 0.5 * math.cos(math.pi * (p - 1 + self.decay) / self.decay)
        )
        return self.rate * min(1.0, (step + 1) / self.warmup) * max(fall, 0.0)
