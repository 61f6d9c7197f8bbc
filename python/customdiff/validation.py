"""What can be watched of a run: loss and rates in a tracker, and pictures drawn on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from .base import default_guidance
from .data import beside, replacing
from .sampler import sample
from .sheet import contact_sheet
from .training import Training

DENOISING_STEPS = 25


class Validation:
    """A context for a run: after each step it logs, and every so many it draws the validation prompts.

    Pictures go into a folder beside the output, NAME.validation, and to the trackers. They draw nothing from
    the run's own generator: with them or without, the run is the same.
    """

    def __init__(self, training: Training, output: Path):
        self.training, self.config = training, training.config
        self.folder = beside(output, "validation")

    def __enter__(self) -> Validation:
        if self.config.log_with:
            settings = dataclasses.asdict(self.config)
            plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in settings.items()}
            self.training.accelerator.init_trackers("customdiff", config=plain)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.config.log_with:
            for tracker in self.training.accelerator.trackers:
                tracker.finish()

    def after_step(self, loss: float) -> None:
        training, done = self.training, self.training.steps_done
        if not training.accelerator.is_main_process:
            return
        if self.config.log_with:
            weights, rows = training.rates(done - 1)
            values = {"loss": loss, "learning_rate": weights, "embedding_learning_rate": rows}
            training.accelerator.log(values, step=done)
        if self.config.validation_prompts and done % self.config.validation_every == 0:
            self._draw(done)

    def _draw(self, done: int) -> None:
        training, prompts = self.training, list(self.config.validation_prompts)
        pictures = sample(
            training.pipeline,
            prompts,
            **training.for_sampling(),
            steps=DENOISING_STEPS,
            guidance_scale=default_guidance(training.embedded),
            seeds=self.config.seed,
            progress=False,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / f"{done:06}.png") as partial:
            contact_sheet(
                [(prompt, [picture]) for prompt, picture in zip(prompts, pictures, strict=True)]
            ).save(partial, "png")
        for tracker in training.accelerator.trackers if self.config.log_with else ():
            images = np.stack([np.asarray(picture) for picture in pictures])
            if tracker.name == "tensorboard":
                tracker.writer.add_images("validation", images, done, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb

                drawn = [
                    wandb.Image(image, caption=text) for image, text in zip(images, prompts, strict=True)
                ]
                tracker.log({"validation": drawn}, step=done)
