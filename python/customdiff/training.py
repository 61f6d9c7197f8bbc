"""Custom Diffusion's training step (section 3.1): one stacked K/V matrix and V* are learned.

All cross-attention layers' keys and values are one matrix W. A step is: text features c of the prompts, one
projection ``kv = c Wᵀ`` for all layers, the frozen UNet on noisy latents with views of ``kv``, the loss on
the concepts' pictures plus ``prior_weight`` times that on the regularization pictures. Latents, and the text
features of prompts without a V* that trains, are computed once.

Every process draws the same numbers for the whole step and takes its part of the pictures: the result does
not depend on how many there are, nor on how many passes each takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import customdiff_kernels as ck

from . import data
from .base import EMBEDDED, is_embedded
from .concept import Concept, TextFeatures, added_conditions, text_encoders
from .config import GENERATED, TrainConfig
from .learned import Learned
from .modifier import initial_rows
from .texts import Texts, joined
from .views import Pictures, Views, choose, content_hash, read_pixels


class Batch(NamedTuple):
    """The draws of a step: B pictures of concepts, then P of regularization."""

    views: Tensor  # (B,)
    prompts: list[str]  # B, with their words of size
    prior: Tensor  # (P,)
    dropped: Tensor  # (P,) whether the caption is left empty
    posterior: Tensor  # (B+P,c,h,w) normal, for the autoencoder's samples
    noise: Tensor  # (B+P,c,h,w) normal
    timesteps: Tensor  # (B+P,)
    captions: Tensor  # (C,) texts in which Cones 2 preserves the other tokens

    def part(self, index: int, count: int) -> Batch:
        """Part `index` of `count`: of both kinds of pictures its share."""
        concept = torch.arange(len(self.views)).tensor_split(count)[index]
        prior = torch.arange(len(self.prior)).tensor_split(count)[index]
        both = torch.cat([concept, len(self.views) + prior])
        return Batch(
            self.views[concept],
            [self.prompts[i] for i in concept],
            self.prior[prior],
            self.dropped[prior],
            self.posterior[both],
            self.noise[both],
            self.timesteps[both],
            self.captions.tensor_split(count)[index],
        )


class Training:
    """A run in progress on a patched, frozen base: parameters, an optimizer, a generator of all draws.

    ``release`` gives the base its weights back where others than keys and values trained.
    """

    frozen_tokens = 1  # the start token: Custom Diffusion lets no gradient through its keys and values

    def __init__(
        self,
        config: TrainConfig,
        pipeline: Any,
        pictures: Sequence[Pictures],
        accelerator: Any = None,
        start: Concept | None = None,
    ):
        from diffusers import DDPMScheduler

        self.config, self.pipeline, self.steps_done = config, pipeline, 0
        self.accelerator = accelerator or new_accelerator(config, pipeline.unet.device)
        parts = self.accelerator.num_processes * config.accumulation
        if parts > config.batch_size:
            raise ValueError(
                f"batch_size must be at least the {self.accelerator.num_processes} processes times "
                f"accumulation={config.accumulation}, got {config.batch_size}"
            )
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction = self.scheduler.config.prediction_type
        self.device = pipeline.unet.device
        source = pipeline.name_or_path or config.base or "unnamed"
        self.embedded = is_embedded(source)
        self.base_name = EMBEDDED if self.embedded else Path(source).resolve().name
        self.generator = torch.Generator().manual_seed(config.seed)
        self.resolution = _resolution(config, pipeline)

        self.learned: Any = self._new_learned(start)
        try:
            self.optimizer = self.accelerator.prepare(_optimizer(config, self.learned, self.device))
            with self.accelerator.autocast():  # texts first: a bad one fails before the pictures are encoded
                self.texts: Any = self._new_texts(pictures)
            self._read_pictures(pictures)
        except BaseException:
            self.release()
            raise

    def _new_learned(self, start: Concept | None) -> Learned:
        return Learned(self.config, self.pipeline, start)

    def _new_texts(self, pictures: Sequence[Pictures]) -> Texts:
        captions = [caption for each in pictures for caption in each.captions]
        learned, prompts = self.learned, [each.prompts for each in pictures]
        return Texts(self.config, self.pipeline, learned.rows, learned.kept, captions, prompts)

    def _read_pictures(self, pictures: Sequence[Pictures]) -> None:
        """Encodes all pictures, as often as they are drawn from."""
        config, pipeline = self.config, self.pipeline
        pixels = [read_pixels(each.concept, self.resolution, config.crop) for each in pictures]
        prior = [
            read_pixels(each.regularization, self.resolution, config.crop)
            for each in pictures
            if each.regularization
        ]
        texts = [texts for each in pictures for texts in (each.prompts, each.captions)]
        self.pictures_hash = content_hash([*pixels, *prior], texts)
        self.views = Views(config, pixels, pipeline.vae, self.generator)
        self.prior_latents = data.encode(pipeline.vae, torch.cat(prior)) if prior else None
        ends = torch.tensor([0, *map(len, prior)]).cumsum(0).tolist()
        self.prior = [range(start, stop) for start, stop in zip(ends, ends[1:], strict=False)]

    @property
    def images_per_step(self) -> int:
        return self.config.batch_size * (1 if self.prior_latents is None else 2)

    def step(self) -> float:
        """One step of the optimizer; returns its loss, of all processes."""
        accelerator, passes = self.accelerator, self.config.accumulation
        batch, total = self.draw(), torch.zeros((), device=self.device)
        sizes = len(batch.views), len(batch.prior)
        for i in range(passes):
            share = batch.part(accelerator.process_index * passes + i, accelerator.num_processes * passes)
            loss = self.loss(share, *sizes)
            accelerator.backward(loss)
            total += loss.detach()
        for parameter in self.learned.parameters():
            if parameter.grad is None:  # V* of a concept that this part of the step has not
                parameter.grad = torch.zeros_like(parameter)
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "sum")
            parameters = self.learned.parameters()
            grads = [parameter.grad.flatten() for parameter in parameters]
            whole = accelerator.reduce(torch.cat(grads), "sum").split([len(grad) for grad in grads])
            for parameter, grad in zip(parameters, whole, strict=True):
                parameter.grad = grad.view_as(parameter)
        rates = dict(zip(("weights", "rows"), self.rates(self.steps_done), strict=True))
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["of"]]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return float(total)

    def rates(self, step: int) -> tuple[float, float]:
        """The learning rates of the weights and of V* at a step, counted from 0."""
        return self.config.rates(step, self.embedded)

    def draw(self) -> Batch:
        """The next step's draws, on the CPU: alike on every device and in every process."""
        config, generator, count = self.config, self.generator, self.config.batch_size
        turns = torch.arange(count) + self.steps_done * count  # of the concepts, and of their regularization
        concepts = turns % len(config.subjects)
        views = self.views.draw(concepts, generator)
        texts = choose([range(len(prompts)) for prompts in self.texts.of_concepts], concepts, generator)
        drawn = zip(concepts.tolist(), texts.tolist(), views.tolist(), strict=True)
        prompts = [self._prompt(concept, text, view) for concept, text, view in drawn]
        none = torch.zeros(0, dtype=torch.long)
        prior, dropped = none, none.bool()
        if self.prior_latents is not None:
            prior = choose(self.prior, turns % len(self.prior), generator)
            dropped = torch.rand(count, generator=generator) < config.caption_dropout
        shape = (count + len(prior), *self.views.latents.mean.shape[1:])
        posterior, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (shape[0],), generator=generator)
        return Batch(views, prompts, prior, dropped, posterior, noise, timesteps, none)

    def _prompt(self, concept: int, text: int, view: int) -> str:
        if (other := self.views.other[view]) is not None:
            return self.texts.of_two(concept, other)
        number = self.views.picture[view] if self.config.subjects[concept].captioned else text
        return self.texts.prompt(concept, number, self.views.words[view])

    def loss(self, batch: Batch, concepts: int, prior: int) -> Tensor:
        """What a part of a step adds to its loss: the mean over all `concepts` pictures plus the weighted
        mean over all `prior` ones.
        """
        count = len(batch.views)
        latents = self.views.latents.at(batch.views, batch.posterior[:count])
        masks = None if self.views.masks is None else self.views.masks[batch.views.to(self.device)]
        with self.accelerator.autocast():
            text = self.texts.of_prompts(batch.prompts)
            if len(batch.prior):
                latents = torch.cat([latents, self.prior_latents.at(batch.prior, batch.posterior[count:])])
                text = joined(text, self.texts.of_captions(batch.prior, batch.dropped))
                if masks is not None:
                    masks = torch.cat([masks, masks.new_ones(len(batch.prior), *masks.shape[1:])])
            losses = self._losses(latents, text, batch.noise, batch.timesteps, masks)
        loss = losses[:count].sum() / concepts
        if prior:
            loss = loss + self.config.prior_weight * losses[count:].sum() / prior
        return loss

    def _losses(
        self,
        latents: Tensor,
        text: TextFeatures,
        noise: Tensor,
        timesteps: Tensor,
        masks: Tensor | None = None,
    ) -> Tensor:
        """The weighted squared error (B,) of the UNet (paper, eq. 2), where the masks (B,1,h,w) are 1."""
        latents = data.scaled(self.pipeline.vae, latents)
        noise, timesteps = noise.to(latents), timesteps.to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        output = self._predict(noisy, timesteps, text)
        v = self.prediction == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if v else noise
        errors = F.mse_loss(output, target, reduction="none").mean(1, keepdim=True)
        if masks is None:
            losses = errors.flatten(1).mean(1)
        else:
            losses = (errors * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)
        return losses if self.config.min_snr_gamma is None else losses * self._snr_weight(timesteps, v)

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: TextFeatures) -> Tensor:
        unet, learned = self.pipeline.unet, self.learned
        kv = ck.kv_project(text.context, learned.weight, frozen_tokens=self.frozen_tokens)
        if not torch.is_autocast_enabled(self.device.type):
            kv = kv.to(unet.dtype)
        return unet(
            noisy.to(unet.dtype),
            timesteps,
            encoder_hidden_states=text.context.to(unet.dtype),
            cross_attention_kwargs={"kv": ck.KVStack(learned.weight, learned.base.segments).views(kv)},
            added_cond_kwargs=added_conditions(self.pipeline, text, (self.resolution, self.resolution)),
        ).sample.float()

    def _snr_weight(self, timesteps: Tensor, v: bool) -> Tensor:
        """min(SNR, γ) on the error in x0, for a loss that is written in v or ε (Hang et al., 2023)."""
        alpha = self.scheduler.alphas_cumprod.to(self.device)[timesteps]
        snr = alpha / (1 - alpha)
        return snr.clamp(max=self.config.min_snr_gamma) / (snr + 1 if v else snr)

    def concept(self) -> Any:
        """What was learned so far: a ``Concept``."""
        return self.learned.concept(self._metadata())

    def for_sampling(self) -> dict[str, Any]:
        """The options of ``sample`` that draw with what was learned so far."""
        # the other weights that train are on the UNet already
        concept = self.learned.concept(self._metadata(), others=False)
        return {"concepts": concept if concept.delta or concept.modifier_tokens else None}

    def _metadata(self) -> dict[str, Any]:
        prompts = [prompt for subject in self.config.subjects for prompt in subject.prompts]
        return {
            "base_name": self.base_name,
            "resolution": self.resolution,
            "prompt": prompts[0],
            "prompts": prompts,
            "step": self.steps_done,
            "training": asdict(self.config),
        }

    def release(self) -> None:
        """Gives the base its weights back."""
        self.learned.release()


