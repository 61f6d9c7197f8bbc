"""``customdiff retrieve``: find regularization pictures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..output import check_writable
from .common import add_base, add_cache, positive

SUMMARY = "Find regularization pictures in a captioned collection."
EXAMPLES = """Captions stand in a .txt beside each picture, captions.csv or .jsonl, metadata.csv or
.jsonl, or Parquet files (columns caption or text; image, or a path). Duplicates are left out.

examples:
  customdiff retrieve --images laion/ --prompts "photo of a <new1> dog" --output other_dogs/
  customdiff retrieve --images laion.parquet --prompts "a dog" "a puppy" --threshold 0.8 --output other_dogs/
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --regularization other_dogs/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", required=True, metavar="PATH", help="folder of captioned pictures, or a .parquet file"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="what the captions are to say; <new1> and the like are taken out",
    )
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.85,
        help="least cosine of a caption and a prompt in CLIP's text space (default: 0.85)",
    )
    parser.add_argument("--count", type=positive, default=200, help="the most pictures (default: 200)")
    parser.add_argument(
        "--modifier-token",
        nargs="+",
        default=(),
        metavar="WORD",
        help="to take out of the prompts, where it is not written as <new1>",
    )
    parser.add_argument(
        "--clip",
        metavar="DIR",
        help="folder of a CLIPModel in whose text space to compare (default: the base's text encoder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result at --output")
    add_cache(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    add_base(parser)


def run(options: argparse.Namespace) -> None:
    from ..regularization import cache_folder
    from ..retrieval import retrieve

    output = Path(options.output)
    check_writable(output, folder=True)
    report = retrieve(
        options.images,
        options.prompts,
        output,
        threshold=options.threshold,
        count=options.count,
        modifier_tokens=options.modifier_token,
        base=options.base,
        clip=options.clip,
        device=options.device,
        cache=None if options.no_cache else options.cache or cache_folder(),
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    if options.json:
        print(json.dumps(report, indent=2))
        return
    pictures = report["pictures"]
    left = [
        f"{report[why]} {why.replace('_', ' ')}"
        for why in ("duplicates", "unreadable", "without_caption")
        if report[why]
    ]
    if left:
        print(f"left out: {', '.join(left)}")
    print(
        f"{output}: {len(pictures)} of {report['reached']} pictures that reach {options.threshold:g}, "
        f"similarity {pictures[0]['similarity']:.3f} to {pictures[-1]['similarity']:.3f}"
    )
