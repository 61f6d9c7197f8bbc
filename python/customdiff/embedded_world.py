"""Files of the embedded base's world: the few pictures a user would have, and real ones that regularize."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tinysd import world

GUIDANCE_SCALE = 4.0  # with which concepts of it are drawn


def write_concept(
    folder: Path, name: str, count: int, seed: int, scales: Sequence[str] = ("normal",)
) -> Path:
    """`count` pictures of the concept `name`, one of ``world.concepts()``, in a folder of their own.

    Their captions name category, place and, of the `scales` taken in turn, any but "normal".
    """
    made = world.concept_pictures(name, count, seed, scales)
    return _write(folder, [(f"{i}", picture, caption) for i, (picture, caption) in enumerate(made)])


def write_regularization(folder: Path, count: int, seed: int) -> Path:
    """`count` real pictures of random subjects, with their captions."""
    rng, made = np.random.default_rng(seed), []
    for i in range(count):
        scene, caption = world.sample(rng)
        made.append((f"{i:04}", Image.fromarray(world.render(scene)[0]), caption))
    return _write(folder, made)


def _write(folder: Path, captioned: Sequence[tuple[str, Image.Image, str]]) -> Path:
    """(name, picture, caption) as PNG and one captions.csv."""
    without_pictures(folder)
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for name, picture, caption in captioned:
            picture.save(folder / f"{name}.png")
            table.writerow([f"{name}.png", caption])
    return folder


def without_pictures(folder: Path) -> Path:
    """`folder`, made if need be, without the numbered pictures of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):
        if path.stem.isdecimal():
            path.unlink()
    return folder
