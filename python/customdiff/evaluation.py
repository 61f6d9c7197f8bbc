"""Evaluation: how well samples follow their prompts, and how like the concept's pictures they are.

Samples are drawn in batches of fixed make-up, and a batch of which a picture is missing is drawn again as a
whole: so an interrupted evaluation ends in the same bits as an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

import customdiff_kernels as ck

from . import sampler
from .concept import Concept, match, mentions, tokenize
from .data import picture_paths
from .metrics import Clip, Dino, torchmetrics_classes, without_words
from .prompts import existing, fill, modifiers
from .scoring import Results, Row, Sample, Target, opened, score, write
from .sheet import contact_sheet

SHEET_PROMPTS, SHEET_SAMPLES, SHEET_SIDE = 40, 8, 128


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; Custom Diffusion's figures are of 50 a prompt, 50 steps, scale 6 and eta 1.

    Raises ValueError if a number is out of range.
    """

    samples: int = 10  # a prompt
    steps: int = 50
    guidance_scale: float = 6.0
    eta: float = 0.0
    seed: int = 0  # of the first sample; every other's is the next, on through all prompts
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("steps", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be from 0 (DDIM) to 1 (DDPM), got {self.eta}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}")


def evaluate(
    prompts: str | Sequence[str],
    pictures: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    clip: Clip,
    dino: Dino | None = None,
    reference: str | Path | None = None,
    pipe: Any = None,
    concepts: Sequence[Concept] = (),
    sampling: Sampling | None = None,
    samples_from: str | Path | None = None,
    modifier_tokens: Sequence[str] = (),
    categories: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
) -> Results:
    """Draw samples of every prompt, or take those of ``samples_from``, and score them.

    Args:
        prompts: with the concepts' modifier tokens, or {} or {0}, {1} in their places (`fill`). If there are
            none, the captions of ``samples_from`` are the prompts.
        pictures: folders of the concept's pictures: one for all samples, or one for each modifier token, with
            which the samples of the prompts that name it are compared.
        output: folder for samples/, configuration.json, results.json, results.csv, results.md and sheet.png.
            Samples that it holds already, of the same configuration, are not drawn again.
        reference: folder of real pictures for KID and FID; needs torchmetrics.
        pipe: the base's StableDiffusionPipeline to sample with, unless there is ``samples_from``.
        concepts: each serves the prompts that name its modifier token; without any, the base draws alone.
        modifier_tokens: taken out of the prompts that are scored; default: the concepts', or else <words>.
        categories: a noun for each modifier token, for the placeholders.
        overwrite: remove the samples that ``output`` holds, of whichever configuration, and start anew.

    Raises ValueError, before anything is written, for bad input and for ``output`` of another configuration.
    """
    if (pipe is None) == (samples_from is None):
        raise ValueError("give either pipe, to draw samples, or samples_from, a folder that holds them")
    output, sampling = Path(output), sampling or Sampling()
    words = list(modifier_tokens) or list(dict.fromkeys(w for c in concepts for w in c.modifier_tokens))
    prompts = fill([prompts] if isinstance(prompts, str) else prompts, words, categories)
    pictures = [pictures] if isinstance(pictures, (str, Path)) else pictures
    samples: list[Sample] = []
    configuration: dict[str, Any]
    if samples_from is not None:
        prompts, samples = existing(samples_from, prompts)
        configuration = {"samples_from": str(samples_from), "prompts": prompts}
    else:
        chosen, configuration = check(pipe, prompts, concepts, output, sampling, overwrite)
    words = words or modifiers(prompts)
    texts = [without_words(prompt, words) for prompt in prompts]
    if "" in texts:
        prompt = prompts[texts.index("")]
        raise ValueError(f"prompt {prompt!r} has nothing to compare beside its modifier token; add words")
    targets = _targets(pictures, words, prompts)
    references = _references(reference, len(samples) or len(prompts) * sampling.samples)

    _claim(output, configuration, overwrite)
    if samples_from is None:
        samples = draw(pipe, prompts, chosen, output / "samples", sampling, progress=progress)
    scores, summary, scales = score(samples, texts, targets, clip, dino, references)
    counts = [sum(index == i for _, index in samples) for i in range(len(prompts))]
    rows = [Row(*row) for row in zip(prompts, texts, counts, scores, strict=True)]
    configuration |= {"clip": clip.name, "dino": dino and dino.name, "pictures": list(map(str, pictures))}
    configuration["reference"] = reference and str(reference)
    results = Results(rows, summary, scales, configuration, _versions(reference is not None))
    results.save(output)
    _draw_sheet(output / "sheet.png", targets, prompts, samples)
    return results


