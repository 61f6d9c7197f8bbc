"""What is compared, how much work each is given, and the jobs that it takes.

The only place for numbers of steps and of pictures, and for rates and weights. They were chosen on concepts
that ``tinysd.world`` keeps for tuning; two others of these are the fifth and the sixth subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinysd import world

from ...embedded_world import GUIDANCE_SCALE
from ..plan import OURS, SAMPLING, TRAINING, Job, categories
from .scenes import BARE, prompt

PAIRS = (("teal_dog", "lilac_cat"), ("lime_car", "maroon_cup"))
THREE = (("teal_dog", "lilac_cat", "lime_car"), ("maroon_cup", "teal_dog", "lilac_cat"))
FOUR = (("teal_dog", "lilac_cat", "lime_car", "maroon_cup"),)
SIX = (("teal_dog", "lilac_cat", "lime_car", "maroon_cup", "slate_dog", "teal_cup"),)
SUBJECTS = SIX[0]
WORDS = dict(zip((f"<new{n}>" for n in range(1, 7)), world.RARE_WORDS, strict=False))
SCALES = ("normal", "small")  # of a subject's pictures, in turn
RESIDUAL: dict[str, Any] = {
    "batch_size": 6,
    "cooldown": 0.3,
    "weight_decay": 0.1,
    "shift": 0.0,
    "embedding_learning_rate": 0.05,
}
GUIDANCE: dict[str, Any] = {"weight": 0.15, "schedule": "constant"}  # of LayoutGuidance


@dataclass(frozen=True)
class Effort:
    """How much work a run does; the default is what the report shows."""

    combinations: tuple[tuple[str, ...], ...] = (*((name,) for name in SUBJECTS), *PAIRS, *THREE, *FOUR, *SIX)
    samples: Mapping[int, int] = field(default_factory=lambda: {1: 2, 2: 10, 3: 10, 4: 5, 6: 5})  # a prompt
    pictures: int = 8  # of a subject
    held_out: int = 24  # true pictures of it, by which the detector knows it
    regularization: int = 200  # real pictures, of random subjects, for Custom Diffusion
    steps: int = 180  # of Custom Diffusion, times the subjects
    residual_steps: int = 550
    refine_steps: int = 450  # of these, the last ones
    captions: int = 1000
    denoising: int = 20
    guidance_scale: float = 8.0  # of Custom Diffusion: GUIDANCE_SCALE, as in its own report


QUICK = Effort(
    combinations=(("teal_dog",), ("teal_dog", "maroon_cup")),
    samples={1: 1, 2: 1},
    pictures=2,
    held_out=2,
    regularization=4,
    steps=2,
    residual_steps=2,
    refine_steps=1,
    captions=300,
    denoising=2,
)


@dataclass(frozen=True)
class Method:
    """How a combination is drawn: from which files, and whether the layout guides.

    backwards: the regions stand in the reverse of the prompt's order, where the base puts none by itself.
    """

    title: str
    made_by: str | None  # "residual", "joint", "merged", or None for the base
    layout: bool = False
    backwards: bool = False


METHODS = {
    "base": Method("base model", None),
    "base-layout": Method("base model, layout", None, layout=True),
    "joint": Method("Custom Diffusion, joint", "joint"),
    "merged": Method("Custom Diffusion, merged", "merged"),
    "residuals": Method("residuals", "residual"),
    "ours": Method("residuals, layout (Cones 2)", "residual", layout=True),
    "base-layout-reversed": Method("base model, layout reversed", None, layout=True, backwards=True),
    "ours-reversed": Method("residuals, layout reversed", "residual", layout=True, backwards=True),
    "true": Method("true pictures", "true"),
}


def jobs(effort: Effort) -> list[Job]:
    """All jobs, each after those that it needs."""
    return Plan(effort).jobs


class Plan:
    """Collects the jobs of one effort."""

    def __init__(self, effort: Effort):
        self.effort, self.jobs = effort, []  # type: Effort, list[Job]
        subjects = dict.fromkeys(name for names in effort.combinations for name in names)
        self.words = dict(zip(subjects, WORDS, strict=False))
        self.real = self._add("regularization", "regularization", {"count": effort.regularization}, cost=3)
        self.pictures = {
            name: self._add(
                f"pictures-{name}",
                "pictures",
                {"concept": name, "count": effort.pictures, "seed": 0, "scales": SCALES},
            )
            for name in subjects
        }
        self.detectors = {
            name: self._add(
                f"detector-{name}", "detector", {"concept": name, "held_out": effort.held_out}, cost=5
            )
            for name in subjects
        }
        self.residuals = {name: self._residual(name) for name in subjects}
        self.alone = {name: self._custom_diffusion((name,)) for name in subjects}
        for names in effort.combinations:
            self._combination(names)

    def _add(
        self, name: str, kind: str, settings: Mapping[str, Any], needs: Sequence[Job] = (), cost: float = 1.0
    ) -> Job:
        self.jobs.append(Job(name, kind, settings, tuple(needs), cost))
        return self.jobs[-1]

    def _residual(self, name: str) -> Job:
        effort = self.effort
        steps = {"steps": effort.residual_steps, "refine_steps": effort.refine_steps}
        options = {**RESIDUAL, **steps, "caption_count": effort.captions}
        cost = 6 + options["steps"] * options["batch_size"] * 1.2 * TRAINING
        return self._add(
            f"residual-{name}", "residual", {"concept": name, "options": options}, [self.pictures[name]], cost
        )

    def _custom_diffusion(self, names: Sequence[str]) -> Job:
        """Learned together: a joint run, or of one subject."""
        options = {**OURS, "steps": self.effort.steps * len(names), "seed": 0}
        words = {self.words[name]: WORDS[self.words[name]] for name in names}
        nouns = [f"{word} {noun}" for word, noun in zip(words, categories("+".join(names)), strict=True)]
        settings = {
            "concepts": list(names),
            "words": words,
            "nouns": nouns,
            "options": options,
            "captioned": True,
        }
        cost = 4 + 2 * options["steps"] * options["batch_size"] * TRAINING
        needs = [*(self.pictures[name] for name in names), self.real]
        return self._add(f"train-{'+'.join(names)}", "train", settings, needs, cost)

    def _combination(self, names: tuple[str, ...]) -> None:
        made: dict[str | None, list[Job]] = {None: [], "true": []}
        made["residual"] = [self.residuals[name] for name in names]
        if len(names) == 1:
            made["joint"] = [self.alone[names[0]]]
        else:
            alone = [self.alone[name] for name in names]
            nouns = categories("+".join(names))
            settings: dict[str, Any] = {"captions": self.effort.captions, "categories": nouns}
            if len(names) >= BARE:
                named = [f"{self.words[name]} {noun}" for name, noun in zip(names, nouns, strict=True)]
                settings["together"] = prompt(named, "")
            made["joint"] = [self._custom_diffusion(names)]
            made["merged"] = [self._add(f"merge-{'+'.join(names)}", "merge", settings, alone, 4)]
        for name, method in METHODS.items():
            if method.made_by in made and (not method.backwards or len(names) in (2, 3)):
                self._score(name, names, made[method.made_by])

    def _score(self, method: str, names: tuple[str, ...], made: Sequence[Job]) -> None:
        effort, how = self.effort, METHODS[method]
        nouns = categories("+".join(names))
        if how.made_by in ("joint", "merged"):
            nouns = [f"{self.words[name]} {noun}" for name, noun in zip(names, nouns, strict=True)]
        settings: dict[str, Any] = {
            "method": method,
            "subjects": list(names),
            "nouns": nouns,
            "samples": effort.samples[len(names)],
        }
        cost = 2.0
        if method != "true":
            own = GUIDANCE_SCALE if how.made_by in ("joint", "merged") else effort.guidance_scale
            settings |= {"denoising": effort.denoising, "guidance_scale": own}
            cost += settings["samples"] * len(world.BACKGROUNDS) * effort.denoising * SAMPLING
        if how.layout:
            settings["guidance"] = GUIDANCE
        needs = [job for name in names for job in (self.pictures[name], self.detectors[name])]
        self._add(f"compose-{method}-{'+'.join(names)}", "compose", settings, [*needs, *made], cost)
