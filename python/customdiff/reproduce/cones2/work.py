"""What the jobs of the plan do, by their kind, beside those of ``reproduce.work``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tinysd import world
from tinysd.presence import Presence

from ...concept import Concept
from ...config import TrainConfig
from ...data import read_pictures, replacing
from ...guidance import LayoutGuidance
from ...layouts import Layout
from ...metrics import alignment
from ...residual import Residual
from ...sampler import sample
from ...trainer import train
from ..files import path_of
from ..plan import Job
from ..work import BATCH, VALIDATION_SEED, Result, known, load_base, load_clip
from .plan import METHODS
from .scenes import boxes, cut, prompt, subject_names, true_picture


def _detector(job: Job, out: Path) -> Result:
    """How far from a subject's true pictures its colours may be."""
    return {"limit": _presence(job).limit}


def _presence(detector: Job, limit: float | None = None) -> Presence:
    name = detector.settings["concept"]
    made = world.concept_pictures(name, detector.settings["held_out"], VALIDATION_SEED)
    return Presence(world.concepts()[name].subject, [picture for picture, _ in made], limit)


def _residual(job: Job, out: Path) -> Result:
    (pictures,) = job.needs
    config = TrainConfig(
        method="cones2",
        images=str(path_of(pictures, out)),
        category=world.concepts()[job.settings["concept"]].subject.category,
        captioned=True,
        output=str(path_of(job, out)),
        overwrite=True,
        **job.settings["options"],
    )
    result = train(config, load_base(), progress=False)
    loss = statistics.fmean(result.losses[-20:])
    return {"seconds": result.seconds, "bytes": result.output.stat().st_size, "loss": loss}


def _compose(job: Job, out: Path) -> Result:
    """Pictures of one combination by one method, and what is seen in them."""
    settings, names = job.settings, job.settings["subjects"]
    places = [place for place in world.BACKGROUNDS for _ in range(settings["samples"])]
    pictures = _true(job, places) if settings["method"] == "true" else _drawn(job, out, places)
    strip = np.concatenate([np.asarray(picture) for picture in pictures], axis=1)
    with replacing(path_of(job, out)) as partial:
        Image.fromarray(strip).save(partial, format="png")
    own = dict(zip(names, (other for other in job.needs if other.kind == "detector"), strict=True))
    detectors = {name: _presence(other, known(other, out, "limit")) for name, other in own.items()}
    clip = load_clip()
    plain = [subject.category for subject in (world.concepts()[name].subject for name in names)]
    features = clip.image_features(pictures)
    texts = clip.text_features([prompt(plain, place) for place in places])
    photos = [read_pictures(path_of(other, out)) for other in job.needs if other.kind == "pictures"]
    image = [float(alignment(features, clip.image_features(some)).mean()) for some in photos]
    parts = {
        name: [cut(picture, box) for picture in pictures]
        for name, box in zip(names, boxes(len(names), METHODS[settings["method"]].backwards), strict=True)
    }
    placed = [detectors[name](parts[name]) for name in names]
    categories = [[colours is not None for colours in detectors[name].colours(parts[name])] for name in names]
    result: Result = {
        "count": len(pictures),
        "text": float((features * texts).sum(-1).mean()),
        "image": statistics.fmean(image),
        "in_region": [float(seen.mean()) for seen in placed],
        "all_in_region": float(np.all(placed, axis=0).mean()),
        "categories_in_region": float(np.all(categories, axis=0).mean()),
    }
    if len(names) > 1:
        result["leakage"] = _leakage(detectors, parts)
    if len(set(plain)) == len(plain):  # else a category does not tell which of two is meant
        result["seen"] = float(np.all([detectors[name](pictures) for name in names], axis=0).mean())
    return result


def _leakage(detectors: dict[str, Presence], parts: dict[str, list[Image.Image]]) -> float:
    """The share of the pixels of the right category in each region that are more like another subject's.

    NaN where no region holds its category.
    """
    shares = []
    for name, detector in detectors.items():
        for colours in detector.colours(parts[name]):
            if colours is not None:
                own = detector.likeness(colours)
                others = [other.likeness(colours) for key, other in detectors.items() if key != name]
                shares.append(float((np.max(others, axis=0) > own).mean()))
    return statistics.fmean(shares) if shares else float("nan")


def _true(job: Job, places: Sequence[str]) -> list[Image.Image]:
    rng = np.random.default_rng(VALIDATION_SEED)
    subjects = [world.concepts()[name].subject for name in job.settings["subjects"]]
    return [true_picture(subjects, place, rng) for place in places]


def _drawn(job: Job, out: Path, places: Sequence[str]) -> list[Image.Image]:
    settings, how = job.settings, METHODS[job.settings["method"]]
    nouns = subject_names(settings["nouns"])
    files = [path_of(other, out) for other in job.needs if other.kind in ("residual", "train", "merge")]
    concept, residuals = None, {}
    if how.made_by == "residual":
        residuals = dict(zip(nouns, map(Residual.load, files), strict=True))
    elif how.made_by is not None:
        concept = Concept.load(files[0])
    layout, guidance = None, None
    if how.layout:
        layout = Layout(dict(zip(nouns, boxes(len(nouns), how.backwards), strict=True)))
        guidance = LayoutGuidance(**settings["guidance"])
    pictures: list[Image.Image] = []
    for start in range(0, len(places), BATCH):
        chunk = places[start : start + BATCH]
        pictures += sample(
            load_base(),
            [prompt(settings["nouns"], place) for place in chunk],
            concept,
            residuals=residuals,
            layouts=layout,
            layout_guidance=guidance,
            steps=settings["denoising"],
            guidance_scale=settings["guidance_scale"],
            seeds=[start + i for i in range(len(chunk))],
            progress=False,
        )
    return pictures


KINDS: dict[str, Callable[[Job, Path], Result]] = {
    "detector": _detector,
    "residual": _residual,
    "compose": _compose,
}
