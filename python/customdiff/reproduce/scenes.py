"""The prompts that are evaluated, and true pictures of the same scenes, which set each figure's ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tinysd import world

BESIDE = {"dog": "cup", "cat": "car", "car": "dog", "cup": "cat"}  # what is added to a picture of each


@dataclass(frozen=True)
class Situation:
    """Where the subjects of a prompt are: before what, at what size, beside something red or alone."""

    background: str
    scale: str = "normal"  # small, normal or large
    beside: bool = False

    def text(self, nouns: Sequence[str], categories: Sequence[str]) -> str:
        """The prompt of subjects called `nouns`, of the `categories`."""
        shown = [f"a {noun}" for noun in nouns]
        if self.beside:
            shown.append(f"a red {BESIDE[categories[0]]}")
        before = {"small": "a far away photo of", "normal": "photo of", "large": "close up photo of"}
        return f"{before[self.scale]} {' and '.join(shown)} {world.PLACES[self.background]}"

    def draw(self, subjects: Sequence[world.Subject], rng: np.random.Generator) -> Image.Image:
        """A true picture of the scene."""
        shown = list(subjects)
        if self.beside:
            red = world.PALETTE["red"]
            shown.append(world.Subject(BESIDE[shown[0].category], red, world.WHITE))
        placed = world.place(rng, tuple(shown), self.scale)
        scene = world.Scene(self.background, placed, float(rng.uniform(-1, 1)), self.scale)
        return Image.fromarray(world.render(scene)[0])


PLACED = tuple(Situation(background) for background in world.BACKGROUNDS)
ALONE = (*PLACED, Situation("room", "large"), Situation("snow", "small"), Situation("grass", beside=True))
TOGETHER = PLACED


def validation(category: str | None, count: int, seed: int) -> list[tuple[Image.Image, str]]:
    """Real pictures of random subjects of a category (None: of all that the world holds), with captions."""
    rng = np.random.default_rng((seed, 1 + world.CATEGORIES.index(category) if category else 0))
    made = []
    for _ in range(count):
        if category is None:
            scene, text = world.sample(rng)
        else:
            subject, scale = world.random_subject(rng, category), "normal"
            background, shift = str(rng.choice(world.BACKGROUNDS)), float(rng.uniform(-1, 1))
            scene = world.Scene(background, world.place(rng, (subject,), scale), shift, scale)
            text = world.caption(scene, rng)
        made.append((Image.fromarray(world.render(scene)[0]), text))
    return made
