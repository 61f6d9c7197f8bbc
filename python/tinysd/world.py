"""A small procedural world: what a scene holds, how it is drawn, and what may be said about it.

Everything is seeded.  A caption may name the category, one of eight colours, the texture, the accessory and
the place, or only some of them.  A *concept* is one fixed instance in colours that no word names, so that
only a learned token can ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .draw import OVERSAMPLE, RGB, draw_background, draw_sprite, stamp

SIZE = 64
CATEGORIES = ("dog", "cat", "car", "cup")
TEXTURES = ("plain", "striped", "spotted", "bicolor")
ACCESSORIES = ("none", "hat", "ribbon")
PLACES = {
    "grass": "on the grass",
    "beach": "on the beach",
    "street": "on the street",
    "snow": "in the snow",
    "room": "in the room",
}
BACKGROUNDS = tuple(PLACES)
PALETTE: dict[str, RGB] = {
    "red": (222, 38, 44),
    "orange": (246, 138, 28),
    "yellow": (250, 214, 44),
    "green": (34, 142, 58),
    "blue": (38, 88, 214),
    "purple": (128, 52, 178),
    "pink": (250, 128, 186),
    "brown": (122, 72, 38),
}
WHITE: RGB = (246, 246, 244)
BLACK: RGB = (48, 46, 52)
PREFIXES = {
    "normal": ("photo of ", "a photo of ", ""),
    "small": ("a far away photo of ", "very small photo of "),
    "large": ("zoomed in photo of ", "close up photo of "),
}
COUNTS = {2: "two", 3: "three"}
SHARES = (0.70, 0.28, 0.02)  # of scenes with one, two and three subjects
RARE_WORDS = ("ktn", "pll", "ucd", "sks", "olis", "mth", "zwx", "phol", "vqj", "xjy", "bnk", "rwt")


@dataclass(frozen=True)
class Subject:
    """One instance: what it is and how it looks."""

    category: str
    primary: RGB
    secondary: RGB
    texture: str = "plain"
    accessory: str = "none"


@dataclass(frozen=True)
class Placed:
    """A subject and its square (x0, y0, x1, y1) in pixels; parts outside the picture are cut."""

    subject: Subject
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A background and its subjects from left to right; ``shift`` moves the details of the background."""

    background: str
    placed: tuple[Placed, ...]
    shift: float = 0.0
    scale: str = "normal"  # small, normal or large: what size words may say


@dataclass(frozen=True)
class Concept:
    """A fixed instance that the grammar cannot name. ``split`` is "tuning" or "figures"."""

    name: str
    subject: Subject
    split: str


# --- drawing ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _backdrop(name: str, step: int) -> Image.Image:
    return draw_background(name, SIZE * OVERSAMPLE, step / 4)


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns the picture, (64, 64, 3) uint8, and the label map, (64, 64) uint8: 0 is background and k the k-th
    subject (from 1, in the order of ``scene.placed``).
    """
    canvas = _backdrop(scene.background, round(scene.shift * 4)).copy()
    labels = Image.new("L", canvas.size)
    for k, placed in enumerate(scene.placed):
        x0, y0, x1, _ = (round(v * OVERSAMPLE) for v in placed.box)
        s = placed.subject
        sprite = draw_sprite(s.category, max(8, x1 - x0), s.primary, s.secondary, s.texture, s.accessory)
        stamp(canvas, labels, sprite, x0, y0, k + 1)
    half = OVERSAMPLE // 2
    return np.asarray(canvas.reduce(OVERSAMPLE)), np.asarray(labels)[
        half::OVERSAMPLE, half::OVERSAMPLE
    ].copy()


def category_map(scene: Scene, labels: np.ndarray) -> np.ndarray:
    """The label map with categories (1 + index in CATEGORIES) in place of subjects."""
    table = [0] + [1 + CATEGORIES.index(p.subject.category) for p in scene.placed]
    return np.asarray(table, np.uint8)[labels]


# --- colours ------------------------------------------------------------------------------------------------


def lab(rgb: np.ndarray | RGB) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB values in 0..255, over the last axis."""
    c = np.asarray(rgb, np.float64) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    xyz = c @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_PALETTE_LAB = lab(np.array(list(PALETTE.values())))
UNNAMED_DISTANCE = 26.0


def colour_name(rgb: RGB) -> str | None:
    """The palette's name of exactly this colour, or None."""
    return next((name for name, value in PALETTE.items() if value == tuple(rgb)), None)


def _unnamed_colour(rng: np.random.Generator) -> RGB:
    """A colour at least UNNAMED_DISTANCE (CIE76) away from every named one."""
    while True:
        rgb = rng.integers(20, 250, 3)
        if np.linalg.norm(_PALETTE_LAB - lab(rgb), axis=1).min() >= UNNAMED_DISTANCE:
            return tuple(int(c) for c in rgb)  # type: ignore[return-value]


