"""Prompt-to-prompt editing (Hertz et al. 2022, arXiv 2208.01626), also with learned concepts.

The source and its targets are rows of one batch that start from the same noise, each with its own concept or
none. Attention probabilities decide where things are; so for a share of the steps the targets take those of
the source, and only the values, which are what is drawn there, are their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .attention import Layer, Recorder, Word, prompt_words, steered, word_positions
from .concept import Concept, match
from .conditioning import one_each
from .data import encode, scaled, square, to_tensor, upright_rgb
from .sampler import check_pipeline, latent_size, sample

BLEND_THRESHOLD = 0.3  # of the largest attention; this and the next as in the published code
BLEND_FROM = 0.2  # of the steps: before, the attention is too vague for a mask


def edit(
    pipe: Any,
    source: str,
    targets: str | Sequence[str],
    concepts: Concept | Sequence[Concept | None] | None = None,
    *,
    cross_steps: float = 0.8,
    word_steps: Mapping[str, float] | None = None,
    self_steps: float = 0.4,
    self_side: int | None = None,
    reweight: Mapping[str, float] | None = None,
    blend: Sequence[str] = (),
    picture: Image.Image | None = None,
    seed: int = 0,
    steps: int = 50,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    size: tuple[int, int] | None = None,
    output: str = "pil",
    progress: bool = True,
) -> list[Image.Image] | Tensor:
    """The picture of ``source``, and it edited to each of ``targets``.

    A word that both prompts have keeps the source's cross-attention, a replaced word takes that of the word
    in whose place it stands, and an added word has its own (``align``).

    Args:
        concepts: one for each of the source and the targets (None is the base model), or one that serves
            those that name its modifier token.
        cross_steps: the share of the steps, from the first, in which the source's cross-attention is taken.
        word_steps: the same for single words of the targets, {word: share}.
        self_steps: the share in which the source's self-attention is taken.
        self_side: this in layers of at most ``self_side``² pixels; default: half of the latents' side.
        reweight: {word: weight}: in every step the attention to the word in the targets is multiplied with
            it, and that to the others is left as it is. A negative weight drives the word out.
        blend: words of the source or a target; where neither attends to them, the source's picture stays.
        picture: a real one that ``source`` describes, to edit in the place of the seed's (``invert``).
        guidance_scale: default: 6, and 1 for a real picture, which with guidance drifts from itself.

    The others are those of ``sample``. Returns 1 + len(targets) pictures, by DDIM.

    Raises ValueError if a share is not in 0..1 or a word is in no prompt, and as ``sample`` does.
    """
    check_pipeline(pipe)
    prompts = [source, *([targets] if isinstance(targets, str) else targets)]
    if len(prompts) == 1:
        raise ValueError("targets is empty; give at least one prompt")
    concepts = match(prompts, [concepts]) if isinstance(concepts, Concept) else concepts
    concepts = one_each("concepts", concepts, len(prompts), (Concept, type(None)))
    if picture is not None and size is not None:
        raise ValueError("size must be left out with picture, which takes the base model's size")
    words = [
        prompt_words(pipe.tokenizer, prompt, concept.modifier_tokens if concept else ())
        for prompt, concept in zip(prompts, concepts, strict=True)
    ]
    half = min(latent_size(pipe, size)) // 2
    control = PromptToPrompt(
        words,
        pipe.tokenizer.model_max_length,
        cross_steps=_count("cross_steps", cross_steps, steps),
        word_steps={word: _count("word_steps", share, steps) for word, share in (word_steps or {}).items()},
        self_steps=_count("self_steps", self_steps, steps),
        self_pixels=(half if self_side is None else self_side) ** 2,
        reweight=reweight or {},
        device=pipe.unet.device,
    )
    mask = Blend(words, blend, round(BLEND_FROM * steps), half**2) if blend else None
    latents = None
    if picture is not None:
        latents = invert(pipe, picture, source, concepts[0], steps=steps, progress=progress)
        latents = latents.expand(len(prompts), -1, -1, -1)
    if guidance_scale is None:
        guidance_scale = 6.0 if picture is None else 1.0

    def after(step: int, x: Tensor) -> Tensor:
        control.step = step + 1
        return mask(step, x) if mask else x

    with steered(pipe.unet, control, *([mask.recorder] if mask else [])):
        return sample(
            pipe,
            prompts,
            concepts,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            seeds=[seed] * len(prompts),
            size=size,
            latents=latents,
            on_step=after,
            output=output,
            progress=progress,
        )


class PromptToPrompt:
    """The control of a batch whose last rows are a source and its targets; ``step`` is the current one.

    In the paper's terms, of the maps M of the source and M* of a target: word swap gives M until step τ, then
    M*; refinement gives M for the words that were there and M* for the new ones; re-weighting c·M of a word.
    ``cross_steps``, ``word_steps`` and ``self_steps`` are numbers of steps here; ``length`` is S, that of a
    context, and ``words`` are those of the source and each target.
    """

    def __init__(
        self,
        words: Sequence[Sequence[Word]],
        length: int,
        *,
        cross_steps: int = 0,
        word_steps: Mapping[str, int] | None = None,
        self_steps: int = 0,
        self_pixels: int = 0,
        reweight: Mapping[str, float] | None = None,
        device: Any = None,
    ):
        self.step, self.self_steps, self.self_pixels = 0, self_steps, self_pixels
        source, *targets = words
        mapper = torch.stack([align(source, target, length) for target in targets])  # (T,S,S)
        until = torch.full((len(targets), length), cross_steps)
        weights = torch.ones(len(targets), length)
        for word, weight in (reweight or {}).items():
            if not math.isfinite(weight):
                raise ValueError(f"reweight must be finite, got {weight} for {word!r}")
        for name, given, table in (("word_steps", word_steps, until), ("reweight", reweight, weights)):
            for word, value in (given or {}).items():
                for row, positions in enumerate(find("targets", name, targets, word)):
                    table[row, positions] = value
        until[~mapper.any(dim=1)] = 0  # nothing of the source comes there
        self.cross_steps, self.weighted = int(until.max()), bool((weights != 1).any())
        self.mapper, self.until, self.weights = (
            x.to(device) for x in (mapper, until[:, None, None], weights[:, None, None])
        )

    def wants(self, layer: Layer) -> bool:
        if layer.cross:
            return self.step < self.cross_steps or self.weighted
        return self.step < self.self_steps and layer.pixels <= self.self_pixels

    def __call__(self, probabilities: Tensor, layer: Layer) -> Tensor:
        others, targets = probabilities.tensor_split([-len(self.mapper)])
        source = others[-1]  # (H,N,S)
        if layer.cross:
            injected = torch.einsum("hns,tsu->thnu", source, self.mapper.to(source))
            targets = torch.where(self.step < self.until, injected, targets) * self.weights
        else:
            targets = source.expand_as(targets)
        return torch.cat([others, targets])


def align(source: Sequence[Word], target: Sequence[Word], length: int) -> Tensor:
    """(S,S): the share of a source token's attention that each token of the target takes over.

    The words of both are matched in their order (`difflib`). Where a run of words stands in the place of
    another, each takes the attention of one, from the last on: in "dog" for "<new1> cat" the cat takes the
    dog's, and <new1> is added. Among a word's tokens it is divided equally if their number differs. The
    columns of added words are 0. Start, end and padding tokens answer to their likes.
    """
    mapper = torch.zeros(length, length)
    texts = [[word.text for word in words] for words in (source, target)]
    for _, a, b, c, d in SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
        for one, other in zip(reversed(source[a:b]), reversed(target[c:d]), strict=False):
            given, taken = torch.tensor(one.positions), torch.tensor(other.positions)
            if len(given) == len(taken):
                mapper[given, taken] = 1
            else:
                mapper[given[:, None], taken] = 1 / len(taken)
    mapper[0, 0] = 1
    ends = [1 + sum(len(word.positions) for word in words) for words in (source, target)]
    for i, j in zip(range(ends[0], length), range(ends[1], length), strict=False):
        mapper[i, j] = 1
    return mapper


class Blend:
    """Keeps a target as the source where neither attends to the words, by ``recorder``'s average so far."""

    def __init__(self, words: Sequence[Sequence[Word]], blend: Sequence[str], start: int, most_pixels: int):
        self.recorder, self.start = Recorder(len(words), most_pixels), start
        found = [find("prompts", "blend", words, word) for word in blend]
        self.positions = [sum(row, []) for row in zip(*found, strict=True)]

    def __call__(self, step: int, x: Tensor) -> Tensor:
        if step < self.start:
            return x
        maps = self.recorder.maps(tuple(x.shape[-2:]))
        attention = torch.stack([row[at].sum(dim=0) for row, at in zip(maps, self.positions, strict=True)])
        attention = F.max_pool2d(attention[:, None], 3, stride=1, padding=1)
        mask = attention > BLEND_THRESHOLD * attention.amax(dim=(-2, -1), keepdim=True)
        return torch.where(mask | mask[:1], x, x[:1])


