"""``customdiff edit``: prompt-to-prompt."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import (
    add_base,
    add_drawing,
    check_pictures,
    existing,
    guidance_scale,
    match_files,
    positive,
    save_pictures,
)

SUMMARY = "Change a picture by its prompt, and keep what the prompt keeps (prompt-to-prompt)."
EXAMPLES = """Words that both prompts have stay where the source has them; a word in the place of another
stands where that stood; an added word is added. Fewer --cross-steps and --self-steps edit more freely. A
--concept serves the prompts that name its modifier token. --picture edits a real picture, which --source must
describe; with guidance it drifts from itself.

examples:
  customdiff edit --concept dog.safetensors --source "photo of a dog in the snow" \\
      --target "photo of a <new1> dog in the snow"
  customdiff edit --source "photo of a red car" --target "photo of a blue car" --blend car --output blue/
  customdiff edit --source "a dog with a hat" --target "a dog with a hat" --reweight hat=-2
  customdiff edit --picture me.png --source "photo of a dog" --target "photo of a cat"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="TEXT", help="the prompt that is edited")
    parser.add_argument(
        "--target",
        action="append",
        required=True,
        metavar="TEXT",
        help="an edited prompt; may be given several times",
    )
    parser.add_argument(
        "--concept",
        action="append",
        default=[],
        metavar="FILE",
        help="concept file; also several times",
    )
    parser.add_argument("--picture", metavar="FILE", help="a real picture in the place of the seeds' ones")
    parser.add_argument(
        "--output", default="edit.png", help="a .png for one sheet of all pictures, else a folder"
    )
    parser.add_argument(
        "--cross-steps",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="share of the steps that take the source's cross-attention (default: 0.8)",
    )
    parser.add_argument(
        "--word-steps",
        type=_word_number,
        nargs="+",
        default=(),
        metavar="WORD=SHARE",
        help="the same for single words of the targets",
    )
    parser.add_argument(
        "--self-steps",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the steps that take the source's self-attention (default: 0.4)",
    )
    parser.add_argument(
        "--self-side",
        type=positive,
        metavar="N",
        help="in layers of at most N x N pixels (default: half of the latents' side)",
    )
    parser.add_argument(
        "--reweight",
        type=_word_number,
        nargs="+",
        default=(),
        metavar="WORD=WEIGHT",
        help="multiply the attention to words of the targets: more than 1, less, or negative",
    )
    parser.add_argument(
        "--blend",
        nargs="+",
        default=(),
        metavar="WORD",
        help="keep the source's picture outside of where these words are",
    )
    add_drawing(parser, guidance="1 with --picture, else 3 for the embedded base, else 6")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add_base(parser)


def run(options: argparse.Namespace) -> None:
    from ..base import load_base
    from ..concept import Concept
    from ..data import open_picture
    from ..editing import edit

    output = Path(options.output)
    check_pictures(output)
    prompts = [options.source, *options.target]
    files = {name: Concept.load(existing(name)) for name in dict.fromkeys(options.concept)}
    concepts = match_files(prompts, files, "--source or --target")
    picture = open_picture(Path(options.picture)) if options.picture else None
    pipeline = load_base(options.base, options.device)
    columns = [
        edit(
            pipeline,
            options.source,
            options.target,
            concepts,
            cross_steps=options.cross_steps,
            word_steps=dict(options.word_steps),
            self_steps=options.self_steps,
            self_side=options.self_side,
            reweight=dict(options.reweight),
            blend=options.blend,
            picture=picture,
            seed=options.seed + k,
            steps=options.steps,
            guidance_scale=options.guidance if picture else guidance_scale(options),
            negative_prompt=options.negative_prompt,
            progress=not options.quiet,
        )
        for k in range(options.count if picture is None else 1)
    ]
    rows = list(zip(prompts, zip(*columns, strict=True), strict=True))
    names = ["source", *(f"target{i}" for i in range(len(options.target)))]
    save_pictures(output, rows, names, options.seed)


def _word_number(text: str) -> tuple[str, float]:
    word, _, number = text.rpartition("=")
    try:
        return word, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be WORD=NUMBER, as snow=2, got {text!r}") from None
