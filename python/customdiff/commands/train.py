"""``customdiff train``: learn a concept from a folder of pictures."""

from __future__ import annotations

import argparse
import os

from .. import options as training_options

SUMMARY = "Learn a concept from a folder of pictures."
EXAMPLES = """examples:
  customdiff train --images my_dog/ --category dog --regularization other_dogs/ --output dog.safetensors
  customdiff train --images my_dog/ --category dog --preset paper --base sd15/ --steps 300
  customdiff train --concepts concept_list.json --output dog_and_cat.safetensors
  customdiff train --start-from dog.safetensors --images my_cat/ --category cat --modifier-token "<new2>" \\
      --output dog_then_cat.safetensors
  customdiff train --images moongates/ --category moongate --modifier-token none --regularization generated
  customdiff train --images prints/ --category art --style --validation-prompts "a <new1> art dog"
  customdiff train --method cones2 --images my_dog/ --category dog --output dog_residual.safetensors
  customdiff train --config run.yaml --resume
  accelerate launch --num_processes 2 -m customdiff train --config run.yaml   # one process a GPU
  torchrun --nproc-per-node 2 -m customdiff train --config run.yaml           # also on CPUs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training_options.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(options: argparse.Namespace) -> None:
    from ..trainer import train

    result = train(training_options.from_arguments(options), progress=not options.quiet)
    if int(os.environ.get("RANK", 0)):
        return  # the first process says it for all
    size = result.output.stat().st_size
    print(f"{result.output}: {size:,} bytes, {result.seconds:.0f} s, {result.images_per_second:.1f} images/s")
