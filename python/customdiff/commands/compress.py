"""``customdiff compress``: keep the largest singular values."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from .common import existing, free_output, segment_bar

SUMMARY = "Keep the largest singular values of a concept."
EXAMPLES = """examples:
  customdiff compress dog.safetensors --energy 0.6 --output small.safetensors     the paper's "top 60%"
  customdiff compress dog.safetensors --max-bytes 100000 --output small.safetensors
  customdiff compress dog.safetensors --rank 16 --dtype float16 --output small.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="FILE", help="the concept file")
    parser.add_argument("--output", required=True, help="the concept file to write")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--energy", type=float, help="share of the sum of singular values to keep, 0 to 1")
    rule.add_argument("--rank", type=int, help="singular values a matrix to keep")
    rule.add_argument("--max-bytes", type=int, help="bytes that all factors together may take")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the factors (default: the file's own)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def run(options: argparse.Namespace) -> None:
    import torch

    import customdiff_kernels as ck

    from ..concept import Concept
    from ..converting import size
    from ..inspection import compression_table

    output = free_output(options)
    concept = Concept.load(existing(options.concept))
    if concept.weights:
        raise ValueError(
            f"{options.concept} holds whole weights, not a change of a base: make it one first, with "
            f"customdiff convert {options.concept} --to customdiff --base DIR --output FILE"
        )
    if concept.others:
        raise ValueError(
            f"{options.concept} changes {len(concept.others)} weights beside keys and values, first "
            f"{next(iter(concept.others))}, which are not compressed; customdiff convert --kv-only leaves "
            "them out"
        )
    if not concept.delta:
        raise ValueError(f"{options.concept} holds modifier tokens alone: there is nothing to compress")
    with segment_bar("compressing", concept.delta, options.quiet) as bar:
        delta, report = ck.compress(
            concept.delta,
            energy=options.energy,
            rank=options.rank,
            max_bytes=options.max_bytes,
            dtype=options.dtype and getattr(torch, options.dtype),
            report=True,
            progress=bar.update,
        )
    before = size(Path(options.concept))  # which --output may replace
    output.parent.mkdir(parents=True, exist_ok=True)
    Concept(delta, concept.modifier_tokens, concept.metadata).save(output)
    after = output.stat().st_size
    if options.json:
        print(json.dumps({**dataclasses.asdict(report), "file_bytes": after}, indent=2))
        return
    print(compression_table(report))
    print(f"{output}: {after:,} bytes, {after / before:.1%} of {before:,}")
