"""What a merge keeps of ordinary captions: their text features, factored once and kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import customdiff_kernels as ck

from .concept import Tokens, encode, text_encoders, tokenize

TEXT_BATCH = 64


def cache_folder() -> Path:
    """Where factors are kept: customdiff/ in the user's cache home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "customdiff"


def merge_solver(
    pipeline: Any,
    captions: Sequence[str],
    ridge: float | str,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ck.MergeSolver:
    """The solver for a base's text encoder and captions: from the folder `cache` where it was kept, else made
    and kept there.

    It is known by the text encoder's weights and the captions' token ids, and serves every UNet that reads
    them. A file that cannot be read or written is told of in a UserWarning, and done without.
    """
    tokens = _tokens(pipeline, captions)
    if cache is None:
        return ck.MergeSolver(_features(pipeline, tokens, progress), ridge=ridge)
    digest = hashlib.sha256()
    for part in tokens:
        digest.update(part.ids.numpy().astype(np.int64).tobytes())
    key = {
        "text encoder": " ".join(weights_hash(encoder) for _, encoder in text_encoders(pipeline)),
        "captions": digest.hexdigest(),
        "ridge": str(ridge),
    }
    path = Path(cache) / f"merge-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            return ck.MergeSolver.load(path, key=key, device=pipeline.text_encoder.device)
        except ck.MergeFactorFileError as error:
            warnings.warn(f"{error}; it is made anew", stacklevel=3)
    solver = ck.MergeSolver(_features(pipeline, tokens, progress), ridge=ridge)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        solver.save(path, key=key)
    except OSError as error:
        warnings.warn(f"the factor of the captions is not kept: {error}", stacklevel=3)
    return solver


def regularization_features(pipeline: Any, captions: Sequence[str], *, progress: bool = False) -> Tensor:
    """Text features (T,E) of ordinary captions: with the padding, without the start token, alike in all."""
    return _features(pipeline, _tokens(pipeline, captions), progress)


def _tokens(pipeline: Any, captions: Sequence[str]) -> list[Tokens]:
    """The captions' tokens, for each text encoder."""
    if not captions:
        raise ValueError("captions must hold at least one caption to regularize with, got none")
    words = [()] * len(captions)
    return [tokenize(tokenizer, captions, words) for tokenizer, _ in text_encoders(pipeline)]


@torch.no_grad()
def _features(pipeline: Any, tokens: list[Tokens], progress: bool) -> Tensor:
    features = []
    chunks = list(zip(*(part.ids.split(TEXT_BATCH) for part in tokens), strict=True))
    for ids in tqdm(chunks, desc="captions", disable=not progress):
        context = encode(pipeline, [Tokens(chunk, []) for chunk in ids], [{}] * len(ids[0])).context
        features.append(context[:, 1:].flatten(0, 1))
    return torch.cat(features).float()


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 (hex) of the names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