def find(where: str, name: str, prompts: Sequence[Sequence[Word]], word: str) -> list[list[int]]:
    """The positions of ``word`` in each of ``prompts``; ValueError about argument ``name`` if in none."""
    found = [word_positions(words, word) for words in prompts]
    if not any(found):
        there = "; ".join(" ".join(w.text for w in words) for words in prompts)
        raise ValueError(f"{name}: none of the {where} has the word {word!r}; they read: {there}")
    return found


@torch.no_grad()
def invert(
    pipe: Any,
    picture: Image.Image,
    prompt: str,
    concept: Concept | None = None,
    *,
    steps: int = 50,
    progress: bool = True,
) -> Tensor:
    """The latents (1,C,h,w) from which ``prompt`` draws ``picture``: DDIM run backwards, without guidance.

    ``sample`` gives the picture back, roughly, of these latents in as many steps with ``guidance_scale=1``.
    With guidance it drifts away; the remedy, null-text optimisation, is not here. The centre square of the
    picture is taken, in the base model's size.
    """
    from diffusers import DDIMInverseScheduler

    if not isinstance(picture, Image.Image):
        raise TypeError(f"picture must be a PIL image, got {type(picture).__name__}")
    side = min(latent_size(pipe, None)) * pipe.vae_scale_factor
    mean = encode(pipe.vae, to_tensor([square(upright_rgb(picture), side)])).mean
    return sample(
        pipe,
        prompt,
        concept,
        steps=steps,
        guidance_scale=1,
        scheduler=DDIMInverseScheduler.from_config(pipe.scheduler.config, clip_sample=False),
        latents=scaled(pipe.vae, mean),
        output="latents",
        progress=progress,
    )


def _count(name: str, share: float, steps: int) -> int:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be a share of the steps, from 0 to 1, got {share}")
    return round(share * steps)
