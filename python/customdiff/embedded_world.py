"""Files of the embedded base's world: the few pictures a user would have, and real ones that regularize."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from tinysd import world

GUIDANCE_SCALE = 4.0  # with which concepts of it are drawn


def write_concept(folder: Path, name: str, count: int, seed: int) -> Path:
    """`count` pictures of the concept `name`, one of ``world.concepts()``, in a folder of their own."""
    without_pictures(folder)
    for i, (picture, _) in enumerate(world.concept_pictures(name, count, seed)):
        picture.save(folder / f"{i}.png")
    return folder


def write_regularization(folder: Path, count: int, seed: int) -> Path:
    """`count` real pictures of random subjects, with their captions."""
    without_pictures(folder)
    rng = np.random.default_rng(seed)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for i in range(count):
            scene, caption = world.sample(rng)
            Image.fromarray(world.render(scene)[0]).save(folder / f"{i:04}.png")
            table.writerow([f"{i:04}.png", caption])
    return folder


def without_pictures(folder: Path) -> Path:
    """`folder`, made if need be, without the numbered pictures of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        if path.stem.isdecimal():
            path.unlink()
    return folder
