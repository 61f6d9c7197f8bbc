"""What is reproduced: the methods, how much work each is given, and the jobs that it takes.

The only place for numbers of steps, of pictures and for learning rates. The rates were chosen on the concepts
that ``tinysd.world`` keeps for tuning, with other prompts than those of ``scenes``.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tinysd
from tinysd import world

from .scenes import ALONE, TOGETHER

# Seconds of a core, for the time left: a picture's denoising step, its training step, that of all weights.
SAMPLING, TRAINING, WHOLE = 0.031, 0.039, 0.065
WORDS = {"<new1>": "ktn", "<new2>": "pll"}  # V* of a pair's concepts, and the rare words that they start from


@dataclass(frozen=True)
class Effort:
    """How much work a run does; the default is what the report shows."""

    pairs: tuple[tuple[str, str], ...] = (("teal_dog", "lilac_cat"), ("lime_car", "maroon_cup"))
    seeds: tuple[int, ...] = (0, 1)
    pictures: int = 6  # of a concept
    held_out: int = 24  # true pictures of it, by which the detector knows it
    regularization: int = 200  # real pictures, of random subjects
    generated: int = 64  # pictures of a category by the base, where they regularize
    generated_steps: int = 20  # denoising steps of each
    steps: int = 180
    samples: int = 3  # a prompt of one concept
    samples_together: int = 4  # a prompt of two
    validation: int = 40  # samples of a category without V*, for KID
    unrelated: int = 16  # samples of captions of anything, for KID
    reference: int = 400  # real pictures to compare either with
    denoising: int = 10
    captions: int = 1000  # of the merge
    timed_steps: int = 8
    timed_rounds: int = 5


QUICK = Effort(
    pairs=(("teal_dog", "maroon_cup"),),
    seeds=(0,),
    pictures=2,
    held_out=2,
    regularization=4,
    generated=2,
    generated_steps=1,
    steps=2,
    samples=1,
    samples_together=1,
    validation=2,
    unrelated=2,
    reference=4,
    denoising=1,
    captions=300,
    timed_steps=1,
    timed_rounds=1,
)


@dataclass(frozen=True)
class Method:
    """One way to learn a concept: how it differs from ours, in fields of ``TrainConfig``."""

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: float = 1.0  # times those of ours
    regularization: str | None = "real"  # "real", "generated" or None
    category: bool = True  # whether prompts name it after V*


OURS = {
    "learning_rate": 1e-3,
    "embedding_learning_rate": 1.5e-2,
    "cooldown": 0.3,
    "batch_size": 4,
}
METHODS = {
    "textual-inversion": Method(
        "Textual Inversion",
        {"weights": "none", "embedding_learning_rate": 5e-2},
        steps=1.5,
        regularization=None,
        category=False,
    ),
    "dreambooth": Method(
        "DreamBooth",
        {"weights": "unet", "train_modifier_token": False, "learning_rate": 1e-4},
        regularization="generated",
    ),
    "fine-tune-all": Method("ours, fine-tune all", {"weights": "unet", "learning_rate": 1e-4}),
    "ours": Method("ours"),
    # the paper's augmentation, which ours goes without here: the tuning concepts were learned worse with it
    "resized": Method(
        "ours with resized pictures",
        {"resize": 0.5, "size_words": "before"},  # as the embedded base's captions have them
    ),
    # as many target pictures as with regularization, in half the steps, as in the paper
    "no-regularization": Method(
        "ours without regularization", {"batch_size": 8}, steps=0.5, regularization=None
    ),
    "generated": Method("ours, generated regularization", regularization="generated"),
    "normal": Method("ours, V* from a normal draw", {"initializer_token": "<normal>"}),
    "fixed": Method("ours, V* not optimised", {"train_modifier_token": False}),
}
CUTMIX = {"cutmix": 0.5}  # beside the paper's joint training, which never sees two concepts in one picture
LEVELS: dict[str, dict[str, float]] = {
    "top 60%": {"energy": 0.6},
    "top 40%": {"energy": 0.4},
    "top 10%": {"energy": 0.1},
    "rank 1": {"rank": 1},
    "rank 0": {"rank": 0},
    "5× smaller": {"share": 0.2},
}
UNRELATED = ("base", "dreambooth", "fine-tune-all", "ours")
VALIDATED = (*UNRELATED, "resized", "no-regularization", "generated")
TIMED = ("ours", "fine-tune-all", "dreambooth", "textual-inversion")


@cache
def base_digest() -> str:
    """Of the embedded base's weights: what an earlier one gave is no result of it."""
    digest = hashlib.sha256()
    for file in sorted(Path(tinysd.path()).rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Job:
    """A piece of work with a result file of its own; `needs` are jobs whose files it reads."""

    name: str
    kind: str  # a function of work.py
    settings: Mapping[str, Any]
    needs: tuple[Job, ...] = ()
    cost: float = 1.0  # seconds of one core, roughly, for the time left

    @property
    def alone(self) -> bool:
        """Whether it times something, so that nothing else may run."""
        return self.kind == "timing"

    @property
    def key(self) -> str:
        """What the result depends on; a result of another key is none."""
        content = [base_digest(), self.kind, dict(self.settings), [job.key for job in self.needs]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def slug(method: str) -> str:
    """`method` as a part of a file's name."""
    return method.replace(" ", "-").replace("×", "x").replace("%", "")


def categories(cell: str) -> list[str]:
    """Of the concepts of a cell, "teal_dog" or "teal_dog+lilac_cat"."""
    return [world.concepts()[name].subject.category for name in cell.split("+")]


def jobs(effort: Effort) -> list[Job]:
    """All jobs, each after those that it needs."""
    return Plan(effort).jobs


class Plan:
    """Collects the jobs of one effort."""

    def __init__(self, effort: Effort):
        self.effort, self.jobs = effort, []  # type: Effort, list[Job]
        self.concepts = {name: word for pair in effort.pairs for name, word in zip(pair, WORDS, strict=True)}
        self.real = self.add("regularization", "regularization", {"count": effort.regularization})
        self.pictures: dict[tuple[str, int], Job] = {}
        self.references: dict[str, Job] = {}
        self.generated: dict[str, Job] = {}
        self.trained: dict[tuple[str, str, int], Job] = {}
        self._shared()
        self._timing()
        for seed in effort.seeds:
            for concept in self.concepts:
                self._single(concept, seed)
            for pair in effort.pairs:
                self._pair(pair, seed)

    def add(
        self,
        name: str,
        kind: str,
        settings: Mapping[str, Any],
        needs: Sequence[Job] = (),
        cost: float = 1.0,
    ) -> Job:
        job = Job(name, kind, settings, tuple(needs), cost)
        self.jobs.append(job)
        return job

    def _shared(self) -> None:
        effort = self.effort
        for concept in self.concepts:
            for seed in effort.seeds:
                settings = {"concept": concept, "count": effort.pictures, "seed": seed}
                name = f"pictures-{concept}-{seed}"
                self.pictures[concept, seed] = self.add(name, "pictures", settings, cost=0.2)
            settings = {
                "concept": concept,
                "held_out": effort.held_out,
                "count": effort.reference,
            }
            self.references[concept] = self.add(f"reference-{concept}", "reference", settings, cost=5)
            (category,) = categories(concept)
            if category not in self.generated:
                settings = {
                    "category": category,
                    "count": effort.generated,
                    "denoising": effort.generated_steps,
                }
                cost = 2 + _sampling(effort.generated, effort.generated_steps)
                job = self.add(f"generated-{category}", "generated", settings, cost=cost)
                self.generated[category] = job

    def _timing(self) -> None:
        effort, concept = self.effort, next(iter(self.concepts))
        pictures = self.pictures[concept, effort.seeds[0]]
        methods = {name: self._training(name, concept, effort.seeds[0]) for name in TIMED}
        settings = {"methods": methods, "steps": effort.timed_steps, "rounds": effort.timed_rounds}
        cost = 0.5 * effort.timed_steps * effort.timed_rounds * len(TIMED)
        self.add("timing", "timing", settings, [pictures, self.real], cost)

    def _training(self, method: str, concept: str, seed: int, factor: float = 1.0) -> dict[str, Any]:
        """The settings of a training job."""
        how, word = METHODS[method], self.concepts[concept]
        steps = max(1, round(self.effort.steps * how.steps * factor))
        options = {**OURS, **how.options, "steps": steps, "seed": seed}
        (category,) = categories(concept)
        initializer = WORDS[word] if how.category else category
        return {
            "concepts": [concept],
            "words": {word: how.options.get("initializer_token", initializer)},
            "nouns": [f"{word} {category}" if how.category else word],
            "options": {name: value for name, value in options.items() if name != "initializer_token"},
        }

    def _single(self, concept: str, seed: int) -> None:
        pictures = self.pictures[concept, seed]
        self._score("true", (concept,), seed)
        self._score("base", (concept,), seed)
        for name, method in METHODS.items():
            settings = self._training(name, concept, seed)
            needs = [pictures]
            if method.regularization is not None:
                (category,) = categories(concept)
                needs.append(self.real if method.regularization == "real" else self.generated[category])
            cost = _training(settings["options"], len(needs) > 1)
            job = self.add(f"train-{name}-{concept}-{seed}", "train", settings, needs, cost)
            self.trained[name, concept, seed] = job
            self._score(name, (concept,), seed, job)
        for level, limits in LEVELS.items():
            ours = self.trained["ours", concept, seed]
            job = self.add(f"compress-{slug(level)}-{concept}-{seed}", "compress", limits, [ours])
            self._score(level, (concept,), seed, job)

    def _pair(self, pair: tuple[str, str], seed: int) -> None:
        name, second = f"{pair[0]}+{pair[1]}-{seed}", pair[1]
        self._score("true", pair, seed)
        self._score("base", pair, seed)
        alone = [self.trained["ours", concept, seed] for concept in pair]
        words = [self.trained["textual-inversion", concept, seed] for concept in pair]
        pictures = [self.pictures[concept, seed] for concept in pair]

        both = [self._training("ours", concept, seed, factor=2.0) for concept in pair]
        settings = {
            "concepts": list(pair),
            "words": {word: start for part in both for word, start in part["words"].items()},
            "nouns": [noun for part in both for noun in part["nouns"]],
            "options": both[0]["options"],
        }
        cost = _training(settings["options"], True)
        joint = self.add(f"train-joint-{name}", "train", settings, [*pictures, self.real], cost)
        settings = {**settings, "options": {**settings["options"], **CUTMIX}}
        cutmix = self.add(f"train-joint-cutmix-{name}", "train", settings, [*pictures, self.real], cost)
        settings = {**self._training("ours", second, seed), "start_from": True}
        cost = _training(settings["options"], True)
        needs = [pictures[1], self.real, alone[0]]
        sequential = self.add(f"train-sequential-{name}", "train", settings, needs, cost)
        settings = {"captions": self.effort.captions, "categories": categories("+".join(pair))}
        merged = self.add(f"merge-{name}", "merge", settings, alone, 4)
        together = self.add(f"together-{name}", "together", {}, words, 1)
        made = {"textual-inversion": together, "sequential": sequential, "merged": merged}
        made |= {"joint": joint, "joint-cutmix": cutmix}
        for method, job in made.items():
            self._score(method, pair, seed, job)

    def _score(self, method: str, cell: Sequence[str], seed: int, trained: Job | None = None) -> None:
        """`trained`: the job whose concept draws; None for the base, and for true pictures."""
        effort, kind = self.effort, "true" if method == "true" else "score"
        nouns = [noun for concept in cell for noun in categories(concept)]
        if trained is not None:
            words = [self.concepts[concept] for concept in cell]
            alone = method in METHODS and not METHODS[method].category
            nouns = words if alone else [f"{w} {noun}" for w, noun in zip(words, nouns, strict=True)]
        single = len(cell) == 1
        counts = {
            "samples": effort.samples if single else effort.samples_together,
            "validation": effort.validation if single and method in VALIDATED else 0,
            "unrelated": effort.unrelated if single and method in UNRELATED else 0,
        }
        settings = {"method": method, "concepts": list(cell), "seed": seed, "nouns": nouns, **counts}
        cost = 2.0
        if kind == "score":
            settings["denoising"] = effort.denoising
            drawn = counts["samples"] * len(ALONE if single else TOGETHER)
            cost += _sampling(drawn + counts["validation"] + counts["unrelated"], effort.denoising)
        needs = [self.pictures[concept, seed] for concept in cell]
        needs += [self.references[concept] for concept in cell] + ([trained] if trained else [])
        self.add(f"score-{slug(method)}-{'+'.join(cell)}-{seed}", kind, settings, needs, cost)


def _sampling(pictures: int, steps: int) -> float:
    return pictures * steps * SAMPLING


def _training(options: Mapping[str, Any], regularized: bool) -> float:
    rows = options["batch_size"] * (2 if regularized else 1)
    return 4 + options["steps"] * rows * (WHOLE if options.get("weights") == "unet" else TRAINING)


def selected(jobs: Sequence[Job], pattern: str) -> list[Job]:
    """The jobs whose names match a shell pattern, and all that they need."""
    wanted: set[str] = set()

    def want(job: Job) -> None:
        if job.name not in wanted:
            wanted.add(job.name)
            for other in job.needs:
                want(other)

    for job in jobs:
        if fnmatch.fnmatch(job.name, pattern):
            want(job)
    if not wanted:
        raise ValueError(f"only {pattern!r} matches no job; --list names them, and * stands for anything")
    return [job for job in jobs if job.name in wanted]
