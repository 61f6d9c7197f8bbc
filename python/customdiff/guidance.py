"""Layout-guided sampling (Cones 2, section 3.3 and algorithm 1): where in the picture each subject may be.

A subject's tokens get a higher score at the pixels of its region and a lower one elsewhere (equation 7):

    softmax((QKᵀ + η(t)·M)·D^(−1/2)),    η(t) = weight · f(t) · std(QKᵀ)

M is the layout, γ⁺ inside and γ⁻ outside. The standard deviation is of the row's own scores, so that no row
depends on the others of its batch, and comes in closed form; neither M nor the scores are built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import customdiff_kernels as ck
from customdiff_kernels.diffusers import attentions

from .attention import level_size
from .layouts import Layout

Tokens = Mapping[str, Sequence[int]]
Schedule = str | Callable[[float, float], float]
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "published": lambda sigma, progress: math.log1p(sigma**2),
    "constant": lambda sigma, progress: 1.0,
    "cosine": lambda sigma, progress: math.cos(math.pi / 2 * progress),
}
# The largest σ of Stable Diffusion's schedule (ᾱ = 0.0047), which the published code takes σ from whatever
# the sampler's is. A schedule whose terminal signal is zero begins at infinity, and gets this.
MAX_SIGMA = 14.6146


@dataclass(frozen=True)
class LayoutGuidance:
    """How strongly a layout guides.

    Args:
        positive, negative: γ⁺ and γ⁻, what a subject's tokens get inside and outside its region, times η(t).
            0 for both samples bit for bit as without a layout. −inf is legal.
        outside: what they get where no region is at all; default: ``negative`` as in the published code. The
            paper has 0 there.
        weight: of η(t) = weight·f(t)·std(QKᵀ); the published configurations have 0.05 to 0.1. 0 samples bit
            for bit as without a layout.
        schedule: f(t): "published", log(1 + σ²); "constant", 1; "cosine", cos(π/2·progress); or a function
            (σ, progress) -> number. σ is that of the step's noise, √((1−ᾱ)/ᾱ), at most ``MAX_SIGMA``, that of
            Stable Diffusion's first step, also where the schedule's is infinite; progress is the share of the
            guided steps that are done.
        steps: so many are guided, from the first; default: all.
        recurrence: the published code's "self-recurrence", not in the paper. Every guided step is taken
            twice: after the first time, the noise that it took away is put back, drawn anew, and the step is
            taken again from there. It costs a second pass of the UNet; LMS takes steps of first order then.
    """

    positive: float = 2.5
    negative: float = -1e8
    outside: float | None = None
    weight: float = 0.08
    schedule: Schedule = "published"
    steps: int | None = None
    recurrence: bool = False

    def __post_init__(self) -> None:
        for name in ("positive", "negative", "outside", "weight"):
            value = getattr(self, name)
            if value is None and name == "outside":
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if math.isnan(value) or value == math.inf:
                raise ValueError(f"{name} must be finite, or -inf to hide the subject; got {value}")
        if not 0 <= self.weight:
            raise ValueError(f"weight must be at least 0, got {self.weight}")
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be {', '.join(map(repr, SCHEDULES))} or a function of sigma and progress, "
                f"got {self.schedule!r}"
            )
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 0):
            raise ValueError(
                f"steps must be a whole number of at least 0, or None for all, got {self.steps!r}"
            )

    def strengths(self, sigmas: Sequence[float]) -> list[float]:
        """weight·f(t) for steps of such σ; 0 for those that are not guided."""
        count = len(sigmas) if self.steps is None else min(self.steps, len(sigmas))
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        found = [float(schedule(min(sigma, MAX_SIGMA), i / count)) for i, sigma in enumerate(sigmas[:count])]
        for i, value in enumerate(found):
            if not math.isfinite(value):
                raise ValueError(
                    f"schedule gives {value} for step {i} (sigma {sigmas[i]:.4g}); it must be finite"
                )
        return [self.weight * value for value in found] + [0.0] * (len(sigmas) - count)


class Guide:
    """The layouts of a batch at work on a UNet, which is patched.

    Args:
        rows: for each row of the batch its layout and ``{subject: the positions of its tokens}``, or None.
        n_tokens: S, the length of the context.
        size: (h,w) of the latents.
        sigmas: σ of each step, and after the last (``noise_levels``).
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        rows: Sequence[tuple[Layout, Tokens] | None],
        n_tokens: int,
        size: tuple[int, int],
        guidance: LayoutGuidance,
        sigmas: Sequence[float],
    ):
        self.unet, self.rows, self.n_tokens, self.size = unet, rows, n_tokens, size
        self.guidance, self.sigmas = guidance, sigmas
        self.levels: dict[int, list[ck.LayoutBias | None]] = {}
        self.strengths = guidance.strengths(sigmas[:-1])
        if not any(self._level(size[0] * size[1])):
            self.strengths = [0.0] * len(self.strengths)  # every γ is 0

    def repeats(self, step: int) -> bool:
        """Whether ``step`` is taken twice, by all rows, which the unguided ones do not notice."""
        return self.guidance.recurrence and self.strengths[step] != 0

    def for_trial(self, generators: Sequence[torch.Generator]) -> list[torch.Generator]:
        """What the rows draw from where ``step`` is taken for the first time: those that are not guided from
        copies, since for them it is not taken.
        """
        guided = self._level(self.size[0] * self.size[1])[-len(generators) :]
        return [g.clone_state() if row is None else g for g, row in zip(generators, guided, strict=True)]

    def back(
        self, x: Tensor, x_next: Tensor, step: int, scheduler: Any, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """The latents ``x_next`` (B,C,h,w), which ``step`` made of ``x``, brought back to the noise of ``x``.

        Each row's noise is its generator's; a row that is not guided stays as it was, ``x``. Schedulers that
        scale their input (LMS, Euler) have x = x₀ + σε, the others x = √ᾱ·x₀ + √(1−ᾱ)·ε.
        """
        before, after = self.sigmas[step : step + 2]
        if scheduler.init_noise_sigma > 1:
            keep, add = 1.0, math.sqrt(max(before**2 - after**2, 0))
        else:
            kept = min((1 + after**2) / (1 + before**2), 1.0)  # ᾱ before / ᾱ after
            keep, add = math.sqrt(kept), math.sqrt(1 - kept)
        rows = list(x)
        for i, guided in enumerate(self._level(self.size[0] * self.size[1])[-len(x) :]):
            if guided is not None:
                noise = torch.randn(x.shape[1:], generator=generators[i])
                rows[i] = keep * x_next[i] + add * noise.to(x)
        return torch.stack(rows)

    @contextmanager
    def on(self, step: int) -> Iterator[None]:
        """For the length of a ``with`` block the cross-attention of the UNet is guided as in ``step``."""
        modules = attentions(self.unet).values() if self.strengths[step] else ()
        processors = [attn.processor for attn in modules if attn.is_cross_attention]
        before = [processor.attention for processor in processors]
        try:
            for processor, attention in zip(processors, before, strict=True):
                processor.attention = _Guided(self, self.strengths[step], attention or ck.cross_attention)
            yield
        finally:
            for processor, attention in zip(processors, before, strict=True):
                processor.attention = attention

    def bias(self, query: Tensor, key: Tensor, strength: float, scale: float) -> ck.LayoutBias | None:
        """What the scores of query (B,H,N,D) and key (B,H,S,D) receive, after their ``scale``."""
        rows = self._level(query.shape[2])
        scaled = []
        for i, row in enumerate(rows):
            if row is not None:
                std = ck.score_std(query[i : i + 1], key[i : i + 1])
                row = row.with_scale(strength * scale * std)
            scaled.append(row)
        return ck.LayoutBias.stack(scaled) if any(scaled) else None

    def _level(self, pixels: int) -> list[ck.LayoutBias | None]:
        """Each row's layout at the attention level of so many pixels, on the UNet's device, at scale 1."""
        if pixels not in self.levels:
            size = level_size(pixels, self.size)
            self.levels[pixels] = [row and self._at(size, *row) for row in self.rows]
        return self.levels[pixels]

    def _at(self, size: tuple[int, int], layout: Layout, tokens: Tokens) -> ck.LayoutBias | None:
        g = self.guidance
        bias = layout.bias(tokens, size, self.n_tokens, g.positive, g.negative, g.outside)
        return bias.to(self.unet.device) if bias.table.any() else None


class _Guided:
    """Takes the place of ``ck.cross_attention``, or of what stood in its place, in a guided step."""

    def __init__(self, guide: Guide, strength: float, inner: Callable[..., Tensor]):
        self.guide, self.strength, self.inner = guide, strength, inner

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Any = None, scale: float | None = None
    ) -> Tensor:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        layout = self.guide.bias(query, key, self.strength, scale)
        if bias is not None and layout is not None:
            raise ValueError("a layout and another attention bias or mask do not go together")
        return self.inner(query, key, value, bias=bias if layout is None else layout, scale=scale)


def noise_levels(scheduler: Any) -> list[float]:
    """σ = √((1−ᾱ)/ᾱ) at each of the scheduler's timesteps, and after the last; infinite where ᾱ is 0."""
    times = scheduler.timesteps.cpu()
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(times) + 1:
        return [float(sigma) for sigma in sigmas]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} tells no noise levels; use DDIMScheduler, say"
        )
    alphas = [float(a) for a in scheduler.alphas_cumprod.double().cpu()[times.long()]]
    alphas.append(float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
    return [math.sqrt((1 - a) / a) if a > 0 else math.inf for a in alphas]
