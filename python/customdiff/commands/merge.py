"""``customdiff merge``: several concepts in one file."""

from __future__ import annotations

import argparse
import json
import math

from .common import add_base, add_cache, existing, free_output

SUMMARY = "Put several concepts into one file, in closed form."
EXAMPLES = """Modifier tokens that two files share are renamed, and the new names are printed.

examples:
  customdiff merge dog.safetensors cat.safetensors --output both.safetensors
  customdiff merge dog.safetensors cat.safetensors --base sd15/ --captions captions.txt --output both
  customdiff merge dog.safetensors cat.safetensors --together "a <new1> dog and a <new2> cat" --output both
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concepts", nargs="+", metavar="FILE", help="two or more concept files of one base")
    parser.add_argument("--output", required=True, help="the concept file to write")
    parser.add_argument(
        "--captions",
        metavar="PATH",
        help="ordinary captions on which the base is to stay as it is: .txt (one a line), .csv, .jsonl or a "
        "captioned folder; about 1000 (default: of the embedded base's world)",
    )
    parser.add_argument(
        "--together",
        nargs="+",
        default=(),
        metavar="TEXT",
        help="prompts with several of the concepts, in which each is to stay itself, by the names that the "
        'merge gives them: "photo of a <new1> dog and a <new2> cat"',
    )
    parser.add_argument(
        "--no-padding",
        dest="padding",
        action="store_false",
        help="hold the concepts' words alone, not the padding after them: for a base with a narrow text",
    )
    parser.add_argument(
        "--ridge", type=_ridge, default=1e-6, help="of the solver: a share, or auto (default: 1e-6)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    add_cache(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    add_base(parser)


def run(options: argparse.Namespace) -> None:
    from ..base import embedded_captions, load_base
    from ..concept import Concept
    from ..data import read_captions
    from ..merging import merge, renamed
    from ..regularization import cache_folder

    output = free_output(options)
    loaded = [Concept.load(existing(name)) for name in options.concepts]
    if options.captions is not None:
        captions = read_captions(options.captions)
    elif options.base is None:
        captions = embedded_captions()
    else:
        raise ValueError(
            "--captions is needed with --base: a file of about 1000 ordinary captions, one a line"
        )
    concepts, changes = renamed(loaded)
    base = load_base(options.base, options.device)
    merged, report = merge(
        concepts,
        base,
        captions,
        together=options.together,
        padding=options.padding,
        ridge=options.ridge,
        cache=None if options.no_cache else options.cache or cache_folder(),
        progress=not options.quiet,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    merged.save(output)
    if options.json:
        found = {
            "output": str(output),
            "bytes": output.stat().st_size,
            "modifier_tokens": list(merged.modifier_tokens),
            "renamed": [{"file": options.concepts[i], "old": old, "new": new} for i, old, new in changes],
            "residual": {name: rows.tolist() for name, rows in report.residual.items()},
        }
        names = "drift concept_drift gram_condition constraint_condition ridge dropped".split()
        print(json.dumps(found | {name: getattr(report, name) for name in names}, indent=2))
        return
    for index, old, new in changes:
        print(f"{old} of {options.concepts[index]} is called {new} in the merge")
    residual = max(float(rows.max()) for rows in report.residual.values())
    print(
        f"targets kept to {residual:.1e}, ordinary captions moved by {report.drift:.1e}, "
        f"ridge {report.ridge:g}"
    )
    print(f"{output}: {', '.join(merged.modifier_tokens)}, {output.stat().st_size:,} bytes")


def _ridge(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        ridge = float(text)
    except ValueError:
        ridge = math.nan
    if not 0 <= ridge < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, or auto, got {text!r}")
    return ridge
