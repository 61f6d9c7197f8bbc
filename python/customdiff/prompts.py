"""Prompts of an evaluation: read from files, their placeholders filled, matched with pictures that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from .data import picture_paths, read_captioned, read_captions

FILES = (".txt", ".csv", ".jsonl")
NAMED = re.compile(r"prompt(\d+)_")  # as `customdiff sample` and `customdiff evaluate` name pictures


def read_prompts(entries: Sequence[str]) -> list[str]:
    """The prompts of `entries`, each a file (one prompt a line, as CustomConcept101's) or a prompt itself.

    Raises ValueError if a file is missing or empty, or a prompt is blank.
    """
    prompts: list[str] = []
    for entry in entries:
        if entry.endswith(FILES):
            prompts += read_captions(entry)
        elif entry.strip():
            prompts.append(entry.strip())
        else:
            raise ValueError("prompts has a blank entry; give text, or a file with one prompt a line")
    return prompts


def fill(prompts: Sequence[str], words: Sequence[str], categories: Sequence[str]) -> list[str]:
    """`prompts` with the nouns "<new1> dog", ... in the place of {}, or of {0} and {1} for several concepts.

    Without modifier tokens `words` the nouns are the categories alone. A prompt without a placeholder stays
    as it is. Raises ValueError if a placeholder has no noun.
    """
    if words and categories and len(words) != len(categories):
        raise ValueError(
            f"category: got {', '.join(categories)} for the modifier tokens {', '.join(words)}; give one each"
        )
    nouns = (
        [" ".join(pair) for pair in zip(words, categories, strict=True)]
        if words and categories
        else categories
    )
    return [_filled(prompt, nouns) for prompt in prompts]


def _filled(prompt: str, nouns: Sequence[str]) -> str:
    places: Iterator[int] = iter(range(len(prompt)))  # {} counts on, as in str.format

    def noun(found: re.Match) -> str:
        index = int(found[1]) if found[1] else next(places)
        if index >= len(nouns):
            raise ValueError(
                f"prompt {prompt!r} has the placeholder {found[0]}, and category names {len(nouns)}: "
                "give the category of each concept, as --category dog"
            )
        return nouns[index]

    return re.sub(r"\{(\d*)\}", noun, prompt)


def modifiers(prompts: Sequence[str]) -> list[str]:
    """Every <word> of the prompts, in the order in which they come."""
    return list(dict.fromkeys(word for prompt in prompts for word in re.findall(r"<[\w-]+>", prompt)))


def existing(folder: str | Path, prompts: Sequence[str]) -> tuple[list[str], list[tuple[Path, int]]]:
    """The prompts, and the pictures of `folder`, each with the index of its prompt.

    With `prompts` the pictures are named "prompt0_<anything>.png", ... by the index; without, their captions
    are the prompts (`read_captioned`). Raises ValueError if a picture has no prompt, or a prompt no picture.
    """
    if not prompts:
        paths, captions = read_captioned(folder)
        prompts = list(dict.fromkeys(captions))
        return prompts, [(path, prompts.index(text)) for path, text in zip(paths, captions, strict=True)]
    samples = []
    for path in picture_paths(folder):
        found = NAMED.match(path.name)
        if found is None or int(found[1]) >= len(prompts):
            raise ValueError(
                f"picture {path.name!r} in {str(folder)!r} is of none of the {len(prompts)} prompts: name it "
                "prompt0_1.png for the first, or give no prompts and write captions beside the pictures"
            )
        samples.append((path, int(found[1])))
    if missing := set(range(len(prompts))) - {index for _, index in samples}:
        raise ValueError(
            f"prompt {prompts[min(missing)]!r} has no picture in {str(folder)!r}; sample it first"
        )
    return list(prompts), samples