def check(
    pipe: Any,
    prompts: Sequence[str],
    concepts: Sequence[Concept],
    output: Path,
    sampling: Sampling,
    overwrite: bool = False,
) -> tuple[list[Concept | None], dict[str, Any]]:
    """The concept of each prompt, and what the samples depend on.

    Raises ValueError, having written nothing, if they cannot be drawn, or not into the folder ``output``.
    """
    chosen = _concept_of_each(pipe, prompts, concepts)
    configuration = {**_fingerprints(pipe, concepts), **asdict(sampling), "prompts": list(prompts)}
    _check_output(output, configuration, overwrite)
    return chosen, configuration


def draw(
    pipe: Any,
    prompts: Sequence[str],
    concepts: Sequence[Concept | None],
    folder: Path,
    sampling: Sampling,
    *,
    progress: bool = True,
) -> list[Sample]:
    """The samples of all prompts in ``folder``, as prompt<index>_seed<seed>.png; those missing are drawn.

    ``concepts``: one for each prompt, or None. The bits of a sample depend on its batch's make-up, so a batch
    that lacks one is drawn whole; a sample that is there is left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for i in range(len(prompts)):
        for seed in range(sampling.seed + i * sampling.samples, sampling.seed + (i + 1) * sampling.samples):
            jobs.append((folder / f"prompt{i}_seed{seed}.png", i, seed))
    bar = tqdm(total=len(jobs), desc="samples", unit="picture", disable=not progress)
    for start in range(0, len(jobs), sampling.batch_size):
        batch = jobs[start : start + sampling.batch_size]
        if not all(path.exists() for path, _, _ in batch):
            drawn = sampler.sample(
                pipe,
                [prompts[i] for _, i, _ in batch],
                [concepts[i] for _, i, _ in batch],
                steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                eta=sampling.eta,
                seeds=[seed for _, _, seed in batch],
                progress=False,
            )
            for (path, _, _), picture in zip(batch, drawn, strict=True):
                if not path.exists():
                    write(path, picture)
        bar.update(len(batch))
    bar.close()
    return [(path, i) for path, i, _ in jobs]


def _concept_of_each(pipe: Any, prompts: Sequence[str], concepts: Sequence[Concept]) -> list[Concept | None]:
    """The concept of each prompt; raises for a prompt or a concept that could not be sampled."""
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    chosen = match(prompts, concepts)
    for prompt, found in zip(prompts, chosen, strict=True):
        if found is None and concepts:
            known = ", ".join(map(str, concepts))
            raise ValueError(f"prompt {prompt!r} names no modifier token of the concepts ({known}); add one")
    for concept in concepts:
        if not any(found is concept for found in chosen):
            raise ValueError(f"concept {concept} serves no prompt; add one that names it, or leave it out")
    stack = ck.KVStack.from_unet(pipe.unet)
    for concept in concepts:
        concept.check_base(stack)
    tokenize(pipe.tokenizer, prompts, [found.modifier_tokens if found else {} for found in chosen])
    return chosen


def _fingerprints(pipe: Any, concepts: Sequence[Concept]) -> dict[str, Any]:
    """What the samples depend on beside numbers, as digests of its content."""
    found = [f"{concept}, sha256 {fingerprint(concept)}" for concept in concepts]
    return {"base_hash": ck.KVStack.from_unet(pipe.unet).hash(), "concepts": found}


def fingerprint(concept: Concept) -> str:
    """A sha256 (hex) of all that a concept changes, whatever its metadata says."""
    delta, digest = concept.delta, hashlib.sha256()
    factors = delta.factors if isinstance(delta, ck.LowRankDelta) else delta
    rows = {**concept.weights, **concept.others, **concept.modifier_tokens}
    for name, held in [*factors.items(), *rows.items()]:
        digest.update(name.encode())
        for tensor in (held,) if isinstance(held, torch.Tensor) else held:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _targets(folders: Sequence[str | Path], words: Sequence[str], prompts: Sequence[str]) -> list[Target]:
    if len(folders) == 1:
        return [Target("", picture_paths(folders[0]), list(range(len(prompts))))]
    if len(folders) != len(words):
        raise ValueError(
            f"pictures: got {len(folders)} folders for the modifier tokens {', '.join(words) or '(none)'}; "
            "give one for all samples, or one for each token"
        )
    targets = []
    for folder, word in zip(folders, words, strict=True):
        named = [i for i, prompt in enumerate(prompts) if mentions(prompt, [word])]
        if not named:
            raise ValueError(f"pictures {str(folder)!r} are of {word}, which no prompt names")
        targets.append(Target(word, picture_paths(folder), named))
    return targets


def _references(folder: str | Path | None, samples: int) -> list[Path]:
    if folder is None:
        return []
    torchmetrics_classes()
    found = picture_paths(folder)
    if min(len(found), samples) < 2:
        raise ValueError(
            f"reference {str(folder)!r}: KID and FID need two pictures on each side, better hundreds; there "
            f"are {len(found)} and {samples} samples"
        )
    return found


def _claim(output: Path, configuration: dict[str, Any], overwrite: bool) -> None:
    """Makes `output` the folder of this configuration, or raises if it is another's."""
    held = _check_output(output, configuration, overwrite)
    for path in held if overwrite else ():
        path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    write(output / "configuration.json", json.dumps(configuration, indent=2, ensure_ascii=False) + "\n")


