"""Sampling with concepts: the K/V of all layers once a prompt, then a UNet that reads text no more.

A row of the batch is a prompt with its own concept, or with none. All rows share the frozen UNet, so one pass
a step serves them all: a concept changes only its rows' keys and values, kv = c·W0ᵀ + (c·Vᵀ)·Uᵀ.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import customdiff_kernels as ck

from .attention import patched
from .concept import Concept
from .conditioning import Conditions, conditions, fitting, one_each, others_on
from .data import unscaled
from .guidance import Guide, LayoutGuidance, noise_levels
from .layouts import Layout
from .residual import Residual


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: str | Sequence[str],
    concepts: Concept | Sequence[Concept | None] | None = None,
    *,
    residuals: Mapping[str, Residual] | Sequence[Mapping[str, Residual] | None] | None = None,
    layouts: Layout | Sequence[Layout | None] | None = None,
    layout_guidance: LayoutGuidance | None = None,
    negative_prompt: str | None = None,
    steps: int = 50,
    guidance_scale: float = 6.0,
    guidance_rescale: float = 0.0,
    eta: float = 0.0,
    seeds: int | Sequence[int] = 0,
    size: tuple[int, int] | None = None,
    scheduler: Any = None,
    latents: Tensor | None = None,
    on_step: Callable[[int, Tensor], Tensor] | None = None,
    output: str = "pil",
    progress: bool = True,
) -> list[Image.Image] | Tensor:
    """One picture for each prompt, all in one batch, one UNet pass a step.

    Args:
        pipe: a StableDiffusionPipeline (1.x, 2.x or of that shape) or StableDiffusionXLPipeline of the base
            model, without a delta in it.
        prompts: with the modifier tokens of their concepts.
        concepts: one for each prompt, or one for all; None is the base model. Low-rank deltas stay factors.
        residuals: Cones 2's, {subject: its residual} for each prompt, or for all; a subject is a word of the
            prompt, "dog", or "dog#2" for its second dog (``find_subject``).
        layouts: where each prompt's subjects are to be, one for each prompt, or for all; None guides nothing.
        layout_guidance: how strongly and in which steps layouts guide; default: ``LayoutGuidance()``. The
            unconditional rows are never guided.
        guidance_scale: of classifier-free guidance against ``negative_prompt``; 1 runs without.
        guidance_rescale: from 0 to 1, how far the guided prediction's spread is brought back to that of the
            conditional one, which a large scale oversaturates (Lin et al., 2023, section 3.4, who take 0.7).
        negative_prompt: default: "", or for an SDXL that was trained so (``force_zeros_for_empty_prompt``)
            features of zero.
        eta: from 0, which is DDIM, to 1, which adds the noise of DDPM; for schedulers that know it.
        seeds: one a row; of an integer s, row i has s + i. A row does not depend on the others of its batch.
        size: (height, width) of the pictures; default: the base model's.
        scheduler: any diffusers scheduler (it is copied); default: DDIM with the pipeline's noise schedule.
        latents: (B,C,h,w) to start from in the place of the seeds' noise; they give the pictures' size.
        on_step: called after every step with its number, from 0, and the latents (B,C,h,w); returns those to
            go on with.
        output: "pil" (a list of images), "tensor" (B,3,H,W) in 0..1, or "latents" (B,C,h,w).

    A concept that changes more than keys and values (``others``) must be that of all rows; its changes are on
    the UNet for the call alone.
    Raises ValueError if a prompt lacks a subject or the modifier token of its concept, or a concept or a
    residual is of another base.
    """
    check_pipeline(pipe)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    concepts = one_each("concepts", concepts, len(prompts), (Concept, type(None)))
    seeds = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else seeds
    seeds = one_each("seeds", seeds, len(prompts), int)
    residuals = [row or {} for row in one_each("residuals", residuals, len(prompts), (Mapping, type(None)))]
    layouts = one_each("layouts", layouts, len(prompts), (Layout, type(None)))
    for row in residuals:
        for name, residual in row.items():
            if not isinstance(residual, Residual):
                raise TypeError(f"residuals[{name!r}] must be a Residual, got {type(residual).__name__}")
    layout_guidance = LayoutGuidance() if layout_guidance is None else layout_guidance
    if not isinstance(layout_guidance, LayoutGuidance):
        raise TypeError(f"layout_guidance must be a LayoutGuidance, got {type(layout_guidance).__name__}")
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    _check_numbers(output, steps, eta, guidance_scale, guidance_rescale)
    shape = (pipe.unet.config.in_channels, *latent_size(pipe, size))
    if latents is not None:
        if (latents.ndim, *latents.shape[:2]) != (4, len(prompts), shape[0]):
            raise ValueError(
                f"latents must be ({len(prompts)}, {shape[0]}, h, w), a row for each prompt, "
                f"got {tuple(latents.shape)}"
            )
        shape = tuple(latents.shape[1:])
    stack = ck.KVStack.from_unet(pipe.unet)
    concepts = fitting(pipe, stack, prompts, concepts)
    for residual in {id(r): r for row in residuals for r in row.values()}.values():
        residual.check_base(stack)
    given = conditions(
        pipe,
        stack,
        prompts,
        concepts,
        residuals,
        negative_prompt=negative_prompt,
        unconditional=guidance_scale != 1,
        pixels=(shape[1] * pipe.vae_scale_factor, shape[2] * pipe.vae_scale_factor),
    )
    scheduler = _ddim(pipe.scheduler) if scheduler is None else copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=pipe.unet.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if latents is None:
        latents = torch.stack([torch.randn(shape, generator=g) for g in generators])
    noise = latents.to(pipe.unet.device, torch.float32)
    with patched(pipe.unet), others_on(pipe.unet, concepts[0]):
        latents = denoise(
            pipe.unet,
            scheduler,
            noise,
            given,
            guidance_scale,
            eta,
            generators,
            guidance_rescale=guidance_rescale,
            guide=_guide(pipe, prompts, concepts, layouts, layout_guidance, given, scheduler, shape[1:]),
            on_step=on_step,
            progress=progress,
        )
    if output == "latents":
        return latents
    overflows = bool(given.added) and pipe.vae.dtype == torch.float16  # SDXL's
    images = decode(pipe.vae, latents, upcast=overflows and pipe.vae.config.get("force_upcast", False))
    return images if output == "tensor" else to_pil(images)


def denoise(
    unet: torch.nn.Module,
    scheduler: Any,
    noise: Tensor,
    given: Conditions,
    guidance_scale: float,
    eta: float,
    generators: list[torch.Generator],
    *,
    guidance_rescale: float = 0.0,
    guide: Guide | None = None,
    on_step: Callable[[int, Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """The reverse process from ``noise`` (B,C,h,w), in float32 whatever the UNet's dtype.

    ``given`` has B rows, or 2B with the unconditional ones first; so has ``guide``.
    """
    options: dict[str, Any] = {}
    accepted = inspect.signature(scheduler.step).parameters
    if "generator" in accepted:
        options["generator"] = generators
    if "eta" in accepted:
        options["eta"] = eta
    elif eta:
        raise ValueError(f"eta={eta}: {type(scheduler).__name__} has none; use DDIMScheduler, or eta=0")

    if guide is not None and guide.guidance.recurrence and "order" in accepted:
        options["order"] = 1  # as published: LMS' earlier derivatives are of noise that was redrawn since

    copies = given.context.shape[0] // noise.shape[0]

    def predicted(x: Tensor, t: Tensor) -> Tensor:
        out = unet(
            scheduler.scale_model_input(torch.cat([x] * copies), t).to(unet.dtype),
            t,
            encoder_hidden_states=given.context,
            cross_attention_kwargs={"kv": given.kv},
            added_cond_kwargs=given.added or None,
        ).sample.float()
        if copies == 1:
            return out
        unconditional, conditional = out.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        if guidance_rescale:
            spread = conditional.flatten(1).std(1) / guided.flatten(1).std(1)  # a row's own
            guided *= torch.lerp(torch.ones_like(spread), spread, guidance_rescale).view(-1, 1, 1, 1)
        return guided

    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(tqdm(scheduler.timesteps, desc="sampling", disable=not progress)):
        with nullcontext() if guide is None else guide.on(i):
            out = predicted(x, t)
            if guide is not None and guide.repeats(i):
                trial = copy.deepcopy(scheduler)  # steps may be remembered: the real one takes but one
                draws = {"generator": guide.for_trial(generators)} if "generator" in options else {}
                x_next = trial.step(out, t, x, **{**options, **draws}).prev_sample
                x = guide.back(x, x_next, i, scheduler, generators)
                out = predicted(x, t)
        x = scheduler.step(out, t, x, **options).prev_sample
        if on_step is not None:
            x = on_step(i, x)
    return x


def decode(vae: torch.nn.Module, latents: Tensor, *, upcast: bool = False) -> Tensor:
    """Pictures (B,3,H,W) in 0..1, float32; ``upcast``: decoded in float32 too, whatever the VAE's dtype."""
    latents, dtype = unscaled(vae, latents), vae.dtype
    if upcast:
        vae.float()
    try:
        return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
    finally:
        if upcast:
            vae.to(dtype)


