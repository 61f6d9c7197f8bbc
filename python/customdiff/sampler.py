"""Sampling with concepts: the K/V of all layers once a prompt, then a UNet that reads text no more.

A row of the batch is a prompt with its own concept, or with none. All rows share the frozen UNet, so one pass
a step serves them all: a concept changes only its rows' keys and values, kv = c·W0ᵀ + (c·Vᵀ)·Uᵀ.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import customdiff_kernels as ck

from .attention import patched
from .concept import Concept, added_conditions, encode_prompts
from .data import unscaled


@torch.no_grad()
def sample(
    pipe: Any,
    prompts: str | Sequence[str],
    concepts: Concept | Sequence[Concept | None] | None = None,
    *,
    negative_prompt: str | None = None,
    steps: int = 50,
    guidance_scale: float = 6.0,
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
        guidance_scale: of classifier-free guidance against ``negative_prompt``; 1 runs without.
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
    Raises ValueError if a prompt lacks the modifier token of its concept, or a concept is of another base.
    """
    check_pipeline(pipe)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    concepts = one_each("concepts", concepts, len(prompts), (Concept, type(None)))
    seeds = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else seeds
    seeds = one_each("seeds", seeds, len(prompts), int)
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    if output not in ("pil", "tensor", "latents"):
        raise ValueError(f"output must be 'pil', 'tensor' or 'latents', got {output!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 (DDIM) to 1 (DDPM), got {eta}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    shape = (pipe.unet.config.in_channels, *latent_size(pipe, size))
    if latents is not None:
        if (latents.ndim, *latents.shape[:2]) != (4, len(prompts), shape[0]):
            raise ValueError(
                f"latents must be ({len(prompts)}, {shape[0]}, h, w), a row for each prompt, "
                f"got {tuple(latents.shape)}"
            )
        shape = tuple(latents.shape[1:])
    stack = ck.KVStack.from_unet(pipe.unet)
    others = [concept for concept in _distinct(concepts) if concept.others]
    if others and any(concept is not others[0] for concept in concepts):
        raise ValueError(
            f"concept {others[0]} changes {len(others[0].others)} weights beside keys and values, which all "
            "rows share: sample its prompts without other concepts, and without rows that have none"
        )
    known = {id(c): c.of(pipe.unet if c.others else stack) for c in _distinct(concepts)}
    concepts = [concept and known[id(concept)] for concept in concepts]
    for prompt, concept in zip(prompts, concepts, strict=True):
        if concept is not None:
            concept.check_prompt(prompt)

    if guidance_scale != 1:  # the unconditional rows come first, each with its own row's concept
        prompts, concepts = [negative_prompt or ""] * len(prompts) + prompts, concepts * 2
    rows = [concept.modifier_tokens if concept else {} for concept in concepts]
    features = encode_prompts(pipe, prompts, rows)
    if negative_prompt is None and pipe.config.get("force_zeros_for_empty_prompt"):
        for part in features:  # context and pooled
            part[: len(prompts) - len(seeds)] = 0
    context = features.context.to(pipe.unet.dtype)
    pixels = (shape[1] * pipe.vae_scale_factor, shape[2] * pipe.vae_scale_factor)
    added = added_conditions(pipe, features, pixels)
    kv = stack.views(project(stack, context, concepts))

    scheduler = _ddim(pipe.scheduler) if scheduler is None else copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=pipe.unet.device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if latents is None:
        latents = torch.stack([torch.randn(shape, generator=g) for g in generators])
    noise = latents.to(pipe.unet.device, torch.float32)
    with patched(pipe.unet), _others_on(pipe.unet, concepts[0]):
        latents = denoise(
            pipe.unet,
            scheduler,
            noise,
            context,
            kv,
            guidance_scale,
            eta,
            generators,
            added,
            on_step=on_step,
            progress=progress,
        )
    if output == "latents":
        return latents
    overflows = features.pooled is not None and pipe.vae.dtype == torch.float16  # SDXL's
    images = decode(pipe.vae, latents, upcast=overflows and pipe.vae.config.get("force_upcast", False))
    return images if output == "tensor" else to_pil(images)


def denoise(
    unet: torch.nn.Module,
    scheduler: Any,
    noise: Tensor,
    context: Tensor,
    kv: dict[str, tuple[Tensor, Tensor]],
    guidance_scale: float,
    eta: float,
    generators: list[torch.Generator],
    added: dict[str, Tensor] | None = None,
    *,
    on_step: Callable[[int, Tensor], Tensor] | None = None,
    progress: bool = False,
) -> Tensor:
    """The reverse process from ``noise`` (B,C,h,w), in float32 whatever the UNet's dtype.

    ``context``, ``kv`` and ``added`` (``added_conditions``) have B rows, or 2B with the unconditional ones
    first.
    """
    options: dict[str, Any] = {}
    accepted = inspect.signature(scheduler.step).parameters
    if "generator" in accepted:
        options["generator"] = generators
    if "eta" in accepted:
        options["eta"] = eta
    elif eta:
        raise ValueError(f"eta={eta}: {type(scheduler).__name__} has none; use DDIMScheduler, or eta=0")

    copies = context.shape[0] // noise.shape[0]
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(tqdm(scheduler.timesteps, desc="sampling", disable=not progress)):
        x_in = scheduler.scale_model_input(torch.cat([x] * copies), t).to(unet.dtype)
        out = unet(
            x_in,
            t,
            encoder_hidden_states=context,
            cross_attention_kwargs={"kv": kv},
            added_cond_kwargs=added or None,
        ).sample.float()
        if copies == 2:
            unconditional, conditional = out.chunk(2)
            out = unconditional + guidance_scale * (conditional - unconditional)
        x = scheduler.step(out, t, x, **options).prev_sample
        if on_step is not None:
            x = on_step(i, x)
    return x


def project(stack: ck.KVStack, context: Tensor, concepts: Sequence[Concept | None]) -> Tensor:
    """Keys and values (B,S,R) of all layers, row i by the weights of ``concepts[i]``, never built."""
    kv = ck.kv_project(context, stack.weight)
    columns = {name: slice(start, stop) for name, start, stop in stack.segments}
    for concept in _distinct(concepts):
        rows = [i for i, other in enumerate(concepts) if other is concept]
        delta = concept.delta
        low_rank = isinstance(delta, ck.LowRankDelta)
        for name, factors in (delta.factors if low_rank else {n: (w,) for n, w in delta.items()}).items():
            change = context[rows]
            for factor in reversed(factors):  # (c·Vᵀ)·Uᵀ, or c·ΔWᵀ
                change = change @ factor.to(change).T
            kv[rows, :, columns[name]] += change
    return kv


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


def _ddim(scheduler: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler.config, clip_sample=False)  # latents are not bounded by 1


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


def _others_on(unet: torch.nn.Module, concept: Concept | None) -> Any:
    """The concept's changes beside keys and values on the UNet, and off again."""
    if concept is None or not concept.others:
        return contextlib.nullcontext()
    return ck.applied(unet, {name: change.to(unet.device) for name, change in concept.others.items()})


def _distinct(concepts: Sequence[Concept | None]) -> list[Concept]:
    return list({id(concept): concept for concept in concepts if concept is not None}.values())


def one_each(name: str, given: Any, count: int, kind: Any) -> list:
    """``given`` as a list of ``count`` entries of type ``kind``, repeated where it is one of these itself."""
    given = [given] * count if isinstance(given, kind) else list(given)
    if len(given) != count:
        raise ValueError(
            f"{name} has {len(given)} entries for {count} prompts; give one each, or one for all"
        )
    for item in given:
        if not isinstance(item, kind):
            raise TypeError(f"{name} has an entry of type {type(item).__name__}")
    return given
