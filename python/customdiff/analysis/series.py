"""Alignments of several versions of one concept, each drawn and scored as ``customdiff evaluate`` does."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..commands.common import add_base, add_sampling, clip, sampling
from .report import add_report

if TYPE_CHECKING:
    from ..concept import Concept
    from ..evaluation import Sampling
    from ..metrics import Clip
    from ..scoring import Results

SCORES = ("image_alignment", "text_alignment")


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """The options that ``Comparison.of`` reads, and those of `add_report`."""
    add = parser.add_argument
    add("--pictures", required=True, metavar="DIR", help="the concept's real pictures")
    add(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE|TEXT",
        help="prompts, or files with one a line; {} stands for the modifier token and its category",
    )
    add("--category", nargs="+", default=(), metavar="NOUN", help="what {} means: dog, for a <new1> dog")
    add_report(parser, overwrite="draw the samples of --output anew")
    add("--quiet", action="store_true", help="show no progress bar")
    add_sampling(parser)
    add_base(parser)


@dataclass(frozen=True)
class Comparison:
    """How versions of one concept are compared: with the same prompts, seeds and real pictures.

    All fields are arguments of ``evaluate``; `output` gets a folder for each version.
    """

    prompts: Sequence[str]
    pictures: str | Path
    output: str | Path
    pipe: Any
    clip: Clip
    sampling: Sampling
    categories: Sequence[str] = ()
    overwrite: bool = False
    progress: bool = True

    @classmethod
    def of(cls, options: argparse.Namespace) -> Comparison:
        """What the options of `add_comparison` say."""
        from ..base import load_base, usable_device
        from ..prompts import read_prompts

        drawing, prompts = sampling(options), read_prompts(options.prompts)
        device = usable_device(options.device)
        return cls(
            prompts,
            options.pictures,
            options.output,
            clip=clip(options, device),
            pipe=load_base(options.base, device),
            sampling=drawing,
            categories=options.category,
            overwrite=options.overwrite,
            progress=not options.quiet,
        )

    def results(self, versions: Mapping[str, Concept | None]) -> dict[str, Results]:
        """Samples of every version, scored by ``evaluate``; those that stand in `output` are not drawn again.

        versions: by the name of their folder; None is the base, with the modifier tokens taken out of the
            prompts.

        Raises ValueError, before anything is written, for bad input and for folders of another configuration.
        """
        from ..concept import without_words
        from ..data import picture_paths
        from ..evaluation import check, evaluate
        from ..prompts import fill

        words = list(dict.fromkeys(word for c in versions.values() if c for word in c.modifier_tokens))
        prompts = fill(self.prompts, words, self.categories)
        plain = [without_words(prompt, words) for prompt in prompts]
        if "" in plain:
            prompt = prompts[plain.index("")]
            raise ValueError(f"prompt {prompt!r} has nothing to compare beside its modifier token; add words")
        picture_paths(self.pictures)  # raises if there is none
        jobs = []
        for name, concept in versions.items():
            texts, concepts = (prompts, [concept]) if concept else (plain, [])
            jobs.append((texts, concepts, Path(self.output) / name))
            check(self.pipe, *jobs[-1], self.sampling, self.overwrite)
        found = [
            evaluate(
                texts,
                self.pictures,
                folder,
                clip=self.clip,
                pipe=self.pipe,
                concepts=concepts,
                sampling=self.sampling,
                overwrite=self.overwrite,
                progress=self.progress,
            )
            for texts, concepts, folder in jobs
        ]
        return dict(zip(versions, found, strict=True))


def described(rows: list[dict[str, Any]], results: Sequence[Results]) -> dict[str, Any]:
    """`rows` with what the `results` that they come from share: scales, configuration and versions."""
    last = results[-1]  # the first may be the base, whose prompts are without modifier tokens
    shared = {name: value for name, value in last.configuration.items() if name != "concepts"}
    return {"rows": rows, "scales": last.scales, "configuration": shared, "versions": last.versions}


def plot(figure: Any, rows: Sequence[Mapping[str, Any]], column: str, label: str) -> list[Any]:
    """Draws image and text alignment against a column of `rows`; returns the two panels, of equal span."""
    from ..plotting import COLOURS

    panels = list(figure.subplots(1, len(SCORES)))
    rows = sorted(rows, key=lambda row: row[column])
    found = [[row[score] for row in rows] for score in SCORES]
    span = 1.3 * max(0.01, *(max(values) - min(values) for values in found))
    for axes, score, values, colour in zip(panels, SCORES, found, COLOURS, strict=False):
        middle = (max(values) + min(values)) / 2
        axes.plot([row[column] for row in rows], values, "o-", color=colour)
        axes.set_ylim(middle - span / 2, middle + span / 2)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{score.replace('_', ' ')} (CLIP, mean cosine)")
    return panels
