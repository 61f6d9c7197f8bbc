"""A run in progress on disk: all that it needs to go on with the same bits as an unbroken one."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig
from .data import replacing
from .training import Training

FORMAT = 2


def save(run: Training, path: Path) -> None:
    """Writes all that `restore` needs, whole or not at all.

    Raises OSError where there is no room for it.
    """
    scaler = getattr(run.accelerator, "scaler", None)
    state = {
        "format": FORMAT,
        "config": json.dumps(_depends_on(run.config)),
        "base_hash": run.learned.base_hash,
        "pictures_hash": run.pictures_hash,
        "steps_done": run.steps_done,
        "learned": run.learned.state(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "scaler": {} if scaler is None else scaler.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # as torch says that a disk is full
            raise OSError(f"checkpoint {str(path)!r} cannot be written ({error}); make room") from error


def restore(run: Training, path: Path) -> None:
    """Lets `run` go on from a checkpoint of the same configuration, base and pictures; else ValueError."""
    try:
        if part := zipfile.ZipFile(path).testzip():  # torch checks no sums
            raise ValueError(f"{part} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state.get("format")
    except Exception as error:  # of a damaged file torch raises nearly anything
        raise ValueError(
            f"resume: checkpoint {str(path)!r} is damaged ({error}); start without resume"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"resume: checkpoint {str(path)!r} is of format {version}, and this version reads "
            f"{FORMAT}; start without resume"
        )
    theirs, ours = json.loads(state["config"]), json.loads(json.dumps(_depends_on(run.config)))
    if changed := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise ValueError(
            f"resume: checkpoint {str(path)!r} was made with other values of {', '.join(changed)}"
        )
    if state["base_hash"] != run.learned.base_hash:
        raise ValueError(f"resume: checkpoint {str(path)!r} belongs to another base model")
    if state["pictures_hash"] != run.pictures_hash:
        raise ValueError(
            f"resume: checkpoint {str(path)!r} was made with other pictures or captions; "
            "put them back, or start without resume"
        )
    with torch.no_grad():
        run.learned.load_state(state["learned"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.generator.set_state(state["generator"])
    if state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.steps_done = state["steps_done"]


def _depends_on(config: TrainConfig) -> dict[str, Any]:
    """What must be the same to go on: the configuration, and what stands in the files that it names."""
    files = {name: getattr(config, name) for name in ("start_from", "rare_captions")}
    content = {
        f"the content of {name}": hashlib.sha256(Path(file).read_bytes()).hexdigest()
        for name, file in files.items()
        if file is not None
    }
    return {**config.mathematics(), **content}
