"""What a job does, by its kind. Every function takes the job and the run's folder, writes the job's files
there and returns its result: what JSON can hold.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

import customdiff_kernels as ck
import tinysd
from tinysd import world
from tinysd.presence import Presence

from .. import base
from ..base import embedded_captions
from ..concept import Concept
from ..config import ConceptConfig, TrainConfig
from ..data import read_pictures, replacing
from ..embedded_world import GUIDANCE_SCALE, write_concept, write_regularization
from ..generated import generate
from ..merging import merge as merge_concepts
from ..metrics import Clip, alignment, kid
from ..sampler import sample
from ..trainer import train as train_concept
from .files import path_of, result_of
from .plan import METHODS, Job
from .scenes import ALONE, TOGETHER, validation

BATCH = 8
VALIDATION_SEED = 7  # of real pictures that nothing is trained on
Result = dict[str, Any]

# once a process
load_base = cache(base.load_base)
load_clip = cache(lambda: Clip(tinysd.clip_path()))


# pictures


def _regularization(job: Job, out: Path) -> Result:
    write_regularization(path_of(job, out), job.settings["count"], seed=0)
    return {}


def _pictures(job: Job, out: Path) -> Result:
    s = job.settings
    write_concept(path_of(job, out), s["concept"], s["count"], s["seed"], s.get("scales", ("normal",)))
    return {}


def _generated(job: Job, out: Path) -> Result:
    """The base's own pictures of a category, as DreamBooth regularizes with."""
    started, prompt = time.perf_counter(), f"photo of a {job.settings['category']}"
    count, steps = job.settings["count"], job.settings["denoising"]
    generate(load_base(), prompt, count, path_of(job, out), steps, progress=False)
    return {"seconds": time.perf_counter() - started}


def _reference(job: Job, out: Path) -> Result:
    """What a concept's samples are measured by: the detector's limit, CLIP embeddings of real pictures."""
    concept = world.concepts()[job.settings["concept"]]
    clip, embeddings = load_clip(), {}
    for name, category in (("validation", concept.subject.category), ("unrelated", None)):
        real = [picture for picture, _ in validation(category, job.settings["count"], VALIDATION_SEED)]
        embeddings[name] = clip.image_embeddings(real).contiguous()
    with replacing(path_of(job, out)) as partial:
        save_file(embeddings, partial)
    return {"limit": Presence(concept.subject, _held_out(concept.name, job)).limit}


def _held_out(name: str, reference: Job) -> list[Image.Image]:
    made = world.concept_pictures(name, reference.settings["held_out"], VALIDATION_SEED)
    return [picture for picture, _ in made]


# concepts


def _train(job: Job, out: Path) -> Result:
    config = training_config(job, out, path_of(job, out))
    result = train_concept(config, load_base(), progress=False)
    generated = [other for other in job.needs if other.kind == "generated"]
    waited = sum(known(other, out, "seconds") for other in generated)
    return {
        "seconds": result.seconds + waited,
        "bytes": result.output.stat().st_size,
        "loss": statistics.fmean(result.losses[-20:]),
    }


def training_config(job: Job, out: Path, output: Path) -> TrainConfig:
    """The trainer's configuration of a job, whose needs are pictures, a regularization set, a concept."""
    settings, paths = job.settings, [path_of(other, out) for other in job.needs]
    kinds = [other.kind for other in job.needs]
    folders = [str(path) for path, kind in zip(paths, kinds, strict=True) if kind == "pictures"]
    sets = [str(p) for p, kind in zip(paths, kinds, strict=True) if kind in ("regularization", "generated")]
    regularization = sets[0] if sets else None
    options = dict(settings["options"])
    if settings.get("start_from"):
        options["start_from"] = str(paths[-1])
    each = [
        {
            "images": folder,
            "prompts": (f"photo of a {noun}", f"a photo of a {noun}", f"a {noun}"),
            "category": world.concepts()[name].subject.category,
            "captioned": settings.get("captioned", False),
            "modifier_token": word,
            "initializer_token": start,
            "regularization": regularization,
        }
        for folder, name, noun, (word, start) in zip(
            folders, settings["concepts"], settings["nouns"], settings["words"].items(), strict=True
        )
    ]
    if len(each) == 1:
        return TrainConfig(**each[0], **options, output=str(output), overwrite=True)
    concepts = tuple(ConceptConfig(**one) for one in each)
    return TrainConfig(concepts=concepts, **options, output=str(output), overwrite=True)


def _compress(job: Job, out: Path) -> Result:
    """Low-rank factors of a learned change; by `share` of the bytes of the file where that is asked for."""
    full = path_of(job.needs[0], out)
    concept, limits = Concept.load(full), dict(job.settings)
    size = full.stat().st_size
    if (share := limits.pop("share", None)) is not None:
        spent = size - sum(change.nbytes for change in concept.delta.values())
        limits["max_bytes"] = round(share * size) - 2 * spent
    delta = {} if limits.get("rank") == 0 else ck.compress(concept.delta, **limits)
    dataclasses.replace(concept, delta=delta).save(path_of(job, out))
    return {"bytes": path_of(job, out).stat().st_size}


def _merge(job: Job, out: Path) -> Result:
    concepts = [Concept.load(path_of(other, out)) for other in job.needs]
    base = load_base()
    started = time.perf_counter()
    words = [word for concept in concepts for word in concept.modifier_tokens]
    nouns = [f"a {word} {noun}" for word, noun in zip(words, job.settings["categories"], strict=True)]
    merged, report = merge_concepts(
        concepts,
        base,
        embedded_captions(job.settings["captions"]),
        together=[job.settings.get("together") or "photo of " + " and ".join(nouns)],
        padding=False,
    )
    merged.save(path_of(job, out))
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": path_of(job, out).stat().st_size, "drift": report.drift}


