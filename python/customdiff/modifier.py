"""What a modifier token V* starts from: a rare token, a normal draw, or a word (paper, section 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .concept import text_encoders
from .config import CATEGORY, NORMAL, RARE, TrainConfig
from .data import read_captions

PUBLISHED = ("ktn", "pll", "ucd")  # of CLIP's vocabulary: the first two by the paper's rule
SAMPLE = 200_000  # captions that the paper counts words in
OCCURRENCES = 5, 10  # of a rare token, in so many captions


def initial_rows(config: TrainConfig, pipeline: Any, taken: int = 0) -> dict[str, tuple[Tensor, ...]]:
    """{modifier token: a float32 embedding (E,) for each text encoder} that training starts from.

    `taken`: how many rare tokens earlier concepts started from; each concept has one of its own.

    Raises:
        ValueError: if a modifier token is a word of the vocabulary already, or the word that it is to start
            from is not one token.
    """
    subjects = [subject for subject in config.subjects if subject.modifier_token is not None]
    pairs = text_encoders(pipeline)
    rare = []
    if wanted := sum(subject.initializer_token == RARE for subject in subjects):
        captions = None if config.rare_captions is None else read_captions(config.rare_captions)
        rare = rare_tokens(pairs[0][0], taken + wanted, captions)[taken:][::-1]
    generator = torch.Generator().manual_seed(config.seed)
    rows = {}
    for subject in subjects:
        word = subject.modifier_token
        if word in pairs[0][0].get_vocab() or f"{word}</w>" in pairs[0][0].get_vocab():
            raise ValueError(
                f"modifier_token {word!r} is in the base's vocabulary already; give a new word, as '<new1>'"
            )
        start = {CATEGORY: (subject.category or "").split()[-1:], RARE: rare[-1:]}
        token = start.get(subject.initializer_token, [subject.initializer_token])[0]
        if subject.initializer_token == RARE:
            rare.pop()
        tables = [encoder.get_input_embeddings().weight.detach().float() for _, encoder in pairs]
        if token == NORMAL:
            rows[word] = tuple(_normal(table, generator) for table in tables)
        else:
            ids = [_token_id(tokenizer, token) for tokenizer, _ in pairs]
            rows[word] = tuple(table[i].clone() for table, i in zip(tables, ids, strict=True))
    return rows


def rare_tokens(tokenizer: Any, count: int, captions: Sequence[str] | None = None) -> list[str]:
    """`count` rare words of any tokenizer, by the rule of Custom Diffusion's appendix D.

    A rare word is one token, is spelled in letters alone and is no part of another token. With `captions`
    those come first that occur 5 to 10 times in 200,000, then the next rarest; without, the words known to be
    such in CLIP's vocabulary, then those that the vocabulary, which is ordered by frequency, holds last.

    Raises ValueError where the vocabulary has not so many.
    """
    ids: dict[str, int] = {}
    for token, number in tokenizer.get_vocab().items():
        word = token.removesuffix("</w>").removeprefix("Ġ").removeprefix("▁")
        if len(word) > 1 and word.isascii() and word.isalpha() and word.islower():
            ids[word] = number
    if captions is None:
        known = {word: rank for rank, word in enumerate(PUBLISHED)}
        order = sorted(ids, key=lambda word: (known.get(word, len(known)), -ids[word]))
    else:
        seen = Counter(i for text in captions for i in tokenizer(text, add_special_tokens=False).input_ids)
        low, high = (limit * len(captions) / SAMPLE for limit in OCCURRENCES)
        outside = {word: max(low - seen[i], seen[i] - high, 0) for word, i in ids.items()}
        order = sorted(ids, key=lambda w: (outside[w], -ids[w]))
    vocabulary = "\n".join(tokenizer.get_vocab())
    found = []
    for word in order:
        if vocabulary.count(word) == 1 and tokenizer(word, add_special_tokens=False).input_ids == [ids[word]]:
            found.append(word)
        if len(found) == count:
            return found
    raise ValueError(
        f"the vocabulary has {len(found)} rare words of the {count} wanted; name an initializer_token"
    )


def _normal(table: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(table.shape[1], generator=generator).to(table)
    return table.mean(0) + table.std(0) * noise


def _token_id(tokenizer: Any, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"initializer_token {word!r} is {len(ids)} tokens to this base; "
            "give a rare word that is one, as ktn or sks"
        )
    return ids[0]