def check_base(config: TrainConfig, pipeline: Any) -> None:
    """Raises ValueError for what the base cannot do, before any picture is drawn or encoded."""
    prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"base predicts {prediction!r}; the trainer knows 'epsilon' and 'v_prediction'")
    _resolution(config, pipeline)
    if any(subject.regularization == GENERATED for subject in config.subjects):
        initial_rows(config, pipeline)  # as the run itself does soon where nothing is drawn first


def new_accelerator(config: TrainConfig, device: torch.device) -> Any:
    """accelerate's view of this process: mixed precision, the other processes, trackers."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.tracking import get_available_trackers

    if config.log_with and config.log_with not in get_available_trackers():
        raise ValueError(f"log_with={config.log_with!r} needs its package: pip install {config.log_with}")
    # else a second run in one process could have neither another precision nor another device
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not several)
    folder = data.beside(Path(config.output), "logs")
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=config.mixed_precision,
        log_with=config.log_with,
        project_dir=str(folder) if config.log_with else None,
    )


def _optimizer(config: TrainConfig, learned: Learned, device: torch.device) -> torch.optim.Optimizer:
    groups = [group for group in learned.groups() if group["params"]]
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "optimizer 'adamw8bit' needs bitsandbytes: pip install bitsandbytes, or choose 'adamw'"
            ) from error
        return AdamW8bit(groups, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda"))


def _resolution(config: TrainConfig, pipeline: Any) -> int:
    factor, size = pipeline.vae_scale_factor, pipeline.unet.config.sample_size
    resolution = config.resolution or factor * (size if isinstance(size, int) else min(size))
    if resolution % factor:
        raise ValueError(f"resolution must be a multiple of {factor}, got {resolution}")
    return resolution


@contextmanager
def frozen(pipeline: Any) -> Iterator[None]:
    """No gradient for the base's weights and no dropout in it within; every flag is put back."""
    models = (pipeline.unet, pipeline.vae, *(encoder for _, encoder in text_encoders(pipeline)))
    training = [(module, module.training) for model in models for module in model.modules()]
    gradients = [(weight, weight.requires_grad) for model in models for weight in model.parameters()]
    try:
        for model in models:
            model.requires_grad_(False).eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for weight, flag in gradients:
            weight.requires_grad_(flag)
