"""The command line: ``customdiff COMMAND``, whose ``--help`` names the commands."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import config, evaluate_command
from .base import silence

EXAMPLES = """examples:
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --output dog.safetensors
  customdiff retrieve --images laion/ --prompts "photo of a <new1> dog" --output other_dogs/
  customdiff sample --concept dog.safetensors --prompt "photo of a <new1> dog in the snow"
  customdiff evaluate --concept dog.safetensors --pictures my_dog/ --prompts prompts.txt --output scores/
  customdiff merge dog.safetensors cat.safetensors --output both.safetensors
  customdiff compress dog.safetensors --energy 0.6 --output small.safetensors
  customdiff convert delta.bin --to customdiff --base sd15/ --output dog.safetensors
  customdiff inspect small.safetensors
"""
SAMPLE_EXAMPLES = """A --concept serves the --prompt before it; one that stands before all prompts serves each
that names its modifier token or, if it has none, each that no other concept serves. One that serves no prompt
is an error. All pictures are sampled in one batch.

examples:
  customdiff sample --concept dog.safetensors --prompt "photo of a <new1> dog" --prompt "a cat"
  customdiff sample --prompt "a <new1> dog" --concept dog.safetensors --prompt "a cup" --count 2
  customdiff sample --concept dog.safetensors --prompt "a <new1> dog in the snow" --output snow/
"""
TRAIN_EXAMPLES = """examples:
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --output dog.safetensors
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --regularization other_dogs/
  customdiff train --images my_cat/ --prompts "photo of a <new2> cat" "a <new2> cat" \\
      --modifier-token "<new2>" --initializer-token pll --output cat.safetensors
"""
RETRIEVE_EXAMPLES = """Captions stand in a .txt beside each picture, captions.csv or .jsonl, metadata.csv or
.jsonl, or Parquet files (columns caption or text; image, or a path). Duplicates are left out.

examples:
  customdiff retrieve --images laion/ --prompts "photo of a <new1> dog" --output other_dogs/
  customdiff retrieve --images laion.parquet --prompts "a dog" "a puppy" --threshold 0.8 --output other_dogs/
  customdiff train --images my_dog/ --prompts "photo of a <new1> dog" --regularization other_dogs/
"""
MERGE_EXAMPLES = """Modifier tokens that two files share are renamed, and the new names are printed.

examples:
  customdiff merge dog.safetensors cat.safetensors --output both.safetensors
  customdiff merge dog.safetensors cat.safetensors --base sd15/ --captions captions.txt --output both
  customdiff merge dog.safetensors cat.safetensors --together "a <new1> dog and a <new2> cat" --output both
"""
COMPRESS_EXAMPLES = """examples:
  customdiff compress dog.safetensors --energy 0.6 --output small.safetensors     the paper's "top 60%"
  customdiff compress dog.safetensors --max-bytes 100000 --output small.safetensors
  customdiff compress dog.safetensors --rank 16 --dtype float16 --output small.safetensors
"""
INSPECT_EXAMPLES = """A segment's energy is its share of the sum of all singular values.

examples:
  customdiff inspect dog.safetensors
  customdiff inspect dog.safetensors --plot singular_values.png
"""
CONVERT_EXAMPLES = """Any format is read and known by its content; docs/formats.md says what each holds.
customdiff, delta.bin and compvis are one file; diffusers, lora, kohya and webui a folder.

examples:
  customdiff convert delta.bin --to customdiff --base sd15/ --output dog.safetensors
  customdiff convert dog.safetensors --to diffusers --base sd15/ --output dog_diffusers/
  customdiff convert small.safetensors --to lora --output dog_lora/
  customdiff convert dog.safetensors --to webui --checkpoint v1-5-pruned.safetensors --output dog_webui/
