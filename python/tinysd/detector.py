"""Finds the subjects of a picture, for the metrics: which categories, where, in what colours, before what
background.

A small convolutional network gives each pixel a category and each picture a background; colours are then
measured, not predicted, from the pixels inside a subject's mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from . import world

WEIGHTS = Path(__file__).resolve().parent / "detector.safetensors"
MIN_PIXELS = 30
COLOUR_DISTANCE = 22.0
COLOUR_SHARE = 0.12


class Net(nn.Module):
    """(B, 3, 64, 64) in 0..1 → category logits (B, 5, 64, 64) and background logits (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 5, stride=2, padding=2)
        self.down = nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.wide = nn.ModuleList(nn.Conv2d(64, 64, 3, padding=d, dilation=d) for d in (1, 2, 1))
        self.up = nn.Conv2d(64 + 48, 64, 3, padding=1)
        self.out = nn.Conv2d(64 + 24, 4 * (1 + len(world.CATEGORIES)), 3, padding=1)
        self.background = nn.Linear(64 * 16, len(world.BACKGROUNDS))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = F.relu(self.stem(x * 2 - 1))
        quarter = F.relu(self.down(half))
        deep = F.relu(self.deep(quarter))
        for layer in self.wide:
            deep = deep + F.relu(layer(deep))
        up = F.relu(self.up(torch.cat([F.interpolate(deep, scale_factor=2.0), quarter], 1)))
        logits = self.out(torch.cat([F.interpolate(up, scale_factor=2.0), half], 1))
        return F.pixel_shuffle(logits, 2), self.background(F.adaptive_avg_pool2d(deep, 4).flatten(1))


@dataclass(frozen=True, eq=False)
class Found:
    """One subject found in a picture."""

    category: str
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 outside
    mask: np.ndarray  # (64, 64) bool
    colour: str | None  # the palette colour that covers most of it, if one covers COLOUR_SHARE


def _pixels(images: Sequence[Image.Image | np.ndarray]) -> np.ndarray:
    """(n, 64, 64, 3) uint8."""
    size = (world.SIZE, world.SIZE)
    pictures = [Image.fromarray(i) if isinstance(i, np.ndarray) else i for i in images]
    return np.stack(
        [np.asarray(p.convert("RGB") if p.size == size else p.convert("RGB").resize(size)) for p in pictures]
    )


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of a boolean mask, by flooding the smallest index through each part."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(label, 1)
        neighbours = np.stack(
            [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], label]
        )
        spread = np.where(mask, neighbours.max(0), 0)
        if (spread == label).all():
            return [label == k for k in np.unique(label) if k]
        label = spread


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.nonzero(mask)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def _separate(mask: np.ndarray) -> list[np.ndarray]:
    """One part, or its left and right halves where it is more than twice as wide as high."""
    x0, y0, x1, y1 = _box(mask)
    if x1 - x0 <= 2 * (y1 - y0) or mask.sum() < 2 * MIN_PIXELS:
        return [mask]
    third = (x1 - x0) // 3
    cut = x0 + third + int(mask[:, x0 + third : x1 - third].sum(0).argmin())
    left = mask & (np.arange(mask.shape[1]) < cut)
    return [left, mask & ~left]


def near(pixels: np.ndarray, colours: Sequence[world.RGB]) -> np.ndarray:
    """Which of (n, 3) pixels lie within COLOUR_DISTANCE (CIE76) of each colour: (n, colours) bool."""
    return (
        np.linalg.norm(world.lab(pixels)[:, None] - world.lab(np.array(colours))[None], axis=-1)
        < COLOUR_DISTANCE
    )


class Detector:
    def __init__(self, net: Net):
        self.net = net.eval().requires_grad_(False)

    def _run(self, images: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pixels = _pixels(images)
        maps, backgrounds = [], []
        with torch.inference_mode():
            for part in np.array_split(pixels, max(1, len(pixels) // 64)):
                categories, background = self.net(torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255)
                maps.append(categories.argmax(1).numpy())
                backgrounds.append(background.argmax(1).numpy())
        return pixels, np.concatenate(maps), np.concatenate(backgrounds)

    def categories(self, images: Sequence) -> np.ndarray:
        """(n, 64, 64) integers: 0 background, 1 + i for ``world.CATEGORIES[i]``."""
        return self._run(images)[1]

    def backgrounds(self, images: Sequence) -> list[str]:
        """The name of each picture's background."""
        return [world.BACKGROUNDS[k] for k in self._run(images)[2]]

    def detect(self, images: Sequence) -> list[list[Found]]:
        """The subjects of each picture, from left to right.

        A connected part of one category's pixels is a subject if it has MIN_PIXELS and a fifth of the largest
        part's; what is more than twice as wide as high is two that touch, and is cut where it is thinnest.
        """
        pixels, maps, _ = self._run(images)
        result = []
        for picture, labels in zip(pixels, maps, strict=True):
            parts = [
                (name, part)
                for k, name in enumerate(world.CATEGORIES)
                for whole in components(labels == k + 1)
                for part in _separate(whole)
            ]
            largest = max((part.sum() for _, part in parts), default=0)
            found = []
            for name, part in parts:
                if part.sum() < max(MIN_PIXELS, largest / 5):
                    continue
                inside = near(picture[part], list(world.PALETTE.values())).mean(0)
                colour = list(world.PALETTE)[inside.argmax()] if inside.max() > COLOUR_SHARE else None
                found.append(Found(name, _box(part), part, colour))
            result.append(sorted(found, key=lambda f: f.box[0] + f.box[2]))
        return result

    def match(self, images: Sequence, concept: world.Concept | world.Subject) -> np.ndarray:
        """How much of each picture's best subject of the concept's category wears the concept's colours.

        (n,) shares of mask pixels near the primary or secondary colour, 0 where the category is absent.
        """
        subject = concept.subject if isinstance(concept, world.Concept) else concept
        scores = np.zeros(len(images))
        for k, (picture, found) in enumerate(zip(_pixels(images), self.detect(images), strict=True)):
            for f in found:
                if f.category == subject.category:
                    share = near(picture[f.mask], (subject.primary, subject.secondary)).any(1).mean()
                    scores[k] = max(scores[k], float(share))
        return scores


@lru_cache(maxsize=1)
def load() -> Detector:
    """The detector with its shipped weights."""
    from safetensors.torch import load_file

    net = Net()
    net.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return Detector(net)


def categories(images: Sequence) -> np.ndarray:
    """``Detector.categories`` of the shipped detector."""
    return load().categories(images)


def backgrounds(images: Sequence) -> list[str]:
    """``Detector.backgrounds`` of the shipped detector."""
    return load().backgrounds(images)
