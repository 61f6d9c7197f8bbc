"""``customdiff train``: learn a concept from a folder of pictures."""

from __future__ import annotations

import argparse

from .. import config

SUMMARY = "Learn a concept from a folder of pictures."
EXAMPLES = """examples:
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --output dog.safetensors
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --regularization other_dogs/
  customdiff train --images my_cat/ --prompts "photo of a <new2> cat" "a <new2> cat" \\
      --modifier-token "<new2>" --initializer-token pll --output cat.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(options: argparse.Namespace) -> None:
    from ..trainer import train

    result = train(config.from_arguments(options), progress=not options.quiet)
    size = result.output.stat().st_size
    print(f"{result.output}: {size:,} bytes, {result.seconds:.0f} s, {result.images_per_second:.1f} images/s")
