"""Pictures as latents, computed once: what a step draws from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import augment, data
from .concept import mentions
from .config import GENERATED, ConceptConfig, TrainConfig

CHUNK = 8  # pictures whose views are in memory at a time, at full size


@dataclass(frozen=True)
class Pictures:
    """The files that a concept is learned from, and the captioned ones that keep the prior.

    prompts: to choose from or, of a ``captioned`` concept, one a picture.
    """

    concept: list[Path]
    prompts: list[str]
    regularization: list[Path]
    captions: list[str]

    @classmethod
    def read(cls, config: TrainConfig) -> list[Pictures]:
        """Those of each concept; without the regularization pictures that are yet to be generated."""
        return [cls._of(subject, config) for subject in config.subjects]

    @classmethod
    def _of(cls, subject: ConceptConfig, config: TrainConfig) -> Pictures:
        if subject.captioned:
            concept, captions = data.read_captioned(subject.images)
            prompts = [prompt_of(caption, subject) for caption in captions]
        else:
            concept, prompts = data.picture_paths(subject.images), list(subject.prompts)
        if subject.regularization in (None, GENERATED):
            return cls(concept, prompts, [], [])
        return cls(concept, prompts, *regularization(subject.regularization, subject, config))


def regularization(folder: str, subject: ConceptConfig, config: TrainConfig) -> tuple[list[Path], list[str]]:
    """The captioned pictures of `folder`; ValueError for a caption with a modifier token of the run."""
    paths, captions = data.read_captioned(folder, subject.regularization_prompt)
    words = [each.modifier_token for each in config.subjects if each.modifier_token is not None]
    for caption in captions:
        if mentions(caption, words):
            raise ValueError(
                f"regularization caption {caption!r} holds the modifier token of {', '.join(words)}; "
                "these pictures stand for what the base knows already, so caption them without it"
            )
    return paths, captions


def prompt_of(caption: str, subject: ConceptConfig) -> str:
    """`caption` with the subject's modifier token, if it has one, before its category where it was not there.

    Raises ValueError for a caption that has neither.
    """
    word, category = subject.modifier_token, subject.category
    if word is not None and mentions(caption, [word]):
        return caption
    named = rf"(?<!\w){re.escape(category)}(?!\w)" if category else "(?!)"
    found = re.search(named, caption, re.IGNORECASE)
    if found is None:
        raise ValueError(
            f"caption {caption!r} of {subject.images!r} does not name the subject: write "
            f"{' or '.join(filter(None, (word, category))) or 'its category, and give that,'} there"
        )
    if word is None:
        return caption
    return f"{caption[: found.start()]}{word} {category}{caption[found.end() :]}"


class Views:
    """Latents of all concepts' pictures, whole, resized, and beside those of another, each many times.

    latents: of every view. masks (n,1,h,w): 1 where it is picture; None where all is. words: its size words.
    whole, resized, beside: the views of each concept. picture: the number of each view's picture in its
    concept. other: the concept that a view shows to the right of its own, or None.
    """

    def __init__(self, config: TrainConfig, pixels: Sequence[Tensor], vae: Any, generator: torch.Generator):
        made: list[data.Latents] = []
        masks: list[Tensor] = []
        self.words: list[str] = []
        self.picture: list[int] = []
        self.other: list[int | None] = []
        self.whole: list[range] = []
        self.resized: list[range] = []
        self.beside: list[range] = []
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        side = pixels[0].shape[-1]
        least = 2 * factor - 1  # pixels that cover a whole one of the latents wherever they lie
        if config.resize and round(config.resize_from * side) < least:
            raise ValueError(
                f"resize_from={config.resize_from:g} of {side} pixels may cover no whole latent pixel, "
                f"of {factor}: give at least {least / side:.2g}"
            )

        def add(
            some: Tensor, views: Tensor, mask: Tensor, words: list[str], other: int | None = None
        ) -> None:
            self.picture += some.repeat(len(views) // len(some)).tolist()
            self.words += words
            self.other += [other] * len(views)
            made.append(data.encode(vae, views))
            masks.append(F.avg_pool2d(mask, factor) == 1)

        kinds = [(self.whole, _moved), *([(self.resized, _resized)] if config.resize else [])]
        for concept, (subject, pictures) in enumerate(zip(config.subjects, pixels, strict=True)):
            for kind, make in kinds:
                first = len(self.words)
                for some in torch.arange(len(pictures)).split(CHUNK):
                    views, mask, words = make(config, pictures[some], generator)
                    if config.flip:
                        views, mask = augment.flipped(views, mask, generator)
                    add(some, views, mask, [""] * len(words) if subject.style else words)
                kind.append(range(first, len(self.words)))
            if config.cutmix:
                first = len(self.words)
                for some, views, other in _beside(config, pixels, concept, generator):
                    add(some, views, torch.ones_like(views[:, :1]), [""] * len(views), other)
                self.beside.append(range(first, len(self.words)))
        self.latents = data.Latents(*(torch.cat(parts) for parts in zip(*made, strict=True)))
        valid = torch.cat(masks).float().to(self.latents.mean.device)
        self.masks = None if bool(valid.all()) else valid
        self.shares = config.resize, config.cutmix

    def draw(self, concepts: Tensor, generator: torch.Generator) -> Tensor:
        """A view of each of `concepts` (B,): whole pictures, and a share of each other kind."""
        chosen = choose(self.whole, concepts, generator)
        for views, share in zip((self.resized, self.beside), self.shares, strict=True):
            if views:
                other = choose(views, concepts, generator)
                taken = torch.rand(len(concepts), generator=generator) < share
                chosen = torch.where(taken, other, chosen)
        return chosen


def _moved(config: TrainConfig, pictures: Tensor, generator: torch.Generator) -> augment.Resized:
    moved = augment.shifted(pictures, config.copies, config.shift, generator)
    if config.flip and len(moved) == len(pictures):
        moved = moved.repeat(config.copies, 1, 1, 1)
    return augment.Resized(moved, torch.ones_like(moved[:, :1]), [""] * len(moved))


def _resized(config: TrainConfig, pictures: Tensor, generator: torch.Generator) -> augment.Resized:
    return augment.resized(pictures, config.copies, config.resize_from, generator)


def _beside(
    config: TrainConfig, pixels: Sequence[Tensor], concept: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(numbers of pictures, views with any picture of another concept to their right, that concept)."""
    for copy in range(config.copies):
        other = (concept + 1 + copy % (len(pixels) - 1)) % len(pixels)
        for some in torch.arange(len(pixels[concept])).split(CHUNK):
            drawn = torch.randint(len(pixels[other]), (len(some),), generator=generator)
            sides = [pixels[concept][some], pixels[other][drawn]]
            if config.flip:
                sides = [augment.flipped(side, side[:, :1], generator)[0] for side in sides]
            yield some, augment.side_by_side(*sides), other


def choose(among: Sequence[range], which: Tensor, generator: torch.Generator) -> Tensor:
    """One number of the range ``among[i]`` for each i of `which` (B,), all alike likely."""
    start, size = (
        torch.tensor(values)[which] for values in ([r.start for r in among], [len(r) for r in among])
    )
    place = torch.rand(len(which), generator=generator, dtype=torch.float64)
    return start + (place * size).long()


def read_pixels(paths: Sequence[Path], resolution: int, crop: str) -> Tensor:
    """(n,3,H,H) in -1..1; each is cut to size as it is read: two hundred photos at full size are 10 GB."""
    return data.to_tensor([data.square(data.open_picture(path), resolution, crop) for path in paths])


def content_hash(pixels: Sequence[Tensor], captions: Sequence[Sequence[str]]) -> str:
    """sha256 of all that is learned from."""
    digest = hashlib.sha256(json.dumps([list(texts) for texts in captions]).encode())
    for tensor in pixels:
        digest.update(tensor.flatten().numpy().data)
    return digest.hexdigest()