def _check_output(output: Path, configuration: dict[str, Any], overwrite: bool) -> list[Path]:
    """The samples that `output` holds; raises if it is of another configuration, unless it may be."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {str(output)!r} is a file; name a folder")
    file, wanted = output / "configuration.json", json.loads(json.dumps(configuration))
    drawn_here = "samples_from" not in configuration  # else what lies in samples/ may be what is to be scored
    held = list((output / "samples").glob("prompt*_seed*.png")) if drawn_here else []
    if overwrite:
        return held
    if file.exists():
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(file)!r} is damaged ({error}); remove it with the samples") from error
        changed = sorted(name for name in wanted.keys() | other if wanted.get(name) != other.get(name))
        if changed:
            raise ValueError(
                f"output {str(output)!r} holds an evaluation with other {', '.join(changed)}: name another "
                "folder, or overwrite it"
            )
    elif held:
        raise ValueError(
            f"output {str(output)!r} holds samples of an unknown configuration: name another folder, or "
            "overwrite it"
        )
    return held


def _versions(distances: bool) -> dict[str, str]:
    packages = ["torch", "transformers", "diffusers", *(["torchmetrics"] if distances else [])]
    found = {name: version(name) for name in packages}
    return {"customdiff_kernels": ck.__version__, **found, "python": platform.python_version()}


def _draw_sheet(
    path: Path, targets: Sequence[Target], prompts: Sequence[str], samples: Sequence[Sample]
) -> None:
    rows = []
    for target in targets:
        label = f"the pictures of {target.label or 'the concept'}"
        rows.append((label, _thumbnails(target.pictures)))
    for i, prompt in enumerate(prompts[:SHEET_PROMPTS]):
        rows.append((prompt, _thumbnails([path for path, index in samples if index == i])))
    more = len(prompts) - SHEET_PROMPTS
    write(
        path, contact_sheet(rows, side=SHEET_SIDE, title=f"without {more} more prompts" if more > 0 else "")
    )


def _thumbnails(paths: Sequence[Path]) -> list[Image.Image]:
    made = list(opened(paths[:SHEET_SAMPLES]))
    for picture in made:
        picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return made
