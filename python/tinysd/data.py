"""The training pictures: rendered once, in seeded chunks, into a cache outside the repository."""

from __future__ import annotations

import os
from multiprocessing import Pool
from pathlib import Path

import numpy as np

from . import world

CHUNK = 2000
CAPTIONS = 4  # captions drawn for every picture
# Chunks from here on, which the denoiser learned from last, have more scenes of three subjects.
CROWDED, CROWDED_SHARES = range(24, 1000), (0.36, 0.20, 0.44)
CACHE = Path(os.environ.get("TINYSD_CACHE", "~/.cache/tinysd")).expanduser()


def render_chunk(index: int) -> Path:
    """Render pictures [index·CHUNK, (index+1)·CHUNK), unless they are there."""
    path = CACHE / "pictures" / f"{index:04d}.npz"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((2024, index))
    shares = CROWDED_SHARES if index in CROWDED else world.SHARES
    images = np.empty((CHUNK, world.SIZE, world.SIZE, 3), np.uint8)
    labels = np.empty((CHUNK, world.SIZE, world.SIZE), np.uint8)
    backgrounds = np.empty(CHUNK, np.uint8)
    captions = []
    for k in range(CHUNK):
        scene = world.random_scene(rng, shares)
        images[k], subjects = world.render(scene)
        labels[k] = world.category_map(scene, subjects)
        backgrounds[k] = world.BACKGROUNDS.index(scene.background)
        captions.append([world.caption(scene, rng) for _ in range(CAPTIONS)])
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    np.savez(temporary, images=images, labels=labels, backgrounds=backgrounds, captions=np.array(captions))
    os.replace(temporary, path)
    return path


def load(chunks: range, *fields: str) -> list[np.ndarray]:
    """The named fields (images, labels, backgrounds, captions) of some chunks, each as one array."""
    parts = []
    for index in chunks:
        with np.load(render_chunk(index)) as archive:
            parts.append([archive[f] for f in fields])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def render_all(chunks: range, processes: int = 2) -> None:
    with Pool(processes) as pool:
        for path in pool.imap_unordered(render_chunk, chunks):
            print("rendered", path.name, flush=True)
