"""Regularization pictures from a captioned collection on disk: what ``customdiff retrieve`` does.

Custom Diffusion, section 3.2: 200 pictures whose captions have a cosine similarity above 0.85 with the prompt
in CLIP's text space. Captions are compared after CLIP's own normalisation (lower case, single spaces), each
one is encoded once, and its features are kept on disk. A search is one exact pass over that file, so a set
larger than memory needs no index: an exact one, as faiss has, would make the same pass, and in memory.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

from . import data
from .base import EMBEDDED, load_text_encoder
from .collection import Collection, Entry
from .metrics import without_words
from .regularization import TEXT_BATCH, weights_hash

THRESHOLD, COUNT = 0.85, 200  # Custom Diffusion, section 3.2
SCAN_ROWS = 16384  # features in memory at a time: 100 MB in float64 at CLIP's width of 768
# Two pictures look alike if no channel of their 8x8 thumbnails differs by more than this. JPEG of quality 50
# moves one by at most 18; no two of 300 pictures of the embedded base's world are closer than 32.
THUMBNAIL, ALIKE = (8, 8), 24
REPORT = "retrieval.json"
SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp"}


def retrieve(
    images: str | Path,
    prompts: Sequence[str],
    output: str | Path,
    *,
    threshold: float = THRESHOLD,
    count: int = COUNT,
    modifier_tokens: Sequence[str] = (),
    base: str | None = None,
    clip: str | None = None,
    device: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Copy the pictures of a collection whose captions are most similar to the prompts into a new folder.

    A picture's similarity is the largest cosine between its caption and a prompt. The folder holds the
    pictures in descending order of it (equal ones in the collection's order), captions.csv, and the report as
    retrieval.json; ``customdiff train --regularization`` reads it as it is. It appears whole or not at all.

    Left out, and counted in the report: pictures without a caption; those that cannot be read; and duplicates
    of a more similar one, which have the same pixels, or the same caption and look alike (ALIKE).

    Args:
        images: a folder or .parquet file, as ``collection.Collection`` reads it.
        prompts: a prompt or several; `modifier_tokens` and words as ``<new1>`` are taken out of them.
        output: the folder to write.
        threshold: the least cosine, -1 to 1.
        count: the most pictures.
        base, clip, device: whose text space, as ``base.load_text_encoder``; features are projected where the
            encoder has a projection, else pooled.
        cache: folder in which the captions' features are kept, known by the text encoder's weights and the
            captions; None keeps none. A file that cannot be read or written is told of in a UserWarning.
        overwrite: replace `output`, which must then be empty or an earlier result.

    Returns:
        The report: prompts, threshold, text encoder, counts, and file, source, similarity, prompt and caption
        of each picture.

    Raises:
        ValueError: if a prompt is empty, nothing reaches the threshold, or the collection, base or output
            cannot be used.
    """
    texts = _texts(prompts, modifier_tokens)
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine, -1 to 1, got {threshold}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    output = Path(output)
    _check_output(output, Path(images), overwrite)
    collection = Collection(images)
    entries = collection.entries
    space = TextSpace(*load_text_encoder(base, clip, device))
    captions = [_normal(entry.caption) for entry in entries]
    unique = sorted(set(captions), key=lambda text: (len(text), text))  # like lengths need little padding
    scores = similarities(space, unique, texts, cache=cache, progress=progress)
    row = {text: i for i, text in enumerate(unique)}
    scores = scores[[row[text] for text in captions]]
    best, nearest = scores.max(1), scores.argmax(1)
    order = np.argsort(-best, kind="stable")
    reached = order[best[order] >= threshold].tolist()
    if not reached:
        top = order[0]
        raise ValueError(
            f"threshold {threshold:g} is reached by none of {len(entries)} captions: the most similar has "
            f"{best[top]:.4f}, {entries[top].caption!r:.80}; try {math.floor(100 * best[top]) / 100:g}"
        )
    report: dict[str, Any] = {
        "prompts": texts,
        "threshold": threshold,
        "text_encoder": {"base": base or EMBEDDED, "clip": clip, "space": space.name, "sha256": space.hash},
        "captioned": len(entries),
        "without_caption": collection.without_caption,
        "reached": len(reached),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with _new_folder(output) as folder:
        kept, counts = _copy(collection, reached, folder, count, progress)
        report |= counts
        report["pictures"] = [
            {
                "file": name,
                "source": _source(entries[i], Path(images)),
                "similarity": float(best[i]),
                "prompt": texts[nearest[i]],
                "caption": entries[i].caption,
            }
            for name, i in kept
        ]
        with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
            rows = [(picture["file"], picture["caption"]) for picture in report["pictures"]]
            csv.writer(file).writerows([("file", "caption"), *rows])
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


class TextSpace:
    """Unit vectors of texts by a CLIP text encoder."""

    def __init__(self, tokenizer: Any, encoder: torch.nn.Module):
        self.tokenizer, self.encoder = tokenizer, encoder
        self.name = "projected" if hasattr(encoder, "text_projection") else "pooled"
        self.hash = weights_hash(encoder)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 of n texts; one that is too long is cut."""
        # padded to the longest only: the features are those of the end token, which sees nothing after it
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        out = self.encoder(tokens.input_ids.to(self.encoder.device))
        features = out.text_embeds if self.name == "projected" else out.pooler_output
        return F.normalize(features.float(), dim=-1).cpu().numpy()

    def key(self, texts: Sequence[str]) -> str:
        """sha256 (hex) of all that the features of `texts` depend on."""
        words = sorted(self.tokenizer.get_vocab().items())
        known = [self.name, self.hash, self.tokenizer.model_max_length, words]
        digest = hashlib.sha256(json.dumps(known).encode())
        for text in texts:
            digest.update(text.encode() + b"\0")
        return digest.hexdigest()


def similarities(
    space: TextSpace,
    captions: Sequence[str],
    prompts: Sequence[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Cosines (captions, prompts), float64, of texts in `space`.

    No more than SCAN_ROWS features are in memory at a time: those of the captions are scanned in the cache's
    file or, without a cache, forgotten batch by batch. Rounded to 6 digits, which is what float32 features
    are good for, so that equal texts are equally similar.
    """
    targets = space.encode(prompts).astype(np.float64).T
    blocks = _features(space, captions, targets.shape[0], cache, progress)
    return np.concatenate([rows.astype(np.float64) @ targets for rows in blocks]).round(6)


def _features(
    space: TextSpace,
    captions: Sequence[str],
    width: int,
    cache: str | os.PathLike[str] | None,
    progress: bool,
) -> Iterator[np.ndarray]:
    """The captions' features (n, width) in blocks of rows: from the cache, or encoded and kept there."""
    if cache is None:
        yield from _encoded(space, captions, progress)
        return
    path, shape = Path(cache) / f"retrieval-{space.key(captions)[:32]}.npy", (len(captions), width)
    try:
        if _mapped(path, shape) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _temporary(path) as temporary, open(temporary, "xb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for rows in _encoded(space, captions, progress):
                    file.write(rows.tobytes())
                file.close()
                os.replace(temporary, path)
        kept = _mapped(path, shape)
    except OSError as error:
        warnings.warn(f"the captions' features are not kept: {error}", stacklevel=4)
        kept = None
    if kept is None:
        yield from _encoded(space, captions, progress)
        return
    for start in range(0, len(captions), SCAN_ROWS):
        yield kept[start : start + SCAN_ROWS]


def _encoded(space: TextSpace, captions: Sequence[str], progress: bool) -> Iterator[np.ndarray]:
    with tqdm(total=len(captions), desc="captions", unit="caption", disable=not progress) as bar:
        for start in range(0, len(captions), TEXT_BATCH):
            rows = space.encode(captions[start : start + TEXT_BATCH])
            yield rows
            bar.update(len(rows))


def _mapped(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The array in a file, mapped and not read; None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        features = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        warnings.warn(f"{path} cannot be read ({error}); it is made anew", stacklevel=5)
        return None
    return features if features.shape == shape and features.dtype == np.float32 else None


def _copy(
    collection: Collection, order: Sequence[int], folder: Path, count: int, progress: bool
) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Copies up to `count` of the entries, in `order`: (name, entry) of each, and how many were left out."""
    kept: list[tuple[str, int]] = []
    pixels: set[bytes] = set()
    thumbnails: dict[str, list[np.ndarray]] = {}
    unreadable, duplicates, why = 0, 0, ""
    with tqdm(total=min(count, len(order)), desc="pictures", disable=not progress) as bar:
        for i in order:
            entry = collection.entries[i]
            try:
                stored = collection.read(entry)
                with Image.open(io.BytesIO(stored)) as image:
                    image.verify()  # as data.picture_paths will
                with Image.open(io.BytesIO(stored)) as image:
                    picture, suffix = data.upright_rgb(image), SUFFIXES.get(image.format or "")
            except data.UNREADABLE as error:
                unreadable, why = unreadable + 1, f"{entry.path.name!r}: {error}"
                continue
            exact = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
            small = np.asarray(picture.resize(THUMBNAIL, Image.Resampling.BOX)).astype(int)
            same_caption = thumbnails.setdefault(_normal(entry.caption), [])
            if exact in pixels or any(np.abs(small - other).max() <= ALIKE for other in same_caption):
                duplicates += 1
                continue
            pixels.add(exact)
            same_caption.append(small)
            name = f"{len(kept):04}{suffix or '.png'}"
            if suffix:
                (folder / name).write_bytes(stored)
            else:  # a format that the trainer does not look for
                picture.save(folder / name)
            kept.append((name, i))
            bar.update()
            if len(kept) == count:
                break
    if not kept:
        raise ValueError(
            f"none of the {len(order)} pictures that reach the threshold can be read; last {why}"
        )
    return kept, {"unreadable": unreadable, "duplicates": duplicates}


def _texts(prompts: Sequence[str], modifier_tokens: Sequence[str]) -> list[str]:
    """The prompts without modifier tokens, each once."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be strings, got {type(prompt).__name__}")
        text = without_words(prompt, [*modifier_tokens, *re.findall(r"<[\w-]+>", prompt)])
        if not text:
            raise ValueError(
                f"prompt {prompt!r} has no word but modifier tokens; write one as 'photo of a dog'"
            )
        texts.append(text)
    if not texts:
        raise ValueError("prompts is empty; give at least one, as 'photo of a dog'")
    return list(dict.fromkeys(texts))


def _normal(caption: str) -> str:
    """`caption` as CLIP's tokenizer sees it."""
    return " ".join(caption.lower().split())


def _source(entry: Entry, root: Path) -> str:
    """Where in the collection a picture is: file, and row of a Parquet file."""
    place = os.path.relpath(entry.path, root if root.is_dir() else root.parent)
    return place if entry.row is None else f"{place}#{entry.row}"


def _check_output(output: Path, images: Path, overwrite: bool) -> None:
    """Raises ValueError where `output` is in the way of something."""
    inner, outer = output.resolve(), images.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ValueError(
            f"output {str(output)!r} and images {str(images)!r} lie in one another; name another"
        )
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"output {str(output)!r} exists; name another, or pass --overwrite")
    if not output.is_dir() or (any(output.iterdir()) and not (output / REPORT).is_file()):
        raise ValueError(f"output {str(output)!r} is no earlier result, so it is not replaced; name another")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A free name beside `path`; whatever bears it afterwards is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` when the block ends well."""
    with _temporary(path) as temporary, _temporary(path) as old:
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
