"""Cones 2's training step (section 3.2): a copy E' of the text encoder learns the subject, the UNet stays.

The loss is that of the denoised pictures plus λ times what E' moved at all tokens but the subject's
(equations 2 to 4); the residual is the mean move of the subject's tokens over all captions (equation 5).

"All tokens" are here all S positions of the context: the start token, the end token and the padding too. The
UNet reads every one of them, and in sampling they are those of the base's encoder E: what E' learned there
would be missing from the picture.

The paper ends there. With ``refine_steps`` the residual itself is learned further, from that mean, under the
features of sampling: E moved at the subject's tokens alone (equation 6). The small embedded base needs it: a
layer norm ends E', so its tokens cannot leave a sphere, and the subject's colours lie outside.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import customdiff_kernels as ck

from .captions import captions_for
from .concept import TextFeatures, base_metadata, text_encoders, tokenize
from .config import TrainConfig
from .residual import Residual
from .subjects import occurrences
from .texts import BATCH, Texts
from .training import Batch, Training
from .views import Pictures, content_hash

AFTER = 0.1  # of what comes after the subject, in the published code's preservation


class LearnedEncoder:
    """The parameters of a run: a copy of the pipeline's text encoder, whose own stays as it is.

    base, weight: the keys and values, which do not train. shift: the residual (tokens,E), as it is refined.

    Raises ValueError for a text encoder in half precision, or two of them.
    """

    def __init__(self, pipeline: Any, tokens: int):
        if len(text_encoders(pipeline)) > 1:
            raise ValueError("method 'cones2' is for one text encoder, and this base (SDXL) has two")
        if pipeline.text_encoder.dtype != torch.float32:
            raise ValueError(
                f"method 'cones2' trains the text encoder, which is {pipeline.text_encoder.dtype}; load the "
                "base in float32 and give mixed_precision"
            )
        live = ck.KVStack.from_unet(pipeline.unet)
        self.base, self.of_base = live.to(torch.float32).clone(), base_metadata(live)
        self.weight = self.base.weight
        self.others: dict[str, Tensor] = {}
        self.encoder: nn.Module = copy.deepcopy(pipeline.text_encoder).requires_grad_(True)
        width = self.encoder.get_input_embeddings().weight.shape[1]
        self.shift = torch.zeros(tokens, width, device=self.encoder.device, requires_grad=True)

    @cached_property
    def base_hash(self) -> str:
        """Of the keys and values."""
        return self.base.hash()

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": list(self.encoder.parameters()), "of": "weights"},
            {"params": [self.shift], "of": "rows"},
        ]

    def parameters(self) -> list[Tensor]:
        return [*self.encoder.parameters(), self.shift]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        named = {name: parameter.detach() for name, parameter in self.encoder.named_parameters()}
        return {**named, "shift": self.shift.detach()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def release(self) -> None:
        """Nothing of the pipeline was changed."""


class Marked(NamedTuple):
    """Token ids (n,S) of texts, and the subject in them: time k, it is in text[k] at tokens[k] (tokens,)."""

    ids: Tensor
    text: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str], word: str, device: Any = None) -> Marked:
        """Raises ValueError for a text without the word."""
        found = [(i, at) for i, text in enumerate(texts) for at in occurrences(tokenizer, text, word)]
        if lacking := set(range(len(texts))) - {i for i, _ in found}:
            raise ValueError(
                f"prompt {texts[min(lacking)]!r} has no {word!r} among the tokens that the text encoder "
                "reads; name the category in every prompt"
            )
        ids = tokenize(tokenizer, texts, [()] * len(texts)).ids
        text, tokens = (torch.tensor(part, device=device) for part in zip(*found, strict=True))
        return cls(ids.to(device), text, tokens)

    def subject(self) -> Tensor:
        """(n,S) bool: the subject's tokens, wherever a text names it."""
        mask = torch.zeros_like(self.ids, dtype=torch.bool)
        mask[self.text[:, None], self.tokens] = True
        return mask

    def shifted(self, features: Tensor, shift: Tensor) -> Tensor:
        """features (n,S,E) with `shift` (tokens,E) added to the subject's tokens (equation 6)."""
        moved = shift.to(features).expand(len(self.text), -1, -1)
        return features.index_put((self.text[:, None], self.tokens), moved, accumulate=True)


def preservation(moved: Tensor, subject: Tensor, form: str = "captions") -> Tensor:
    """(n,): what the features of each text moved by at all positions but the subject's.

    moved: (n,S,E), E'(c) - E(c).
    subject: (n,S) bool.
    form: "captions": the sum over positions of squared distances (equation 3); "prompt": the published code's
        distance of all that comes before the subject, plus a tenth of that of all that comes after.
    """
    kept = moved.masked_fill(subject[..., None], 0)
    if form == "captions":
        return kept.square().sum((1, 2))
    before = (subject.cumsum(1) == 0)[..., None]
    return sum(
        share * torch.linalg.vector_norm(kept * side, dim=(1, 2))
        for share, side in ((1, before), (AFTER, ~before))
    )


