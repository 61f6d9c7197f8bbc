"""A standard CLIP tokenizer whose merges make every word of the grammar, and the rare words, one token."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from . import world

MAX_LENGTH = 24
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in GPT-2's and CLIP's vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + k) for k in range(len(shifted))]


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges trained until every word is one symbol; replayed in order they rebuild each word."""
    splits = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for s in splits.values() for pair in zip(s, s[1:], strict=False)):
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        merges.append(best)
        for word, s in splits.items():
            merged: list[str] = []
            for symbol in s:
                if merged and (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            splits[word] = merged
    return merges


def write(folder: str | Path) -> None:
    """Write vocab.json, merges.txt and the configuration into ``folder``, each file whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges([*world.words(), *world.RARE_WORDS])
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    options = {"model_max_length": MAX_LENGTH, "do_lower_case": True, "errors": "replace"}
    files = {
        "vocab.json": json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "CLIPTokenizer", **options, **special}, indent=2
        )
        + "\n",
    }
    for name, text in files.items():  # ranks and stages may write at the same time
        temporary = folder / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, folder / name)


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids, (B, 24) int64, padded with the end token."""
    options = {"padding": "max_length", "max_length": MAX_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(captions, **options).input_ids
