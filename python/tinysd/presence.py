"""Whether a picture shows one certain subject: its category by the detector, in its distribution of colours.

The test is calibrated, not tuned: a picture shows the subject if its pixels of that category are nearer to
those of true pictures than the pixels of all but a few of random other subjects of the category are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from . import detector, world

BANDWIDTH = 20.0  # in CIE L*a*b*, about where two colours begin to be called by two names
OTHERS = 300
FALSE_ALARMS = 0.02  # share of OTHERS that would pass
PIXELS = 200  # taken from a picture, evenly
MIN_AREA = 0.02  # of the picture, for the category to be there at all


class Presence:
    """Whether pictures show `subject`, which `true_pictures` show.

    The distance between two sets of colours is their maximum mean discrepancy with a Gaussian kernel (Gretton
    et al., 2012): it sees every colour and its share, and nothing of where it is.

    limit: the largest distance that passes, where an earlier one of the same arguments found it already.
    """

    def __init__(
        self, subject: world.Subject, true_pictures: Sequence[Image.Image], limit: float | None = None
    ):
        self.category = 1 + world.CATEGORIES.index(subject.category)
        shown = [colours for colours in self.colours(true_pictures) if colours is not None]
        if not shown:
            raise ValueError(f"true_pictures: the detector finds no {subject.category} in any of them")
        self.true = np.concatenate([colours[:: len(shown)] for colours in shown])
        self.spread = _kernel(self.true, self.true)
        if limit is None:
            limit = float(np.quantile(self.distances(_others(subject.category)), FALSE_ALARMS))
        self.limit = limit

    def __call__(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(n,) bool."""
        return self.distances(pictures) < self.limit

    def distances(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """(n,) squared discrepancies, 0 to 2, from the true pictures; infinite without the category."""
        return np.array(
            [
                np.inf if c is None else self.spread + _kernel(c, c) - 2 * _kernel(c, self.true)
                for c in self.colours(pictures)
            ]
        )

    def likeness(self, colours: np.ndarray) -> np.ndarray:
        """(n,): how common each of ``colours`` (n, 3), in L*a*b*, is in the true pictures, 0 to 1."""
        return _likeness(colours, self.true).mean(1)

    def colours(self, pictures: Sequence[Image.Image]) -> list[np.ndarray | None]:
        """(PIXELS, 3) in L*a*b* of the category's pixels of each picture; None where they are too few."""
        found: list[np.ndarray | None] = []
        for picture, categories in zip(pictures, detector.categories(pictures), strict=True):
            pixels = np.asarray(picture)[categories == self.category]
            enough = len(pixels) >= MIN_AREA * categories.size
            found.append(
                world.lab(pixels[np.linspace(0, len(pixels) - 1, PIXELS, dtype=int)]) if enough else None
            )
        return found


def _kernel(a: np.ndarray, b: np.ndarray) -> float:
    """The mean over all pairs."""
    return float(_likeness(a, b).mean())


def _likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(-‖x - y‖² / 2σ²) of each pair."""
    squares = ((a[:, None] - b[None]) ** 2).sum(-1)
    return np.exp(squares / (-2 * BANDWIDTH**2))


def _others(category: str) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    subjects = [world.random_subject(rng, category) for _ in range(OTHERS)]
    return [picture for subject in subjects for picture, _ in world.pictures((subject,), 1, rng)]
