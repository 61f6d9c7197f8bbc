"""Scores of samples against their prompts and real pictures, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .data import open_picture, replacing
from .metrics import CLIP_SCORE, SUBSET, Clip, Dino, alignment, fid, kid

Sample = tuple[Path, int]  # a picture, and the index of its prompt
Scores = dict[str, float | None]
SCALES = {
    "text_alignment": "cosine with the prompt, its modifier tokens taken out, in {clip}",
    "clip_score": f"{CLIP_SCORE} · max(text_alignment, 0), CLIPScore",
    "image_alignment": "mean cosine with the concept's pictures in {clip}",
    "dino_alignment": "mean cosine of class tokens with the concept's pictures in {dino}",
    "kid": "squared MMD of {samples} samples and {real} reference pictures, mean over subsets of {subset}; "
    "over image embeddings of {clip}, not of Inception",
    "kid_std": "deviation of kid over its subsets",
    "fid": "Fréchet distance over the same embeddings",
}


@dataclass(frozen=True)
class Target:
    """Real pictures of one concept, and the indices of the prompts whose samples are compared with them."""

    label: str  # the modifier token, or "" where one folder is for all
    pictures: list[Path]
    prompts: list[int]


@dataclass(frozen=True)
class Row:
    """Mean scores of the samples of one prompt, None where one does not apply; `text` was compared."""

    prompt: str
    text: str
    samples: int
    scores: Scores


@dataclass(frozen=True)
class Results:
    """What an evaluation found. `summary`: means over all samples, and KID and FID; `scales` says of what."""

    rows: list[Row]
    summary: Scores
    scales: dict[str, str]
    configuration: dict[str, Any]
    versions: dict[str, str]

    def save(self, folder: Path) -> None:
        """Writes results.json, results.csv and results.md, each whole or not at all."""
        found = asdict(self)
        found["rows"] = [row | row.pop("scores") for row in found["rows"]]
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(self.table())
        write(folder / "results.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        write(folder / "results.csv", table.getvalue())
        write(folder / "results.md", self.markdown())

    def table(self) -> list[list[Any]]:
        """Header, a line for each prompt, and the summary."""
        names = list(self.summary)
        lines = [["prompt", "samples", *names]]
        lines += [[row.prompt, row.samples, *map(row.scores.get, names)] for row in self.rows]
        total = sum(row.samples for row in self.rows)
        return [*lines, ["all prompts", total, *self.summary.values()]]

    def markdown(self) -> str:
        """The table, what its columns are, and the configuration."""
        lines = []
        for line in self.table():
            cells = ["" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in line]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.insert(1, "|---" * len(self.table()[0]) + "|")
        scales = [f"- {name}: {text}" for name, text in self.scales.items()]
        settings = {name: value for name, value in self.configuration.items() if name != "prompts"}
        facts = [f"{name} {value}" for name, value in {**settings, **self.versions}.items()]
        return "\n".join([*lines, "", *scales, "", ", ".join(facts), ""])


def score(
    samples: Sequence[Sample],
    texts: Sequence[str],
    targets: Sequence[Target],
    clip: Clip,
    dino: Dino | None = None,
    reference: Sequence[Path] = (),
) -> tuple[list[Scores], Scores, dict[str, str]]:
    """Scores of each prompt, of all of them together, and the scale of each score.

    Args:
        texts: of each prompt, what its samples are compared with.
        reference: real pictures for KID and FID; none without.
    """
    paths, of = [path for path, _ in samples], torch.tensor([index for _, index in samples])
    embeddings = clip.image_embeddings(opened(paths))
    text = (F.normalize(embeddings, dim=-1) * clip.text_features(texts)[of]).sum(-1)
    each: dict[str, Tensor] = {"text_alignment": text, "clip_score": CLIP_SCORE * text.clamp(min=0)}
    spaces = [("image_alignment", clip, F.normalize(embeddings, dim=-1))]
    if dino is not None:
        spaces.append(("dino_alignment", dino, dino.image_features(opened(paths))))
    for name, model, features in spaces:
        for target in targets:
            cosines = alignment(features, model.image_features(opened(target.pictures)))
            named = torch.isin(of, torch.tensor(target.prompts))
            each[f"{name} {target.label}".strip()] = cosines.where(named, torch.nan)
    rows = [{name: _mean(value[of == i]) for name, value in each.items()} for i in range(len(texts))]
    summary = {name: _mean(value) for name, value in each.items()}
    if reference:
        real = clip.image_embeddings(opened(reference))
        summary["kid"], summary["kid_std"] = kid(embeddings, real)
        summary["fid"] = fid(embeddings, real)
    facts = {
        "clip": clip.name,
        "dino": dino and dino.name,
        "samples": len(paths),
        "real": len(reference),
        "subset": min(len(paths), len(reference), SUBSET),
    }
    scales = {name: SCALES[name.partition(" ")[0]].format(**facts) for name in summary}
    return rows, summary, scales


def opened(paths: Sequence[Path]) -> Iterator[Image.Image]:
    """Opened one at a time: thousands need not be in memory together."""
    return (open_picture(path) for path in paths)


def write(path: Path, content: str | Image.Image) -> None:
    """A text or a PNG file that is there whole or not at all."""
    with replacing(path) as partial:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            content.save(partial, "PNG")


def _mean(values: Tensor) -> float | None:
    mean = float(values.double().nanmean())
    return None if mean != mean else mean
