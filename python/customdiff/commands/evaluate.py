"""``customdiff evaluate``: draw samples and score them."""

from __future__ import annotations

import argparse

from .common import add_base, add_sampling, clip, sampling

SUMMARY = "Draw samples and measure how they follow prompts and the concept's pictures."
EXAMPLES = """Samples that the output folder holds are not drawn again, so an interrupted evaluation goes on.

examples:
  customdiff evaluate --concept dog.safetensors --pictures my_dog/ --prompts prompts.txt --category dog \\
      --output dog_scores/
  customdiff evaluate --concept both.safetensors --pictures my_dog/ my_cat/ --category dog cat \\
      --prompts "photo of the {0} and {1}" --output both_scores/
  customdiff evaluate --pictures my_dog/ --prompts prompts.txt --category dog --output base_scores/
  customdiff evaluate --samples-from samples/ --pictures my_dog/ --prompts prompts.txt --output scores/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--concept", nargs="+", default=(), metavar="FILE", help="concept files (default: the base alone)")
    add(
        "--pictures",
        nargs="+",
        required=True,
        metavar="DIR",
        help="the concept's real pictures; for several concepts one folder for each modifier token",
    )
    add(
        "--prompts",
        nargs="+",
        default=(),
        metavar="FILE|TEXT",
        help="prompts, or files with one a line; {}, or {0} and {1}, stand for the modifier token and its "
        "category (default: the captions of --samples-from)",
    )
    add("--category", nargs="+", default=(), metavar="NOUN", help="what {} means: dog, for a <new1> dog")
    add("--output", required=True, metavar="DIR", help="for the samples, results.json, .csv, .md, sheet.png")
    add("--samples-from", metavar="DIR", help="score the pictures of this folder: prompt0_1.png, ...")
    add(
        "--modifier-tokens",
        nargs="+",
        default=(),
        metavar="WORD",
        help="words to take out of the prompts that are scored (default: the concepts', or any <word>)",
    )
    add("--dino", metavar="DIR", help="DINO or DINOv2 model folder, for a second image alignment")
    add("--reference", metavar="DIR", help="real pictures for KID and FID, over CLIP's image embeddings")
    add("--overwrite", action="store_true", help="remove the samples of an earlier evaluation in --output")
    add("--quiet", action="store_true", help="show no progress bar")
    add_sampling(parser)
    add_base(parser)


def run(options: argparse.Namespace) -> None:
    from ..base import load_base, usable_device
    from ..concept import Concept
    from ..evaluation import evaluate
    from ..metrics import Dino
    from ..prompts import read_prompts

    drawing = sampling(options)
    prompts = read_prompts(options.prompts)
    concepts = [Concept.load(name) for name in options.concept]
    device = usable_device(options.device)
    results = evaluate(
        prompts,
        options.pictures,
        options.output,
        clip=clip(options, device),
        dino=Dino(options.dino, device) if options.dino else None,
        reference=options.reference,
        pipe=None if options.samples_from else load_base(options.base, device),
        concepts=concepts,
        sampling=drawing,
        samples_from=options.samples_from,
        modifier_tokens=options.modifier_tokens,
        categories=options.category,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    print(results.markdown())