class ResidualTexts(Texts):
    """The prompts of the pictures, by the encoder that trains, and the captions, by both.

    refined: the residual (tokens,E), while that is what trains.

    Raises ValueError for a prompt or a caption without the category's word, or too few captions.
    """

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Any,
        prompts: Sequence[Sequence[str]],
        encoder: nn.Module,
    ):
        super().__init__(config, pipeline, {}, {}, (), prompts)
        self.encoder = encoder
        self.refined: Tensor | None = None
        tokenizer, word, device = pipeline.tokenizer, config.category or "", encoder.device
        Marked.of(tokenizer, [*self._prompts, *config.validation_prompts], word)
        self.prompts = Marked.of(tokenizer, self._prompts, word, device)
        self.captions = captions_for(config, tokenizer)
        self.marked = Marked.of(tokenizer, self.captions, word, device)

    def of_prompts(self, prompts: Sequence[str]) -> TextFeatures:
        distinct = list(dict.fromkeys(prompts))
        numbers = self.numbers(distinct)
        if self.refined is None:
            features = self.encoder(self.prompts.ids[numbers]).last_hidden_state
        else:
            features = self.prompts.shifted(self._fixed.context, self.refined)[numbers]
        return TextFeatures(features[[distinct.index(prompt) for prompt in prompts]], None)

    def numbers(self, prompts: Sequence[str]) -> list[int]:
        return [self._prompts.index(prompt) for prompt in prompts]

    def moved(self, ids: Tensor) -> Tensor:
        """E'(c) - E(c) (n,S,E) of token ids (n,S)."""
        with torch.no_grad():
            base = self.pipeline.text_encoder(ids).last_hidden_state
        return self.encoder(ids).last_hidden_state - base

    @torch.no_grad()
    def shift(self) -> Tensor:
        """(tokens,E) float32 on the CPU: the mean of what the subject's tokens moved by (equation 5)."""
        marked, total = self.marked, 0.0
        for chunk in torch.arange(len(marked.text), device=marked.text.device).split(BATCH):
            moved = self.moved(marked.ids[marked.text[chunk]])
            total += moved[torch.arange(len(chunk))[:, None], marked.tokens[chunk]].double().sum(0)
        return (total / len(marked.text)).float().cpu()


class ResidualTraining(Training):
    """A run of Cones 2 in progress: what ``Training`` is, with the text encoder as what learns."""

    frozen_tokens = 0

    def _new_learned(self, start: Any) -> LearnedEncoder:
        words = self.pipeline.tokenizer(self.config.category, add_special_tokens=False).input_ids
        return LearnedEncoder(self.pipeline, len(words))

    def _new_texts(self, pictures: Sequence[Pictures]) -> ResidualTexts:
        prompts = [each.prompts for each in pictures]
        return ResidualTexts(self.config, self.pipeline, prompts, self.learned.encoder)

    def _read_pictures(self, pictures: Sequence[Pictures]) -> None:
        super()._read_pictures(pictures)
        self.pictures_hash += content_hash([], [self.texts.captions])

    @property
    def refined_from(self) -> int:
        """The first step in which the residual itself trains, and the text encoder no more."""
        return self.config.steps - self.config.refine_steps

    def rates(self, step: int) -> tuple[float, float]:
        encoder, shift = super().rates(step)
        return (0.0, shift) if step >= self.refined_from else (encoder, 0.0)

    def step(self) -> float:
        if self.steps_done >= self.refined_from:
            if self.steps_done == self.refined_from:
                with torch.no_grad():
                    self.learned.shift.copy_(self.texts.shift())
                self.optimizer.state.pop(self.learned.shift, None)  # it counted steps that were not its own
            self.texts.refined = self.learned.shift
        return super().step()

    def draw(self) -> Batch:
        batch, count = super().draw(), self.config.caption_batch
        if self.config.preservation == "captions":
            captions = torch.randint(len(self.texts.captions), (count,), generator=self.generator)
        else:
            captions = torch.tensor(self.texts.numbers(batch.prompts))
        return batch._replace(captions=captions)

    def loss(self, batch: Batch, concepts: int, prior: int) -> Tensor:
        """``Training.loss`` plus λ times the mean preservation loss (equation 4)."""
        config, texts = self.config, self.texts
        over_captions = config.preservation == "captions"
        marked = texts.marked if over_captions else texts.prompts
        count = config.caption_batch if over_captions else concepts
        loss, rows = super().loss(batch, concepts, prior), batch.captions.to(marked.ids.device)
        if len(rows) and self.steps_done < self.refined_from:  # else fewer captions than processes
            with self.accelerator.autocast():
                moved = texts.moved(marked.ids[rows])
            kept = preservation(moved, marked.subject()[rows], config.preservation)
            loss = loss + config.preservation_weight * kept.sum() / count
        return loss

    def concept(self) -> Residual:
        """What was learned so far."""
        metadata = {**self.learned.of_base, **self._metadata()}
        refined = self.steps_done > self.refined_from
        shift = self.learned.shift.detach() if refined else self.texts.shift()  # which Residual copies
        return Residual(self.config.category, shift, metadata)

    def for_sampling(self) -> dict[str, Any]:
        return {"residuals": {self.config.category: self.concept()}}