# --- what the world holds -----------------------------------------------------------------------------------


def random_subject(rng: np.random.Generator, category: str | None = None) -> Subject:
    """An instance: 75% in a named colour, the rest in colours without a name."""
    category = category or str(rng.choice(CATEGORIES))
    primary = PALETTE[str(rng.choice(list(PALETTE)))] if rng.random() < 0.75 else _unnamed_colour(rng)
    while True:
        draw = rng.random()
        if draw < 0.5:
            secondary = WHITE
        elif draw < 0.7:
            secondary = BLACK
        else:
            secondary = _unnamed_colour(rng)
        if np.linalg.norm(lab(primary) - lab(secondary)) > 40:
            break
    texture = str(rng.choice(TEXTURES, p=(0.55, 0.15, 0.15, 0.15)))
    accessory = str(rng.choice(ACCESSORIES, p=(0.6, 0.2, 0.2)))
    return Subject(category, primary, secondary, texture, accessory)


def place(
    rng: np.random.Generator, subjects: tuple[Subject, ...], scale: str = "normal"
) -> tuple[Placed, ...]:
    """Stand one to three subjects on the ground, from left to right."""
    count = len(subjects)
    if count == 1:
        low, high = {"small": (19, 25), "normal": (42, 50), "large": (58, 66)}[scale]
        reach = {"small": 17.0, "normal": 4.0, "large": 2.0}[scale]
        centres = [32 + rng.uniform(-reach, reach)]
        floor = {"small": 56.0, "normal": 60.0, "large": 68.0}[scale]
    elif count == 2:
        low, high, floor = 28, 31, 59.0
        centres = [16.5 + rng.uniform(-1.5, 1.5), 47.5 + rng.uniform(-1.5, 1.5)]
    elif count == 3:
        low, high, floor = 18, 20.5, 56.0
        centres = [11 + 21 * k + rng.uniform(-0.6, 0.6) for k in range(3)]
    else:
        raise ValueError(f"subjects must be one to three, got {count}")
    placed = []
    for centre, subject in zip(centres, subjects, strict=True):
        side = rng.uniform(low, high)
        bottom = floor + rng.uniform(-1.5, 1.5)
        x0 = centre - side / 2
        if count == 1 and scale == "normal":
            x0 = min(max(x0, 1.0), SIZE - 1.0 - side)
        placed.append(Placed(subject, (x0, bottom - side, x0 + side, bottom)))
    return tuple(placed)


def random_scene(rng: np.random.Generator, shares: tuple[float, float, float] = SHARES) -> Scene:
    """One subject (a sixth of them far away or close up), two or three; ``shares`` says how often."""
    count = int(rng.choice((1, 2, 3), p=shares))
    scale = str(rng.choice(("normal", "small", "large"), p=(0.84, 0.08, 0.08))) if count == 1 else "normal"
    if count > 1 and rng.random() < 0.25:
        category = str(rng.choice(CATEGORIES))
        subjects = tuple(random_subject(rng, category) for _ in range(count))
    else:
        subjects = tuple(random_subject(rng) for _ in range(count))
    background = str(rng.choice(BACKGROUNDS))
    return Scene(background, place(rng, subjects, scale), float(rng.uniform(-1, 1)), scale)


# --- the grammar --------------------------------------------------------------------------------------------


def describe(subject: Subject, *, colour: bool, texture: bool, accessory: bool) -> str:
    """ "a red striped dog with a hat", naming only what is asked for and can be named."""
    words = ["a"]
    name = colour_name(subject.primary)
    if colour and name is not None:
        words.append(name)
    if texture:
        words.append(subject.texture)
    words.append(subject.category)
    if accessory and subject.accessory != "none":
        words.append(f"with a {subject.accessory}")
    text = " ".join(words)
    return "an" + text[1:] if text[2] in "aeiou" else text


