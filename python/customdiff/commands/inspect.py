"""``customdiff inspect``: what a concept file holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..output import check_writable
from .common import existing, segment_bar

SUMMARY = "Show what a concept file holds."
EXAMPLES = """A segment's energy is its share of the sum of all singular values.

examples:
  customdiff inspect dog.safetensors
  customdiff inspect dog.safetensors --plot singular_values.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="FILE", help="the concept file")
    parser.add_argument("--plot", metavar="FILE.png", help="also plot the singular values")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(options: argparse.Namespace) -> None:
    import customdiff_kernels as ck

    from ..concept import Concept
    from ..converting import size
    from ..inspection import describe, plotter, table

    path = existing(options.concept)
    if options.plot is not None:
        check_writable(Path(options.plot))
    plot = plotter(Path(options.plot)) if options.plot is not None else None
    concept = Concept.load(path)
    matrices = concept.delta or concept.weights
    with segment_bar("inspecting", matrices, options.quiet) as bar:
        values = ck.singular_values(matrices, progress=bar.update) if matrices else {}
    found = describe(concept, size(path), values)
    print(json.dumps(found, indent=2) if options.json else table(found))
    if plot is not None:
        Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
        plot(values)