def to_pil(images: Tensor) -> list[Image.Image]:
    """``images`` (B,3,H,W) in 0..1 as PIL images."""
    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def _guide(
    pipe: Any,
    prompts: Sequence[str],
    concepts: Sequence[Concept | None],
    layouts: Sequence[Layout | None],
    guidance: LayoutGuidance,
    given: Conditions,
    scheduler: Any,
    size: tuple[int, int],
) -> Guide | None:
    """What guides the rows of ``given`` in the steps of ``scheduler``; None where nothing does."""
    if not any(layouts):
        return None
    rows: list[Any] = [None] * (len(given.context) - len(prompts))  # the unconditional ones
    for prompt, concept, layout in zip(prompts, concepts, layouts, strict=True):
        words = list(concept.modifier_tokens) if concept else ()
        rows.append(layout and (layout, layout.check(prompt, pipe.tokenizer, words)))
    guide = Guide(pipe.unet, rows, given.context.shape[1], size, guidance, noise_levels(scheduler))
    return guide if any(guide.strengths) else None


def _ddim(scheduler: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler.config, clip_sample=False)  # latents are not bounded by 1


def _check_numbers(
    output: str, steps: int, eta: float, guidance_scale: float, guidance_rescale: float
) -> None:
    if output not in ("pil", "tensor", "latents"):
        raise ValueError(f"output must be 'pil', 'tensor' or 'latents', got {output!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 (DDIM) to 1 (DDPM), got {eta}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be from 0 (none) to 1 (all of it), got {guidance_rescale}")


def check_pipeline(pipe: Any) -> None:
    """TypeError unless ``pipe`` has the parts of a StableDiffusionPipeline."""
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not hasattr(pipe, part):
            raise TypeError(
                f"pipe must be a StableDiffusionPipeline, got {type(pipe).__name__} without {part}"
            )


def latent_size(pipe: Any, size: tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) of the latents for pictures of ``size`` (height, width), by default the base model's."""
    if size is None:
        side = pipe.unet.config.sample_size
        return (side, side) if isinstance(side, int) else tuple(side)
    factor = pipe.vae_scale_factor
    if len(size) != 2 or any(s % factor or s < factor for s in size):
        raise ValueError(f"size must be (height, width) in multiples of {factor}, got {size}")
    return size[0] // factor, size[1] // factor
