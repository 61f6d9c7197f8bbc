"""``customdiff analyse``: what training changed, and how good the concept is."""

from __future__ import annotations

import argparse

SUMMARY = "Plot and tabulate what training changed and how good it is: the paper's analyses."
EXAMPLES = """customdiff analyse KIND --help says more. Each writes a plot (PNG) and its data (JSON, CSV).

examples:
  customdiff analyse weights dog.safetensors --output dog_weights/
  customdiff analyse compression dog.safetensors --pictures my_dog/ --prompts prompts.txt --category dog \\
      --output dog_compression/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..analysis import KINDS  # not above: they share this package's options

    kinds = parser.add_subparsers(dest="kind", required=True, metavar="kind")
    for name, kind in KINDS.items():
        made = kinds.add_parser(
            name,
            help=kind.SUMMARY,
            description=kind.SUMMARY,
            epilog=kind.EXAMPLES,
            formatter_class=parser.formatter_class,
            allow_abbrev=False,
        )
        kind.add_arguments(made)


def run(options: argparse.Namespace) -> None:
    from ..analysis import KINDS

    KINDS[options.kind].run(options)
