"""The prompts and the layouts that are drawn, and true pictures of them, which set each figure's ceiling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tinysd import world

from ...layouts import Box

SMALL = 4  # so many subjects are small: without a word of it the base draws fewer of them
BARE = 6  # and so many leave no room for articles and a place in the 24 tokens of a prompt


def prompt(nouns: Sequence[str], place: str) -> str:
    """A prompt of subjects called `nouns`, from left to right."""
    if len(nouns) >= BARE:
        return f"{world.PREFIXES['small'][1]}{' and '.join(nouns)}"
    prefix = world.PREFIXES["small" if len(nouns) >= SMALL else "normal"][-1]
    return f"{prefix}{world.listed([f'a {noun}' for noun in nouns])} {world.PLACES[place]}"


def subject_names(nouns: Sequence[str]) -> list[str]:
    """What the sampler calls subjects of such nouns: "dog", and "dog#2" for the second dog."""
    seen: Counter[str] = Counter()
    names = []
    for noun in nouns:
        seen[noun] += 1
        names.append(noun if seen[noun] == 1 else f"{noun}#{seen[noun]}")
    return names


def boxes(count: int, backwards: bool = False) -> list[Box]:
    """Where so many subjects go: side by side, four and six in two rows; `backwards`, the last first."""
    if backwards:
        return boxes(count)[::-1]
    if count == 1:
        return [(0.1, 0.12, 0.9, 0.97)]
    if count <= 3:
        top = {2: 0.42, 3: 0.54}[count]
        return [(k / count, top, (k + 1) / count, 0.97) for k in range(count)]
    columns = count // 2
    return [(k / columns, top, (k + 1) / columns, top + 0.47) for top in (0.03, 0.5) for k in range(columns)]


def cut(picture: Image.Image, box: Box) -> Image.Image:
    """What of a picture lies in a box, enlarged to the whole: the detector knows subjects of that size."""
    width, height = picture.size
    x0, y0, x1, y1 = box
    edges = (width * x0, height * y0, width * x1, height * y1)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box=edges)


def true_picture(subjects: Sequence[world.Subject], place: str, rng: np.random.Generator) -> Image.Image:
    """What a perfect model draws: each subject in its region, before the place."""
    if len(subjects) <= 3:
        placed = world.place(rng, tuple(subjects))
    else:
        placed = tuple(_standing(s, box, rng) for s, box in zip(subjects, boxes(len(subjects)), strict=True))
    scene = world.Scene(place, placed, float(rng.uniform(-1, 1)))
    return Image.fromarray(world.render(scene)[0])


def _standing(subject: world.Subject, box: Box, rng: np.random.Generator) -> world.Placed:
    x0, y0, x1, y1 = (world.SIZE * edge for edge in box)
    side = min(x1 - x0, y1 - y0) * rng.uniform(0.85, 0.95)
    centre = (x0 + x1) / 2
    return world.Placed(subject, (centre - side / 2, y1 - side, centre + side / 2, y1))
