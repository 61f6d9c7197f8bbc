"""``customdiff sample``: draw pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import (
    add_base,
    add_drawing,
    check_pictures,
    existing,
    guidance_scale,
    match_files,
    save_pictures,
)

SUMMARY = "Draw pictures, with concepts or without."
EXAMPLES = """A --concept serves the --prompt before it; one that stands before all prompts serves each
that names its modifier token or, if it has none, each that no other concept serves. One that serves no prompt
is an error. All pictures are sampled in one batch.

examples:
  customdiff sample --concept dog.safetensors --prompt "photo of a <new1> dog" --prompt "a cat"
  customdiff sample --prompt "a <new1> dog" --concept dog.safetensors --prompt "a cup" --count 2
  customdiff sample --concept dog.safetensors --prompt "a <new1> dog in the snow" --output snow/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action=_Pair, required=True, metavar="TEXT", help="may be given several times"
    )
    parser.add_argument("--concept", action=_Pair, metavar="FILE", help="concept file of a prompt, or of all")
    parser.add_argument(
        "--output", default="sample.png", help="a .png for one sheet of all pictures, else a folder"
    )
    add_drawing(parser)
    parser.add_argument("--eta", type=float, default=0.0, help="0: DDIM; 1: the noise of DDPM (default: 0)")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add_base(parser)


def run(options: argparse.Namespace) -> None:
    from ..base import load_base
    from ..sampler import sample

    output = Path(options.output)
    check_pictures(output)
    shared, pairs = options.pairs
    prompts = [prompt for prompt, _ in pairs]
    concepts = _concepts(shared, pairs)
    pipeline = load_base(options.base, options.device)
    pictures = sample(
        pipeline,
        [prompt for prompt in prompts for _ in range(options.count)],
        [concept for concept in concepts for _ in range(options.count)],
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance_scale=guidance_scale(options),
        eta=options.eta,
        seeds=[options.seed + k for _ in prompts for k in range(options.count)],
        progress=not options.quiet,
    )
    rows = [(prompt, pictures[i * options.count :][: options.count]) for i, prompt in enumerate(prompts)]
    save_pictures(output, rows, [f"prompt{i}" for i in range(len(rows))], options.seed)


class _Pair(argparse.Action):
    """Collects --prompt and --concept into ``pairs``: (files before any prompt, [(prompt, file or None)])."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None
    ) -> None:
        shared, pairs = getattr(namespace, "pairs", None) or ([], [])
        if flag == "--prompt":
            pairs.append((value, None))
        elif not pairs:
            shared.append(value)
        elif pairs[-1][1] is not None:
            parser.error(f"--concept {value}: the prompt {pairs[-1][0]!r} has one already; merge them first")
        else:
            pairs[-1] = (pairs[-1][0], value)
        namespace.pairs = (shared, pairs)
        setattr(namespace, self.dest, value)


def _concepts(shared: list[str], pairs: list[tuple[str, str | None]]) -> list[Any]:
    """The concept of each (prompt, its own file); without a file the one of the shared files that fits."""
    from ..concept import Concept

    own = [file for _, file in pairs if file]
    files = {name: Concept.load(existing(name)) for name in dict.fromkeys([*shared, *own])}
    common = {name: files[name] for name in shared}
    matched = match_files([prompt for prompt, file in pairs if not file], common, "--prompt")
    rest = iter(matched)
    return [files[file] if file else next(rest) for _, file in pairs]
