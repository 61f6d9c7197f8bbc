"""``make demo``: two concepts learned from picture files, then sampled, compressed and merged, with figures.

It draws the concepts' pictures, the real pictures of other subjects that regularize, and held-out pictures of
the concepts, which set the ceiling of every figure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import customdiff_kernels as ck
import tinysd
from tinysd import world
from tinysd.presence import Presence

from .base import embedded_captions, load_base, silence
from .concept import Concept
from .config import TrainConfig
from .data import read_pictures
from .embedded_world import GUIDANCE_SCALE, write_concept, write_regularization
from .merging import merge
from .metrics import Clip
from .sampler import sample
from .sheet import contact_sheet
from .trainer import train

CONCEPTS = {"<new1>": "teal_dog", "<new2>": "lilac_cat"}
INITIALIZERS = {"<new1>": "ktn", "<new2>": "pll"}
PLACES = ("on the grass", "on the beach", "in the snow", "in the room")
SHARE_OF_BYTES = 0.2
LEGEND = """
image, text: CLIP alignment with the concept's pictures, with the prompt. gap: share of the way from the
base's samples to true pictures that were not trained on. seen: share of samples in which a detector finds the
concept's category in colours nearer to the concept's than those of 98% of such subjects; both: in one picture
with the other concept. seconds: training of both; merging. bytes: of the files.
"""


@dataclass(frozen=True)
class Effort:
    """How much work a run does."""

    pictures: int = 6
    held_out: int = 16
    regularization: int = 200
    steps: int = 300
    count: int = 4  # samples a prompt
    denoising: int = 20
    captions: int = 1000


QUICK = Effort(held_out=4, regularization=8, steps=3, count=1, denoising=2, captions=300)


@dataclass
class Stage:
    """Pictures of one set of weights: of each concept alone, with their prompts, and of both together."""

    name: str
    pictures: dict[str, list[Image.Image]]
    prompts: dict[str, list[str]]
    pairs: list[Image.Image] = field(default_factory=list)
    seconds: float | None = None
    bytes: int | None = None


@dataclass
class Row:
    """One line of the table; ``image``, ``text`` and ``seen`` hold a figure for each concept."""

    name: str
    image: list[float]
    text: list[float]
    seen: list[float]
    both: float | None
    seconds: float | None
    bytes: int | None


class Demo:
    """One run into the folder `out`; `say` is told what it does."""

    def __init__(self, out: Path, effort: Effort, seed: int = 0, say: Callable[[str], None] = print):
        self.out, self.effort, self.seed, self.say = out, effort, seed, say
        self.subjects = {word: world.concepts()[name].subject for word, name in CONCEPTS.items()}
        out.mkdir(parents=True, exist_ok=True)
        self.pipeline = load_base()

    def run(self) -> list[Row]:
        """All steps, the contact sheet and demo.json; returns the rows of the table."""
        count = self.effort.regularization
        regularization = write_regularization(self.out / "regularization", count, self.seed)
        learned, small, trained = {}, {}, 0.0
        for word in CONCEPTS:
            write_concept(self.folder(word), CONCEPTS[word], self.effort.pictures, self.seed)
            self.say(f"learning {CONCEPTS[word]} from {self.effort.pictures} pictures in {self.folder(word)}")
            result = train(self.config(word, regularization), self.pipeline)
            learned[word], trained = result.concept, trained + result.seconds
            small[word] = self.compress(word)
        merged, merging = self.merge(learned)

        self.say("sampling: base, trained, compressed, merged")
        base = self.sample("base (before)", dict.fromkeys(CONCEPTS))
        after = self.sample("trained (after)", learned)
        compressed = self.sample(f"compressed to {SHARE_OF_BYTES:.0%}", small)
        both = self.sample("merged", dict.fromkeys(CONCEPTS, merged))
        after.seconds, after.bytes = trained, self.size("full")
        compressed.bytes = self.size("small")
        both.seconds, both.bytes = merging, self.file("merged").stat().st_size
        base.pairs, both.pairs = self.sample_pairs(None), self.sample_pairs(merged)
        stages = [base, after, compressed, both, self.held_out()]
        rows = self.measure(stages)
        self.draw(stages)
        (self.out / "demo.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return rows

    # files

    def folder(self, word: str) -> Path:
        return self.out / CONCEPTS[word]

    def file(self, kind: str, word: str = "") -> Path:
        return self.out / f"{CONCEPTS.get(word, 'both')}.{kind}.safetensors"

    def size(self, kind: str) -> int:
        return sum(self.file(kind, word).stat().st_size for word in CONCEPTS)

    # the four operations

    def config(self, word: str, regularization: Path) -> TrainConfig:
        category = self.subjects[word].category
        return TrainConfig(
            images=str(self.folder(word)),
            prompts=(
                f"photo of a {word} {category}",
                f"a photo of a {word} {category}",
                f"a {word} {category}",
            ),
            output=str(self.file("full", word)),
            modifier_token=word,
            initializer_token=INITIALIZERS[word],
            regularization=str(regularization),
            steps=self.effort.steps,
            cooldown=0.3,
            seed=self.seed,
            overwrite=True,
        )

    def compress(self, word: str) -> Concept:
        full = self.file("full", word)
        concept = Concept.load(full)
        spent = full.stat().st_size - sum(change.nbytes for change in concept.delta.values())
        delta = ck.compress(concept.delta, max_bytes=round(SHARE_OF_BYTES * full.stat().st_size) - 2 * spent)
        Concept(delta, concept.modifier_tokens, concept.metadata).save(self.file("small", word))
        return Concept.load(self.file("small", word))

    def merge(self, learned: dict[str, Concept]) -> tuple[Concept, float]:
        started = time.perf_counter()
        captions = embedded_captions(self.effort.captions, self.seed)
        merged, report = merge(
            list(learned.values()), self.pipeline, captions, together=[self.pair_prompt(True)], padding=False
        )
        merged.save(self.file("merged"))
        seconds = time.perf_counter() - started
        self.say(f"merged in {seconds:.1f} s: ordinary captions' keys and values moved by {report.drift:.1%}")
        return merged, seconds

    def sample(self, name: str, concepts: dict[str, Any]) -> Stage:
        """Every prompt of every concept, all in one batch, each row with its own concept."""
        prompts, chosen = [], []
        for word, concept in concepts.items():
            noun = (
                self.subjects[word].category if concept is None else f"{word} {self.subjects[word].category}"
            )
            prompts += [f"photo of a {noun} {place}" for place in PLACES for _ in range(self.effort.count)]
            chosen += [concept] * (len(PLACES) * self.effort.count)
        pictures = self._pictures(prompts, chosen)
        each = len(PLACES) * self.effort.count
        parts = {word: slice(i * each, (i + 1) * each) for i, word in enumerate(concepts)}
        return Stage(
            name, {w: pictures[s] for w, s in parts.items()}, {w: prompts[s] for w, s in parts.items()}
        )

    def pair_prompt(self, named: bool) -> str:
        """For both concepts in one picture, with their modifier tokens or without."""
        nouns = [
            f"{word} {subject.category}" if named else subject.category
            for word, subject in self.subjects.items()
        ]
        return f"photo of a {nouns[0]} and a {nouns[1]}"

    def sample_pairs(self, merged: Concept | None) -> list[Image.Image]:
        """Both concepts in one picture."""
        text = self.pair_prompt(merged is not None)
        prompts = [f"{text} {place}" for place in PLACES for _ in range(self.effort.count)]
        return self._pictures(prompts, [merged] * len(prompts))

    def _pictures(self, prompts: list[str], concepts: list[Concept | None]) -> list[Image.Image]:
        return sample(
            self.pipeline,
            prompts,
            concepts,
            steps=self.effort.denoising,
            guidance_scale=GUIDANCE_SCALE,
            seeds=[self.seed + i for i in range(len(prompts))],
            progress=False,
        )

    def held_out(self) -> Stage:
        """True pictures of the concepts that nothing was trained on."""
        made = {
            w: world.concept_pictures(n, self.effort.held_out, self.seed + 1) for w, n in CONCEPTS.items()
        }
        pictures = {word: [picture for picture, _ in pairs] for word, pairs in made.items()}
        prompts = {word: [caption for _, caption in pairs] for word, pairs in made.items()}
        rng = np.random.default_rng(self.seed + 1)
        pairs = world.pictures(tuple(self.subjects.values()), self.effort.held_out, rng)
        return Stage("true pictures", pictures, prompts, [picture for picture, _ in pairs])

    # figures

    def measure(self, stages: Sequence[Stage]) -> list[Row]:
        """The figures of every stage; the last stage holds true pictures."""
        clip = Clip(tinysd.clip_path())
        concept = {word: read_pictures(self.folder(word)) for word in CONCEPTS}
        shows = {w: Presence(self.subjects[w], stages[-1].pictures[w]) for w in CONCEPTS}
        rows = []
        for stage in stages:
            row = Row(stage.name, [], [], [], None, stage.seconds, stage.bytes)
            for word, pictures in stage.pictures.items():
                row.image.append(clip.image_alignment(pictures, concept[word]))
                row.text.append(clip.text_alignment(pictures, stage.prompts[word], CONCEPTS))
                row.seen.append(float(np.mean(shows[word](pictures))))
            if stage.pairs:
                row.both = float(np.mean(np.all([shows[word](stage.pairs) for word in CONCEPTS], axis=0)))
            rows.append(row)
        return rows

    def draw(self, stages: Sequence[Stage]) -> None:
        """The contact sheet."""
        rows: list[tuple[str, Sequence[Image.Image]]] = []
        for word, name in CONCEPTS.items():
            rows.append(
                (
                    f"the {len(list(self.folder(word).iterdir()))} pictures of {name}",
                    read_pictures(self.folder(word)),
                )
            )
            for stage in stages[:-1]:
                rows.append(
                    (
                        f'{stage.name}: "{stage.prompts[word][0]}", ...',
                        stage.pictures[word][:: max(1, self.effort.count // 2)],
                    )
                )
        rows.append(("merged: both in one picture", stages[-2].pairs[:8]))
        contact_sheet(rows, side=96).save(self.out / "contact_sheet.png")


def table(rows: Sequence[Row]) -> str:
    """The rows as text; gap: share of the way from the first row's image alignment to the last's."""
    columns = ["image", "gap", "text", "seen"]
    lines = [["", *columns * len(CONCEPTS), "both", "seconds", "bytes"]]
    for row in rows:
        cells = [row.name]
        for i in range(len(CONCEPTS)):
            low, high = rows[0].image[i], rows[-1].image[i]
            gap = (row.image[i] - low) / (high - low) if high != low else float("nan")
            cells += [f"{row.image[i]:.3f}", f"{gap:.0%}", f"{row.text[i]:.3f}", f"{row.seen[i]:.0%}"]
        cells.append("" if row.both is None else f"{row.both:.0%}")
        cells.append("" if row.seconds is None else f"{row.seconds:.1f}")
        cells.append("" if row.bytes is None else f"{row.bytes:,}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    group = sum(widths[1 : 1 + len(columns)]) + 2 * (len(columns) - 1)
    over = [f" {name} ".center(group, "-") for name in CONCEPTS.values()]
    return "\n".join(["  ".join([" " * widths[0], *over]), *texts])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demonstration and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m customdiff.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder to write (default: out/demo)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, for tests")
    options = parser.parse_args(arguments)
    silence()
    started = time.perf_counter()
    rows = Demo(options.out, QUICK if options.quick else Effort(), options.seed).run()
    print()
    print(table(rows))
    print(LEGEND)
    print(f"{options.out}/contact_sheet.png and demo.json, {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