"""
OPTIONAL = (
    "PIL",
    "accelerate",
    "diffusers",
    "matplotlib",
    "numpy",
    "torchmetrics",
    "tqdm",
    "transformers",
)  # not in a plain install


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after a one-line message about bad input."""
    silence()
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            options.run(options)
        except (ValueError, OSError) as error:
            print(f"customdiff {options.command}: error: {error}", file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in OPTIONAL:
                raise
            extra = {"matplotlib": "plot", "torchmetrics": "evaluation"}.get(package, "diffusers")
            print(
                f"customdiff {options.command}: error: {options.command} needs {package}: "
                f'pip install "customdiff_kernels[{extra}]"',
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            print(f"customdiff {options.command}: interrupted", file=sys.stderr)
            return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = _parser(
        argparse.ArgumentParser,
        prog="customdiff",
        description="Learn concepts from pictures; sample, merge, compress and inspect them.",
        epilog=EXAMPLES,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
        made = _parser(commands.add_parser, name, help=summary, description=summary, epilog=epilog)
        made.set_defaults(run=run)
        return made

    train = command("train", _train, "Learn a concept from a folder of pictures.", TRAIN_EXAMPLES)
    config.add_arguments(train)
    train.add_argument("--quiet", action="store_true", help="show no progress bar")

    retrieve = command(
        "retrieve", _retrieve, "Find regularization pictures in a captioned collection.", RETRIEVE_EXAMPLES
    )
    retrieve.add_argument(
        "--images", required=True, metavar="PATH", help="folder of captioned pictures, or a .parquet file"
    )
    retrieve.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="TEXT",
        help="what the captions are to say; <new1> and the like are taken out",
    )
    retrieve.add_argument("--output", required=True, help="the folder to write")
    retrieve.add_argument(
        "--threshold",
        type=float,
        default=0.85,
        help="least cosine of a caption and a prompt in CLIP's text space (default: 0.85)",
    )
    retrieve.add_argument("--count", type=_positive, default=200, help="the most pictures (default: 200)")
    retrieve.add_argument(
        "--modifier-token",
        nargs="+",
        default=(),
        metavar="WORD",
        help="to take out of the prompts, where it is not written as <new1>",
    )
    retrieve.add_argument(
        "--clip",
        metavar="DIR",
        help="folder of a CLIPModel in whose text space to compare (default: the base's text encoder)",
    )
    retrieve.add_argument("--overwrite", action="store_true", help="replace an earlier result at --output")
    _add_cache(retrieve)
    retrieve.add_argument("--json", action="store_true", help="print the report as JSON")
    retrieve.add_argument("--quiet", action="store_true", help="show no progress bar")
    _add_base(retrieve)

    sample = command("sample", _sample, "Draw pictures, with concepts or without.", SAMPLE_EXAMPLES)
    sample.add_argument(
        "--prompt", action=_Pair, required=True, metavar="TEXT", help="may be given several times"
    )
    sample.add_argument("--concept", action=_Pair, metavar="FILE", help="concept file of a prompt, or of all")
    sample.add_argument(
        "--output", default="sample.png", help="a .png for one sheet of all pictures, else a folder"
    )
    sample.add_argument("--count", type=_positive, default=4, help="pictures a prompt (default: 4)")
    sample.add_argument("--steps", type=_positive, default=50, help="denoising steps (default: 50)")
    sample.add_argument(
        "--guidance", type=float, help="guidance scale (default: 3 for the embedded base, else 6)"
    )
    sample.add_argument("--eta", type=float, default=0.0, help="0: DDIM; 1: the noise of DDPM (default: 0)")
    sample.add_argument(
        "--seed", type=int, default=0, help="of the first picture of each prompt (default: 0)"
    )
    sample.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to guide away from")
    sample.add_argument("--quiet", action="store_true", help="show no progress bar")
    _add_base(sample)

    evaluate = command(
        "evaluate",
        evaluate_command.run,
        "Draw samples and measure how they follow prompts and the concept's pictures.",
        evaluate_command.EXAMPLES,
    )
    evaluate_command.add_arguments(evaluate)
    _add_base(evaluate)

    merge = command("merge", _merge, "Put several concepts into one file, in closed form.", MERGE_EXAMPLES)
    merge.add_argument("concepts", nargs="+", metavar="FILE", help="two or more concept files of one base")
    merge.add_argument("--output", required=True, help="the concept file to write")
    merge.add_argument(
        "--captions",
        metavar="PATH",
        help="ordinary captions on which the base is to stay as it is: .txt (one a line), .csv, .jsonl or a "
        "captioned folder; about 1000 (default: of the embedded base's world)",
    )
    merge.add_argument(
        "--together",
        nargs="+",
        default=(),
        metavar="TEXT",
        help="prompts with several of the concepts, in which each is to stay itself, by the names that the "
        'merge gives them: "photo of a <new1> dog and a <new2> cat"',
    )
    merge.add_argument(
        "--no-padding",
        dest="padding",
        action="store_false",
        help="hold the concepts' words alone, not the padding after them: for a base with a narrow text",
    )
    merge.add_argument(
        "--ridge", type=_ridge, default=1e-6, help="of the solver: a share, or auto (default: 1e-6)"
    )
    merge.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    _add_cache(merge)
    merge.add_argument("--json", action="store_true", help="print the report as JSON")
    merge.add_argument("--quiet", action="store_true", help="show no progress bar")
    _add_base(merge)

    compress = command(
        "compress", _compress, "Keep the largest singular values of a concept.", COMPRESS_EXAMPLES
    )
    compress.add_argument("concept", metavar="FILE", help="the concept file")
    compress.add_argument("--output", required=True, help="the concept file to write")
    rule = compress.add_mutually_exclusive_group(required=True)
    rule.add_argument("--energy", type=float, help="share of the sum of singular values to keep, 0 to 1")
    rule.add_argument("--rank", type=int, help="singular values a matrix to keep")
    rule.add_argument("--max-bytes", type=int, help="bytes that all factors together may take")
    compress.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the factors (default: the file's own)"
    )
    compress.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    compress.add_argument("--json", action="store_true", help="print JSON")
    compress.add_argument("--quiet", action="store_true", help="show no progress bar")

    convert = command("convert", _convert, "Write a concept in another file format.", CONVERT_EXAMPLES)
    convert.add_argument("concept", metavar="IN", help="a concept file, or folder, of any format")
    convert.add_argument(
        "--to",
        required=True,
        choices=("customdiff", "delta.bin", "compvis", "diffusers", "lora", "kohya", "webui"),
        help="the format to write",
    )
    convert.add_argument("--output", required=True, help="the file or folder to write")
    convert.add_argument(
        "--base", help="pipeline folder of the base model, where a change becomes weights or the reverse"
    )
    convert.add_argument(
        "--checkpoint", metavar="FILE", help="for webui: the base model as one .safetensors or .ckpt file"
    )
    convert.add_argument(
        "--kv-only", action="store_true", help="leave out what the input changes beside keys and values"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    convert.add_argument("--quiet", action="store_true", help="do not say what is being done")
    convert.add_argument("--json", action="store_true", help="print JSON")

    inspect = command("inspect", _inspect, "Show what a concept file holds.", INSPECT_EXAMPLES)
    inspect.add_argument("concept", metavar="FILE", help="the concept file")
    inspect.add_argument("--plot", metavar="FILE.png", help="also plot the singular values")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--quiet", action="store_true", help="show no progress bar")
    return top


def _train(options: argparse.Namespace) -> None:
    from .trainer import train

    result = train(config.from_arguments(options), progress=not options.quiet)
    size = result.output.stat().st_size
    print(f"{result.output}: {size:,} bytes, {result.seconds:.0f} s, {result.images_per_second:.1f} images/s")


def _retrieve(options: argparse.Namespace) -> None:
    from .regularization import cache_folder
    from .retrieval import retrieve

    output = Path(options.output)
    _check_writable(output / "file" if output.is_dir() else output)
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


def _sample(options: argparse.Namespace) -> None:
    from .base import load_base
    from .sampler import sample
    from .sheet import contact_sheet

    output = Path(options.output)
    sheet = output.suffix.lower() == ".png"
    _check_writable(output if sheet else output / "prompt0.png")
    shared, pairs = options.pairs
    prompts = [prompt for prompt, _ in pairs]
    concepts = _concepts(shared, pairs)
    pipeline = load_base(options.base, options.device)
    guidance = options.guidance if options.guidance is not None else (3.0 if options.base is None else 6.0)
    pictures = sample(
        pipeline,
        [prompt for prompt in prompts for _ in range(options.count)],
        [concept for concept in concepts for _ in range(options.count)],
        negative_prompt=options.negative_prompt,
        steps=options.steps,
        guidance_scale=guidance,
        eta=options.eta,
        seeds=[options.seed + k for _ in prompts for k in range(options.count)],
        progress=not options.quiet,
    )
    rows = [(prompt, pictures[i * options.count :][: options.count]) for i, prompt in enumerate(prompts)]
    if sheet:
        output.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(rows, side=max(128, min(512, pictures[0].width))).save(output)
        print(output)
        return
    output.mkdir(parents=True, exist_ok=True)
    for i, (_, row) in enumerate(rows):
        for k, picture in enumerate(row):
            picture.save(output / f"prompt{i}_seed{options.seed + k}.png")
    print(f"{output}: {len(pictures)} pictures")


def _concepts(shared: list[str], pairs: list[tuple[str, str | None]]) -> list[Any]:
    """The concept of each (prompt, its own file); without a file the one of the shared files that fits."""
    from .concept import Concept, match

    own = [file for _, file in pairs if file]
    files = {name: Concept.load(_file(name)) for name in dict.fromkeys([*shared, *own])}
    common = {name: files[name] for name in shared}
    matched = match([prompt for prompt, file in pairs if not file], list(common.values()))
    for name, concept in common.items():
        if not any(found is concept for found in matched):
            words = " or ".join(concept.modifier_tokens)
            why = f"none names its modifier token {words}" if words else "each has another concept"
            raise ValueError(
                f"--concept {name} serves no --prompt: {why}; correct a prompt, or leave the file out"
            )
    rest = iter(matched)
    return [files[file] if file else next(rest) for _, file in pairs]


def _merge(options: argparse.Namespace) -> None:
    from .base import embedded_captions, load_base
    from .concept import Concept
    from .data import read_captions
    from .merging import merge, renamed
    from .regularization import cache_folder

    output = _free(options)
    loaded = [Concept.load(_file(name)) for name in options.concepts]
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


def _compress(options: argparse.Namespace) -> None:
    import torch

    import customdiff_kernels as ck

    from .concept import Concept
    from .converting import size
    from .inspection import compression_table

    output = _free(options)
    concept = Concept.load(_file(options.concept))
    if concept.weights:
        raise ValueError(
            f"{options.concept} holds whole weights, not a change of a base: make it one first, with "
            f"customdiff convert {options.concept} --to customdiff --base DIR --output FILE"
        )
    with _bar("compressing", concept.delta, options.quiet) as bar:
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


def _convert(options: argparse.Namespace) -> None:
    from .converting import convert

    output, source = Path(options.output), _file(options.concept)
    _check_writable(output / "file" if output.is_dir() else output)
    if output.exists() and not options.overwrite:
        raise ValueError(f"output {options.output!r} exists; name another, or pass --overwrite")
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
    print(f"{output}: {done['segments']} segments from {done['read']}, {words}, {done['bytes']:,} bytes")


def _inspect(options: argparse.Namespace) -> None:
    import customdiff_kernels as ck

    from .concept import Concept
    from .converting import size
    from .inspection import describe, plotter, table

    path = _file(options.concept)
    if options.plot is not None:
        _check_writable(Path(options.plot))
    plot = plotter(Path(options.plot)) if options.plot is not None else None
    concept = Concept.load(path)
    matrices = concept.delta or concept.weights
    with _bar("inspecting", matrices, options.quiet) as bar:
        values = ck.singular_values(matrices, progress=bar.update) if matrices else {}
    found = describe(concept, size(path), values)
    print(json.dumps(found, indent=2) if options.json else table(found))
    if plot is not None:
        Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
        plot(values)


def _bar(title: str, delta: Any, quiet: bool) -> Any:
    """A bar over the segments of a delta; none where tqdm is not installed."""
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        return contextlib.nullcontext(argparse.Namespace(update=None))
    total = len(getattr(delta, "factors", delta))
    return tqdm(desc=title, total=total, unit="segment", disable=quiet, leave=False, delay=0.5)


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


def _parser(make: Any, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
    return make(*args, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        metavar="DIR",
        help="where the captions' part is kept for the next time (default: customdiff/ in the cache home)",
    )
    cache.add_argument("--no-cache", action="store_true", help="neither look there nor keep it")


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="folder of a Stable Diffusion pipeline (default: the embedded one)")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


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


def _file(name: str) -> Path:
    path = Path(name)
    if not path.exists():
        raise ValueError(f"concept file {name!r} does not exist")
    return path


def _free(options: argparse.Namespace) -> Path:
    output = Path(options.output)
    _check_writable(output)
    if output.exists() and not options.overwrite:
        raise ValueError(f"output {options.output!r} exists; name another, or pass --overwrite")
    return output


def _check_writable(file: Path) -> None:
    """Raises before the work what writing `file` would raise after it; makes nothing."""
    if file.is_dir():
        raise ValueError(f"output {str(file)!r} is a folder; name a file")
    nearest = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"output {str(file)!r} cannot be written: {str(nearest)!r} is no folder to write to")


def _show_warning(message: Any, category: Any, *where: Any, **more: Any) -> None:
    if not issubclass(category, (FutureWarning, DeprecationWarning)):
        print(f"customdiff: warning: {message}", file=sys.stderr)
