"""Regularization pictures that the base draws itself: DreamBooth's, and the paper's ablation of real ones."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import customdiff_kernels as ck

from .base import default_guidance, is_embedded
from .config import GENERATED, TrainConfig
from .data import beside, replacing
from .sampler import sample
from .views import Pictures, regularization

BATCH = 8
SETTINGS, CAPTIONS = "generated.json", "captions.csv"


def generate_missing(
    config: TrainConfig, pipeline: Any, pictures: Sequence[Pictures], accelerator: Any, progress: bool
) -> list[Pictures]:
    """`pictures`, with those that are to be generated, in folders beside the output (``folder_of``)."""
    found = []
    for number, (subject, each) in enumerate(zip(config.subjects, pictures, strict=True), 1):
        if subject.regularization == GENERATED:
            folder = folder_of(config, number)
            generate(
                pipeline,
                subject.regularization_prompt,
                config.generated_count,
                folder,
                config.generated_steps,
                config.seed,
                share=(accelerator.process_index, accelerator.num_processes),
                wait=accelerator.wait_for_everyone,
                progress=progress and accelerator.is_main_process,
            )
            accelerator.wait_for_everyone()
            paths, captions = regularization(str(folder), subject, config)
            each = dataclasses.replace(each, regularization=paths, captions=captions)
        found.append(each)
    return found


def folder_of(config: TrainConfig, number: int) -> Path:
    """Where the pictures of concept `number`, counted from 1, are generated."""
    return beside(Path(config.output), f"generated-{number}")


def generate(
    pipeline: Any,
    prompt: str,
    count: int,
    folder: Path,
    steps: int = 50,
    seed: int = 0,
    *,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], object] = lambda: None,
    progress: bool = True,
) -> None:
    """`count` pictures of the base for `prompt` in `folder`, captioned: by DDPM's sampler (η = 1).

    What is there already of the same settings stays; so it goes on where it was stopped. `share`: the part
    that this process draws, and of how many; `wait`: for the others. All draw, since a process that waited
    for another's two hundred pictures would run into the time limit of collectives.

    Raises ValueError if the folder holds pictures of other settings, or others' files.
    """
    settings = {"prompt": prompt, "steps": steps, "seed": seed}
    settings["base_hash"] = ck.KVStack.from_unet(pipeline.unet).hash()
    index, parts = share
    if index == 0:
        _claim(folder, settings)
    wait()
    names = [f"{number:04}.png" for number in range(count)]
    missing = [number for number in range(index, count, parts) if not (folder / names[number]).is_file()]
    guidance = default_guidance(is_embedded(pipeline.name_or_path or ""))
    bar = tqdm(total=len(missing), desc=f"generating {prompt!r}", unit="image", disable=not progress)
    with bar:
        for first in range(0, len(missing), BATCH):
            numbers = missing[first : first + BATCH]
            made = sample(
                pipeline,
                [prompt] * len(numbers),
                steps=steps,
                guidance_scale=guidance,
                eta=1.0,
                seeds=[seed + number for number in numbers],
                progress=False,
            )
            for number, picture in zip(numbers, made, strict=True):
                with replacing(folder / names[number]) as partial:
                    picture.save(partial, "png")
            bar.update(len(numbers))
    wait()
    if index == 0:
        with replacing(folder / CAPTIONS) as partial, open(partial, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([("file", "caption"), *((name, prompt) for name in names)])


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes `folder` for pictures of these `settings`; ValueError where it holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / SETTINGS
    if any(folder.iterdir()) and not (note.is_file() and json.loads(note.read_text()) == settings):
        raise ValueError(
            f"{str(folder)!r} holds other files than pictures generated for {settings['prompt']!r} in "
            f"{settings['steps']} steps from this base; move it away, or name another output"
        )
    with replacing(note) as partial:
        partial.write_text(json.dumps(settings))