def _together(job: Job, out: Path) -> Result:
    """The words of Textual Inversion, learned apart, in one file: the base is the same for both."""
    concepts = [Concept.load(path_of(other, out)) for other in job.needs]
    words = {word: row for concept in concepts for word, row in concept.modifier_tokens.items()}
    dataclasses.replace(concepts[0], modifier_tokens=words).save(path_of(job, out))
    seconds = sum(known(other, out, "seconds") for other in job.needs)
    return {"seconds": seconds, "bytes": path_of(job, out).stat().st_size}


# figures


def _score(job: Job, out: Path) -> Result:
    """Samples of all prompts, and of captions without V*; their scores."""
    settings, trained = job.settings, job.needs[-1]
    concept = (
        None if trained.kind == "reference" else Concept.load(path_of(trained, out))
    )  # of the base: none
    categories = [world.concepts()[name].subject.category for name in settings["concepts"]]
    situations = _situations(job)
    prompts = [situation.text(settings["nouns"], categories) for situation in situations]
    pictures = _draw(prompts, concept, settings["denoising"], 1000 * settings["seed"])
    scores = _scores(job, out, pictures, [s.text(categories, categories) for s in situations])
    plain = concept and dataclasses.replace(concept, modifier_tokens={})
    reference = next(other for other in job.needs if other.kind == "reference")
    for name, category in (("validation", categories[0]), ("unrelated", None)):
        if count := settings[name]:
            captions = [caption for _, caption in validation(category, count, VALIDATION_SEED)]
            drawn = _draw(captions, plain, settings["denoising"], 1000 * settings["seed"])
            samples = load_clip().image_embeddings(drawn)
            scores[f"kid_{name}"] = kid(samples, load_file(path_of(reference, out))[name])[0]
    return scores


def _true(job: Job, out: Path) -> Result:
    """The same of true pictures of the same scenes."""
    subjects = [world.concepts()[name].subject for name in job.settings["concepts"]]
    rng = np.random.default_rng((VALIDATION_SEED, job.settings["seed"]))
    categories = [subject.category for subject in subjects]
    situations = _situations(job)
    pictures = [situation.draw(subjects, rng) for situation in situations]
    return _scores(job, out, pictures, [s.text(categories, categories) for s in situations])


def _situations(job: Job) -> list[Any]:
    chosen = ALONE if len(job.settings["concepts"]) == 1 else TOGETHER
    return [situation for situation in chosen for _ in range(job.settings["samples"])]


def _scores(job: Job, out: Path, pictures: list[Image.Image], texts: Sequence[str]) -> Result:
    """Alignment with the texts and with each concept's pictures, and what the detector sees."""
    clip = load_clip()
    features = clip.image_features(pictures)
    scores: Result = {"text": float((features * clip.text_features(texts)).sum(-1).mean())}
    own = [other for other in job.needs if other.kind == "pictures"]
    references = [other for other in job.needs if other.kind == "reference"]
    seen = []
    for i, name in enumerate(job.settings["concepts"]):
        concept = clip.image_features(read_pictures(path_of(own[i], out)))
        scores[f"image{i + 1}"] = float(alignment(features, concept).mean())
        limit = known(references[i], out, "limit")
        subject = world.concepts()[name].subject
        seen.append(Presence(subject, _held_out(name, references[i]), limit)(pictures))
        scores[f"seen{i + 1}"] = float(seen[-1].mean())
    scores["image"] = statistics.fmean(scores[f"image{i + 1}"] for i in range(len(seen)))
    scores["seen"] = float(np.all(seen, axis=0).mean())
    strip = np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
    with replacing(path_of(job, out)) as partial:
        Image.fromarray(strip).save(partial, format="png")
    return scores


def _timing(job: Job, out: Path) -> Result:
    """Seconds a step of each method: medians of rounds in which all take turns, after one to warm up."""
    base, steps = load_base(), job.settings["steps"]
    output = path_of(job, out)
    seconds: dict[str, list[float]] = {name: [] for name in job.settings["methods"]}
    for round_ in range(1 + job.settings["rounds"]):
        for name, settings in job.settings["methods"].items():
            settings = {**settings, "options": {**settings["options"], "steps": steps}}
            needs = [
                other
                for other in job.needs
                if other.kind == "pictures" or METHODS[name].regularization is not None
            ]
            timed = dataclasses.replace(job, settings=settings, needs=tuple(needs))
            config = training_config(timed, out, output)
            result = train_concept(config, base, progress=False)
            images = config.batch_size * (1 if config.regularization is None else 2)
            if round_:
                seconds[name].append(images / result.images_per_second)
    output.unlink()
    return {name: statistics.median(times) for name, times in seconds.items()}


def _draw(prompts: Sequence[str], concept: Concept | None, denoising: int, seed: int) -> list[Image.Image]:
    base = load_base()
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        chunk = list(prompts[start : start + BATCH])
        pictures += sample(
            base,
            chunk,
            concept,
            steps=denoising,
            guidance_scale=GUIDANCE_SCALE,
            seeds=[seed + start + i for i in range(len(chunk))],
            progress=False,
        )
    return pictures


def known(job: Job, out: Path, name: str) -> Any:
    """A figure of a job that this one needs, which has therefore ended."""
    result = result_of(job, out)
    assert result is not None, job.name
    return result[name]


KINDS: dict[str, Callable[[Job, Path], Result]] = {
    "regularization": _regularization,
    "pictures": _pictures,
    "generated": _generated,
    "reference": _reference,
    "train": _train,
    "compress": _compress,
    "merge": _merge,
    "together": _together,
    "score": _score,
    "true": _true,
    "timing": _timing,
}