def listed(parts: Sequence[str]) -> str:
    """ "a dog a cat and a car": as captions name several; the vocabulary has no comma."""
    return " and ".join(filter(None, [" ".join(parts[:-1]), parts[-1]]))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One true caption of the scene, of at most 22 words; subjects are named from left to right."""
    subjects = [p.subject for p in scene.placed]
    categories = {s.category for s in subjects}
    bare = rng.random() < 0.25
    if len(subjects) > 1 and len(categories) == 1 and (bare or len(subjects) == 3):
        text = f"{COUNTS[len(subjects)]} {subjects[0].category}s"
    else:
        parts = []
        in_full = int(rng.integers(3)) if len(subjects) == 3 else None  # all three would be too many words
        for k, s in enumerate(subjects):
            short = in_full not in (None, k)
            parts.append(
                describe(
                    s,
                    colour=not bare and rng.random() < 0.75,
                    texture=not bare and not short and rng.random() < (0.1 if s.texture == "plain" else 0.6),
                    accessory=not bare and not short and rng.random() < 0.7,
                )
            )
        text = listed(parts)
    prefix = str(rng.choice(PREFIXES[scene.scale]))
    suffix = f" {PLACES[scene.background]}" if rng.random() < 0.8 else ""
    return prefix + text + suffix


def words() -> list[str]:
    """Every word that a caption may hold."""
    fixed = "a an and with of two three photo hat ribbon".split()
    phrases = " ".join([*PLACES.values(), *(p for ps in PREFIXES.values() for p in ps)]).split()
    plural = [c + "s" for c in CATEGORIES]
    return sorted({*fixed, *phrases, *CATEGORIES, *plural, *PALETTE, *TEXTURES})


# --- concepts -----------------------------------------------------------------------------------------------

_TEAL, _CREAM, _MAROON, _MINT = (0, 148, 150), (252, 236, 196), (112, 12, 52), (150, 242, 206)
_NAVY, _LIME, _CYAN, _MAGENTA = (26, 30, 96), (178, 232, 40), (90, 214, 246), (214, 0, 130)
_LILAC, _OLIVE, _SLATE, _PEACH = (196, 174, 240), (116, 118, 26), (92, 112, 130), (255, 196, 164)

_CONCEPTS = (
    Concept("teal_dog", Subject("dog", _TEAL, _CREAM, "spotted", "ribbon"), "figures"),
    Concept("lilac_cat", Subject("cat", _LILAC, _MAROON, "striped", "ribbon"), "figures"),
    Concept("lime_car", Subject("car", _LIME, _NAVY, "bicolor", "hat"), "figures"),
    Concept("maroon_cup", Subject("cup", _MAROON, _MINT, "striped", "none"), "figures"),
    Concept("navy_dog", Subject("dog", _NAVY, _LIME, "striped", "hat"), "tuning"),
    Concept("mint_cat", Subject("cat", _MINT, _MAGENTA, "spotted", "hat"), "tuning"),
    Concept("cyan_car", Subject("car", _CYAN, _MAROON, "striped", "none"), "tuning"),
    Concept("olive_cup", Subject("cup", _OLIVE, _PEACH, "spotted", "ribbon"), "tuning"),
    Concept("slate_dog", Subject("dog", _SLATE, _PEACH, "bicolor", "none"), "tuning"),
    Concept("teal_cup", Subject("cup", _TEAL, _LILAC, "bicolor", "none"), "tuning"),
    Concept("cyan_dog", Subject("dog", _CYAN, _MAROON, "spotted", "ribbon"), "tuning"),
    Concept("cream_cat", Subject("cat", _CREAM, _NAVY, "bicolor", "hat"), "tuning"),
    Concept("peach_car", Subject("car", _PEACH, _TEAL, "bicolor", "hat"), "tuning"),
    Concept("magenta_cup", Subject("cup", _MAGENTA, _CREAM, "striped", "none"), "tuning"),
)


def concepts(split: str | None = None) -> dict[str, Concept]:
    """The named concepts, or those of one split: "tuning" or "figures"."""
    if split not in (None, "tuning", "figures"):
        raise ValueError(f"split must be 'tuning', 'figures' or None, not {split!r}")
    return {c.name: c for c in _CONCEPTS if split in (None, c.split)}


def concept_pictures(
    name: str, n: int, seed: int = 0, scales: Sequence[str] = ("normal",)
) -> list[tuple[Image.Image, str]]:
    """``n`` pictures of one concept in varied places; their captions name only category, place and size.

    scales: sizes that the pictures take in turn: "normal", "small", "large".
    """
    concept = concepts().get(name)
    if concept is None:
        raise ValueError(f"name must be one of {', '.join(concepts())}; got {name!r}")
    rng = np.random.default_rng((seed, *name.encode()))
    category = concept.subject.category
    made = pictures((concept.subject,), n, rng, scales)
    return [
        (picture, f"{PREFIXES[scales[k % len(scales)]][0]}a {category} {PLACES[background]}")
        for k, (picture, background) in enumerate(made)
    ]


def pictures(
    subjects: tuple[Subject, ...], n: int, rng: np.random.Generator, scales: Sequence[str] = ("normal",)
) -> list[tuple[Image.Image, str]]:
    """``n`` pictures of the subjects from left to right, and their backgrounds, all of them in turn; so are
    the ``scales`` of one subject.
    """
    order = rng.permutation(len(BACKGROUNDS))
    made = []
    for k in range(n):
        background = BACKGROUNDS[order[k % len(BACKGROUNDS)]]
        placed = place(rng, subjects, scales[k % len(scales)])
        scene = Scene(background, placed, float(rng.uniform(-1, 1)))
        made.append((Image.fromarray(render(scene)[0]), background))
    return made


def sample(rng: np.random.Generator) -> tuple[Scene, str]:
    """A random scene and a caption of it."""
    scene = random_scene(rng)
    return scene, caption(scene, rng)
