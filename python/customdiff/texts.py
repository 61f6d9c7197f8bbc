"""The texts of a run: the features of those that stay what they are are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from . import augment
from .concept import Concept, Row, Rows, TextFeatures, encode_prompts, tokenize
from .config import TrainConfig

BATCH = 32


class Texts:
    """The prompts of the concepts, with words of size, and the captions that keep the prior.

    Args:
        rows: the embeddings of the run's modifier tokens, which may be parameters.
        kept: those of others, that the run goes on from.
        captions: of the regularization pictures, in their order.
        prompts: of each concept; default: those of the configuration.

    Raises ValueError for a text that cannot be encoded, or a validation prompt that names no concept.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Any,
        rows: dict[str, tuple[Tensor, ...]],
        kept: dict[str, Row],
        captions: Sequence[str],
        prompts: Sequence[Sequence[str]] | None = None,
    ):
        self.config, self.pipeline, self.rows = config, pipeline, rows
        self.of_concepts = prompts or [subject.prompts for subject in config.subjects]
        words = {**kept, **rows}
        for prompt in config.validation_prompts:
            Concept({}, words).check_prompt(prompt)
        tokenize(pipeline.tokenizer, config.validation_prompts, [words] * len(config.validation_prompts))
        distinct = list(dict.fromkeys([*captions, ""]))
        self._captions = self._encode(distinct, {})
        self._empty = distinct.index("")
        self._caption = torch.tensor([distinct.index(caption) for caption in captions], dtype=torch.long)
        if pipeline.config.get("force_zeros_for_empty_prompt"):  # SDXL: what guidance samples against
            for part in self._captions:
                part[self._empty] = 0
        self._prompts = self._all_prompts()
        fixed: Any = self._encode(self._prompts, rows)  # a bad one fails now, not at the step that draws it
        trains = any(row.requires_grad for parts in rows.values() for row in parts)
        self._fixed = None if trains else fixed

    def prompt(self, concept: int, number: int, words: str) -> str:
        """The prompt `number` of a concept with its words of size; those that stand first want the first, but
        for a picture's own caption.
        """
        prompts, place = self.of_concepts[concept], self.config.size_words
        first = words and place == "before" and not self.config.subjects[concept].captioned
        return augment.sized(prompts[0 if first else number], words, place)

    def of_two(self, left: int, right: int) -> str:
        """The prompt of a view that shows two concepts side by side."""
        names = [self.config.subjects[i].name for i in (left, right)]
        return f"photo of a {names[0]} and a {names[1]}"

    def of_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of concepts' prompts; each that differs runs through the text encoder once."""
        if self._fixed is not None:
            return _rows(self._fixed, torch.tensor([self._prompts.index(text) for text in prompts]))
        distinct = list(dict.fromkeys(prompts))
        features = encode_prompts(self.pipeline, distinct, self.rows)
        return _rows(features, torch.tensor([distinct.index(text) for text in prompts]))

    def of_captions(self, pictures: Tensor, dropped: Tensor) -> TextFeatures:
        """Features of the captions of `pictures` (P,), where they are not `dropped` (P,)."""
        return _rows(self._captions, torch.where(dropped, self._empty, self._caption[pictures]))

    def _all_prompts(self) -> list[str]:
        """Every prompt that a step may draw."""
        sizes = ("", *augment.SMALL_WORDS, *augment.LARGE_WORDS) if self.config.resize else ("",)
        prompts = [
            self.prompt(i, j, words)
            for i, subject in enumerate(self.config.subjects)
            for j in range(len(self.of_concepts[i]))
            for words in (sizes[:1] if subject.style else sizes)
        ]
        if self.config.cutmix:
            prompts += [self.of_two(*pair) for pair in permutations(range(len(self.of_concepts)), 2)]
        return list(dict.fromkeys(prompts))

    @torch.no_grad()
    def _encode(self, texts: Sequence[str], rows: Rows) -> TextFeatures:
        chunks = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        return joined(*(encode_prompts(self.pipeline, chunk, rows) for chunk in chunks))


def joined(*texts: TextFeatures) -> TextFeatures:
    """The rows of all of them."""
    pooled = [text.pooled for text in texts]
    together = None if pooled[0] is None else torch.cat(pooled)
    return TextFeatures(torch.cat([text.context for text in texts]), together)


def _rows(text: TextFeatures, index: Tensor) -> TextFeatures:
    index = index.to(text.context.device)
    return TextFeatures(text.context[index], None if text.pooled is None else text.pooled[index])
