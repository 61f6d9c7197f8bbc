"""``customdiff convert``: write another file format."""

from __future__ import annotations

import argparse
import json
import sys

from .common import existing, free_output

SUMMARY = "Write a concept in another file format."
EXAMPLES = """Any format is read and known by its content; docs/formats.md says what each holds.
customdiff, delta.bin and compvis are one file; diffusers, lora, kohya and webui a folder.

examples:
  customdiff convert delta.bin --to customdiff --base sd15/ --output dog.safetensors
  customdiff convert dog.safetensors --to diffusers --base sd15/ --output dog_diffusers/
  customdiff convert small.safetensors --to lora --output dog_lora/
  customdiff convert dog.safetensors --to webui --checkpoint v1-5-pruned.safetensors --output dog_webui/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("concept", metavar="IN", help="a concept file, or folder, of any format")
    parser.add_argument(
        "--to",
        required=True,
        choices=("customdiff", "delta.bin", "compvis", "diffusers", "lora", "kohya", "webui"),
        help="the format to write",
    )
    parser.add_argument("--output", required=True, help="the file or folder to write")
    parser.add_argument(
        "--base", help="pipeline folder of the base model, where a change becomes weights or the reverse"
    )
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="for webui: the base model as one .safetensors or .ckpt file"
    )
    parser.add_argument(
        "--kv-only", action="store_true", help="leave out what the input changes beside keys and values"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    parser.add_argument("--quiet", action="store_true", help="do not say what is being done")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    from ..converting import convert

    source, output = existing(options.concept), free_output(options, folder=True)
    if not (options.quiet or options.json):
        print(f"reading {source}, writing {options.to} …", file=sys.stderr)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = convert(
        source,
        output,
        options.to,
        base=options.base,
        checkpoint=options.checkpoint,
        kv_only=options.kv_only,
    )
    if options.json:
        print(json.dumps(done, indent=2))
        return
    if done["left_out"]:
        print(f"left out: {len(done['left_out'])} other weights, first {done['left_out'][0]}")
    words = ", ".join(done["modifier_tokens"]) or "no modifier token"
    others = f" and {len(done['others'])} other weights" if done["others"] else ""
    print(
        f"{output}: {done['segments']} segments{others} from {done['read']}, {words}, {done['bytes']:,} bytes"
    )
