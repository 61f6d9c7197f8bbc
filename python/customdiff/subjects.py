"""A subject by its word in the prompt: "dog", "garden gnome", and "dog#2" for the second of two dogs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .attention import prompt_words
from .concept import Rows


def split_subject(name: str) -> tuple[str, int]:
    """The word of subject ``name`` and which of its occurrences is meant, from 1: "dog#2" is ("dog", 2)."""
    if not isinstance(name, str):
        raise TypeError(f"a subject is named by a string, got {type(name).__name__}")
    found = re.fullmatch(r"(.*?)\s*(?:#(\d+))?", name.strip(), re.DOTALL)
    word, number = found.groups() if found else ("", None)
    if not word or number == "0":
        raise ValueError(
            f"subject {name!r} must be a word of the prompt, as 'dog', and '#2' after it for the second "
            "occurrence of that word"
        )
    return word, int(number or 1)


def occurrences(
    tokenizer: Any, prompt: str, word: str, modifiers: Rows | Sequence[str] = ()
) -> list[tuple[int, ...]]:
    """The positions of the tokens of ``word``, which may be several words, each time it is in ``prompt``."""
    words = prompt_words(tokenizer, prompt, modifiers)
    wanted = [each.text for each in prompt_words(tokenizer, word, modifiers)]
    texts, n = [each.text for each in words], len(wanted)
    starts = [i for i in range(len(words) - n + 1) if texts[i : i + n] == wanted]
    return [tuple(p for each in words[start:][:n] for p in each.positions) for start in starts]


def find_subject(
    tokenizer: Any, prompt: str, name: str, modifiers: Rows | Sequence[str] = ()
) -> tuple[int, ...]:
    """The positions in the context of the tokens of subject ``name`` in ``prompt``; 0 is the start token.

    name: one word or several that follow one another, as they stand in the prompt but for upper case; "dog"
        is the first dog, "dog#2" the second. ``modifiers``: the prompt's modifier tokens, which may be in it.

    Raises ValueError, naming the subject and the prompt, if it is not there, or not so many times.
    """
    word, number = split_subject(name)
    found = occurrences(tokenizer, prompt, word, modifiers)
    if len(found) >= number:
        return found[number - 1]
    if found:
        raise ValueError(
            f"subject {name!r}: prompt {prompt!r} has {word!r} {len(found)} time{'s' * (len(found) > 1)}; "
            f"name at most {word}#{len(found)}, or write the word once more"
        )
    texts = [each.text for each in prompt_words(tokenizer, prompt, modifiers)]
    raise ValueError(
        f"subject {name!r} is not in the prompt {prompt!r}; write {word!r} there, or name one of the words "
        f"that the text encoder reads of it: {', '.join(dict.fromkeys(texts)) or '(there are none)'}"
    )
