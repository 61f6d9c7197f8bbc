"""``customdiff analyse steps``: alignment against training steps (Custom Diffusion, figure 17)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .report import begin, save, show, tabulated
from .series import Comparison, add_comparison, described, plot

if TYPE_CHECKING:
    from ..concept import Concept

SUMMARY = "Image and text alignment against training steps (figure 17)."
EXAMPLES = """Of the files that customdiff train --keep-every kept. Step 0 is the base, without the modifier
token. Samples that the output folder holds are not drawn again.

examples:
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --keep-every 50 \\
      --output runs/dog.safetensors
  customdiff analyse steps runs/ --pictures my_dog/ --prompts prompts.txt --category dog \\
      --output dog_steps/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concepts", nargs="+", metavar="FILE|DIR", help="concept files, or folders of them")
    add_comparison(parser)


def run(options: argparse.Namespace) -> None:
    stem, figure = begin(options, panels=2, resumes=True)
    concepts = concepts_by_step(options.concepts)
    data = {"concepts": options.concepts, **alignment_by_step(concepts, Comparison.of(options))}
    plot(figure, data["rows"], "step", "training steps")
    save(stem, data, tabulated(data["rows"]), figure)
    show(options, data, tabulated(data["rows"]))


def concepts_by_step(paths: Sequence[str | Path]) -> dict[int, Concept]:
    """The concepts of files, or of all .safetensors files of folders, by the training step of each.

    A file's step is its metadata's "step", else the "steps" of its "training". Raises ValueError for a path
    that is not there, a folder without concepts, a file without a step, and different ones of the same step.
    """
    from ..concept import Concept
    from ..evaluation import fingerprint

    files: list[Path] = []
    for path in map(Path, paths):
        held = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not held or not path.exists():
            raise ValueError(f"{str(path)!r} holds no concept file (.safetensors)")
        files += held
    found: dict[int, tuple[Path, Concept]] = {}
    for path in files:
        concept = Concept.load(path)
        step = concept.metadata.get("step", concept.metadata.get("training", {}).get("steps"))
        if type(step) is not int or step < 0:
            raise ValueError(f"{str(path)!r} does not say after how many training steps it was kept")
        if step in found and fingerprint(found[step][1]) != fingerprint(concept):
            raise ValueError(f"{str(found[step][0])!r} and {str(path)!r} differ and are both of step {step}")
        found[step] = path, concept
    return {step: found[step][1] for step in sorted(found)}


def alignment_by_step(concepts: Mapping[int, Concept], comparison: Comparison) -> dict[str, Any]:
    """Image and text alignment of the concepts kept at several training steps.

    Args:
        concepts: by training step. Without step 0 the base, without modifier tokens, is taken for it.
        comparison: how they are drawn and scored.

    Returns what JSON can hold: "rows", one for each step, ascending, with every score of ``evaluate``;
    "scales" of the scores; "configuration" and "versions". Raises ValueError, before anything is written, for
    bad input.
    """
    versions: dict[int, Concept | None] = {0: None, **{step: concepts[step] for step in sorted(concepts)}}
    names = {step: "base" if concept is None else f"step-{step:06d}" for step, concept in versions.items()}
    results = comparison.results({names[step]: concept for step, concept in versions.items()})
    rows = [{"step": step, **results[name].summary} for step, name in names.items()]
    return described(rows, list(results.values()))
