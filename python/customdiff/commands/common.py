"""What several commands share: options, and looks at files before the work."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base import default_guidance
from ..output import check_writable


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def existing(name: str) -> Path:
    path = Path(name)
    if not path.exists():
        raise ValueError(f"concept file {name!r} does not exist")
    return path


def free_output(options: argparse.Namespace, folder: bool = False) -> Path:
    """``--output``, which nothing is in the way of; with `folder` it may be one that is to be replaced."""
    output = Path(options.output)
    check_writable(output, folder)
    if output.exists() and not options.overwrite:
        raise ValueError(f"output {options.output!r} exists; name another, or pass --overwrite")
    return output


def check_pictures(output: Path) -> None:
    """Raises before the work what ``save_pictures`` would raise after it."""
    check_writable(output if is_sheet(output) else output / "picture.png")


def is_sheet(output: Path) -> bool:
    """Whether ``save_pictures`` writes one sheet of all; else a folder."""
    return output.suffix.lower() == ".png"


def save_pictures(
    output: Path, rows: Sequence[tuple[str, Sequence[Any]]], names: list[str], seed: int
) -> None:
    """Writes `rows`, each (label, its pictures of seeds from `seed` on), and prints where.

    A .png is one sheet of all; anything else a folder for NAME_seed0.png, ..., with a name for each row.
    """
    from ..sheet import contact_sheet

    if is_sheet(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, side=max(128, min(512, rows[0][1][0].width))).save(output)
        print(output)
        return
    output.mkdir(parents=True, exist_ok=True)
    for name, (_, pictures) in zip(names, rows, strict=True):
        for k, picture in enumerate(pictures):
            picture.save(output / f"{name}_seed{seed + k}.png")
    print(f"{output}: {sum(len(pictures) for _, pictures in rows)} pictures")


def match_files(prompts: Sequence[str], concepts: Mapping[str, Any], flag: str) -> list[Any]:
    """``concept.match`` with the concepts of files, {name: Concept}, each of which must serve a prompt."""
    from ..concept import match

    matched = match(prompts, list(concepts.values()))
    for name, concept in concepts.items():
        if not any(found is concept for found in matched):
            words = " or ".join(concept.modifier_tokens)
            why = f"none names its modifier token {words}" if words else "each has another concept"
            raise ValueError(
                f"--concept {name} serves no {flag}: {why}; correct a prompt, or leave the file out"
            )
    return matched


def add_cache(parser: argparse.ArgumentParser) -> None:
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        metavar="DIR",
        help="where the captions' part is kept for the next time (default: customdiff/ in the cache home)",
    )
    cache.add_argument("--no-cache", action="store_true", help="neither look there nor keep it")


def guidance_scale(options: argparse.Namespace) -> float:
    """``--guidance``, or what suits the base."""
    return default_guidance(options.base is None) if options.guidance is None else options.guidance


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How samples are drawn and in which CLIP they are scored: `sampling` and `clip` read it."""
    add = parser.add_argument
    add("--samples", type=int, default=10, help="a prompt; the paper's figures are of 50 (default: 10)")
    add("--steps", type=int, default=50, help="denoising steps (default: 50)")
    add("--guidance", type=float, help="guidance scale (default: 3 for the embedded base, else 6)")
    add("--eta", type=float, default=0.0, help="0: DDIM; 1: the paper's, the noise of DDPM (default: 0)")
    add("--seed", type=int, default=0, help="of the first picture (default: 0)")
    add("--batch-size", type=int, default=8, help="pictures drawn at once (default: 8)")
    add("--clip", metavar="DIR", help="CLIPModel folder to measure with (default: the embedded base's)")


def sampling(options: argparse.Namespace) -> Any:
    """The ``Sampling`` that the options of `add_sampling` ask for."""
    from ..evaluation import Sampling

    o = options
    return Sampling(o.samples, o.steps, guidance_scale(o), o.eta, o.seed, o.batch_size)


def clip(options: argparse.Namespace, device: Any) -> Any:
    """The ``Clip`` to measure with: ``--clip``, or that of the embedded base."""
    import tinysd

    from ..metrics import Clip

    if options.clip is None and options.base is not None:
        raise ValueError("--clip is needed with --base: the embedded CLIP knows the embedded base's world")
    return Clip(options.clip or tinysd.clip_path(), device)


def add_drawing(parser: argparse.ArgumentParser, guidance: str = "3 for the embedded base, else 6") -> None:
    """What pictures of a prompt are drawn with; `guidance` says what its default is."""
    add = parser.add_argument
    add("--count", type=positive, default=4, help="pictures a prompt (default: 4)")
    add("--steps", type=positive, default=50, help="denoising steps (default: 50)")
    add("--guidance", type=float, help=f"guidance scale (default: {guidance})")
    add("--seed", type=int, default=0, help="of the first picture of each prompt (default: 0)")
    add("--quiet", action="store_true", help="show no progress bar")


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="folder of a Stable Diffusion pipeline (default: the embedded one)")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def segment_bar(title: str, delta: Any, quiet: bool) -> Any:
    """A bar over the segments of a delta; none where tqdm is not installed."""
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return contextlib.nullcontext(argparse.Namespace(update=None))
    total = len(getattr(delta, "factors", delta))
    return tqdm(desc=title, total=total, unit="segment", disable=quiet, leave=False, delay=0.5)
