"""Captions with a subject's word, over which Cones 2 preserves the other tokens and averages the shift.

The paper has ChatGPT write 1,000 of them (section 3.2), the published code fills 27 templates. Here they are
put together from phrases, or read from a file.
"""

from __future__ import annotations

import random
from typing import Any

from .config import TEMPLATES, TrainConfig
from .data import read_captions
from .subjects import occurrences

# Of the published code: Textual Inversion's for few pictures.
PUBLISHED = """a photo of a {}; a rendering of a {}; a cropped photo of the {}; the photo of a {};
a photo of a clean {}; a photo of a dirty {}; a dark photo of the {}; a photo of my {};
a photo of the cool {}; a close-up photo of a {}; a bright photo of the {}; a cropped photo of a {};
a photo of the {}; a good photo of the {}; a photo of one {}; a close-up photo of the {};
a rendition of the {}; a photo of the clean {}; a rendition of a {}; a photo of a nice {};
a good photo of a {}; a photo of the nice {}; a photo of the small {}; a photo of the weird {};
a photo of the large {}; a photo of a cool {}; a photo of a small {}"""

VIEWS = """photo of, a photo of, a picture of, a painting of, a drawing of, close up photo of,
a close up photo of, zoomed in photo of, a far away photo of, very small photo of, a bright photo of"""
COLOURS = "red, orange, yellow, green, blue, purple, pink, brown, black, white, grey, golden"
KINDS = "plain, striped, spotted, small, large, old, new, clean, dirty, wet, wooden, beautiful"
WEARING = "with a hat, with a ribbon, with flowers, with a bag, with a sign, with a blanket"
OTHERS = """cat, dog, car, cup, man, woman, tree, chair, bird, red cat, blue dog, green car, yellow cup,
striped cat, spotted dog, pink car, brown cup, old man, young woman, wooden table"""
PLACES = """on the grass, on the beach, on the street, in the snow, in the room, on a table, on a chair,
in the kitchen, in the garden, in the forest, in the city, on a mountain, near the river, by the sea,
in the park, under a tree, at night, in the morning, at the window, in front of a house, on a bridge"""
WITH_ANOTHER = 0.3  # share of captions that name something else too, before the subject or after it
DRAWS = 20  # for each caption, before the phrases are taken to be too few


def captions_for(config: TrainConfig, tokenizer: Any) -> list[str]:
    """The distinct captions of a run: of its file, the published templates, or generated.

    Raises ValueError for a file that cannot be read, and for a caption that lacks the category's word, or
    has it after the tokens that the text encoder reads.
    """
    word = config.category or ""
    if config.captions is None:
        return generate(tokenizer, word, config.caption_count, config.seed)
    if config.captions == TEMPLATES:
        return [" ".join(template.split()).format(word) for template in PUBLISHED.split(";")]
    found = list(dict.fromkeys(read_captions(config.captions)))
    for caption in found:
        if not occurrences(tokenizer, caption, word):
            raise ValueError(
                f"captions {config.captions!r}: {caption!r} has no {word!r} among the tokens that the text "
                "encoder reads; every caption must name the category"
            )
    return found


def generate(tokenizer: Any, word: str, count: int, seed: int = 0) -> list[str]:
    """`count` distinct captions with `word`, as "a photo of a red dog with a hat and a cup on the grass".

    Of the phrases those are used whose words the tokenizer has as one token each, which it reads as the words
    they are; no caption is cut.

    Raises ValueError if these phrases do not make so many.
    """
    draw, made = random.Random(seed), dict[str, None]()
    views, colours, kinds, wearing, places = (
        ["", *_known(tokenizer, text)] for text in (VIEWS, COLOURS, KINDS, WEARING, PLACES)
    )
    own = {*word.lower().split()}
    others = [_a(other) for other in _known(tokenizer, OTHERS) if not {*other.split()} & own]
    most = tokenizer.model_max_length
    for _ in range(DRAWS * count):
        subject = _a(_joined(draw.choice(colours), draw.choice(kinds), word), draw.choice(wearing))
        if others and draw.random() < WITH_ANOTHER:
            both = [subject, draw.choice(others)]
            draw.shuffle(both)
            subject = " and ".join(both)
        caption = _joined(draw.choice(views), subject, draw.choice(places))
        if len(tokenizer(caption).input_ids) <= most:
            made[caption] = None
        if len(made) == count:
            return list(made)
    raise ValueError(
        f"caption_count={count}: the words that this tokenizer knows make {len(made)} captions of {word!r}; "
        "ask for fewer, or name a file of captions"
    )


def _known(tokenizer: Any, phrases: str) -> list[str]:
    """The phrases in which every word is one token."""
    separate = [" ".join(phrase.split()) for phrase in phrases.split(",")]
    return [
        phrase
        for phrase in separate
        if all(len(tokenizer(w, add_special_tokens=False).input_ids) == 1 for w in phrase.split())
    ]


def _a(*parts: str) -> str:
    text = _joined(*parts)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _joined(*parts: str) -> str:
    return " ".join(filter(None, parts))
