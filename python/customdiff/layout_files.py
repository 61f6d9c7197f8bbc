"""Layout files: our JSON or YAML, and the published configuration of Cones 2 as it is (docs/layouts.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short  # what a YAML file repeats by reference would be endless in full
from typing import Any

from torch import Tensor

from .documents import nearest, read_json, read_yaml
from .guidance import LayoutGuidance
from .layout_pictures import read_colour_map, read_mask
from .layouts import Box, Layout, checked_box
from .options import NUMBER, typed
from .subjects import find_subject, split_subject

GUIDANCE = {  # what a file may set of LayoutGuidance
    "positive": NUMBER,
    "negative": NUMBER,
    "outside": NUMBER._replace(optional=True),
    "weight": NUMBER,
    "schedule": NUMBER._replace(type=str),
    "steps": NUMBER._replace(type=int, optional=True),
    "recurrence": NUMBER._replace(type=bool),
}
KEYS = {"prompt", "subjects", "layout", "legend", "background", "guidance"}
SUBJECT_KEYS = {"box", "mask", "residual", "strength"}
PUBLISHED_GUIDANCE = {
    "guidance_steps": "steps",
    "guidance_weight": "weight",
    "weight_negative": "negative",
}
PUBLISHED = {"residual_dict", "color_context", "subject_list", *PUBLISHED_GUIDANCE}


@dataclass(frozen=True, eq=False)
class Scene:
    """What a layout file holds for one picture.

    Args:
        layout: None where the file places no subject.
        residuals: ``{subject: file}``, of the subjects that have one.
        guidance: the fields of LayoutGuidance that the file sets.
        positions: ``{subject: token position}`` where the published ``subject_list`` gives it.
    """

    prompt: str
    layout: Layout | None
    residuals: Mapping[str, Path] = field(default_factory=dict)
    guidance: Mapping[str, Any] = field(default_factory=dict)
    positions: Mapping[str, int] = field(default_factory=dict)

    def check(self, tokenizer: Any, modifiers: Sequence[str] = ()) -> None:
        """ValueError, naming the subject, if one is not in the prompt, or not where the file says."""
        if self.layout is not None:
            self.layout.check(self.prompt, tokenizer, modifiers)
        for name in self.residuals:
            found = find_subject(tokenizer, self.prompt, name, modifiers)
            listed = self.positions.get(name)
            if listed is not None and listed not in found:
                raise ValueError(
                    f"subject {name!r}: subject_list puts it at token {listed}; in {self.prompt!r} it is at "
                    f"{', '.join(map(str, found))} (the start token is 0): write that, or name another of "
                    f"several as {split_subject(name)[0] + '#2'!r}"
                )


def load_layout(path: str | Path) -> list[Scene]:
    """The scenes of a layout file, one a picture: ours in JSON or YAML, or the published one of Cones 2.

    Files that it names are relative to its folder; residuals are looked for, and not yet read.

    Raises ValueError, naming the file, the subject and what to change.
    """
    path = Path(path)
    found = (read_json if path.suffix == ".json" else read_yaml)("layout", path)
    entries = found if isinstance(found, list) else [found]
    if not entries:
        raise ValueError(f"layout {str(path)!r} is an empty list; give it at least one scene")
    scenes = []
    for i, entry in enumerate(entries, 1):
        try:
            scenes.append(_scene(entry, path.parent))
        except ValueError as error:
            number = f", number {i}" if len(entries) > 1 else ""
            raise ValueError(f"layout {str(path)!r}{number}: {error}") from error
    return scenes


def _scene(entry: Any, folder: Path) -> Scene:
    _object("a scene", entry, KEYS | PUBLISHED)
    positions: dict[str, int] = {}
    if PUBLISHED & entry.keys():
        entry, positions = _from_published(entry)
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt must be a text that names the subjects, got {short(prompt)}")
    regions, strengths = _painted(entry, folder)
    residuals: dict[str, Path] = {}
    for name, subject in _object("subjects", entry.get("subjects", {})).items():
        what = f"subject {name!r}"
        _object(what, subject, SUBJECT_KEYS)
        placed = [key for key in ("box", "mask") if key in subject]
        if len(placed) + (name in regions) > 1:
            ways = " and ".join([*placed, *(["a colour of the legend"] if name in regions else [])])
            raise ValueError(f"{what} is placed twice, by {ways}; keep one of them")
        if not subject.keys() & {"box", "mask", "residual"} and name not in regions:
            raise ValueError(f"{what} has neither place nor residual; give it a box, a mask or a residual")
        if "box" in subject:
            regions[name] = checked_box(name, subject["box"])
        if "mask" in subject:
            regions[name] = read_mask(_file(f"mask of {what}", subject["mask"], folder))
        if "residual" in subject:
            residuals[name] = _file(f"residual of {what}", subject["residual"], folder)
        if "strength" in subject:
            strengths[name] = typed(f"strength of {what}", subject["strength"], NUMBER)
    if not regions and not residuals:
        raise ValueError('it names no subject; add "subjects", or "layout" and "legend"')
    if not regions and strengths:
        raise ValueError(f"subject {next(iter(strengths))!r} has a strength but no box or mask; add one")
    given = _object("guidance", entry.get("guidance", {}), GUIDANCE)
    guidance = {key: typed(f"guidance {key}", value, GUIDANCE[key]) for key, value in given.items()}
    LayoutGuidance(**guidance)  # here the file is known that a bad value is of
    layout = Layout(regions, strengths) if regions else None
    return Scene(prompt, layout, residuals, guidance, positions)


def _painted(entry: Mapping[str, Any], folder: Path) -> tuple[dict[str, Box | Tensor], dict[str, float]]:
    """The regions and strengths of a colour map with its legend; none where there is none."""
    if ("layout" in entry) != ("legend" in entry):
        missing, why = ("legend", "what its colours mean") if "layout" in entry else ("layout", "the picture")
        raise ValueError(f'"layout" and "legend" go together; add {missing!r}, {why}')
    if "layout" not in entry:
        return {}, {}
    names, strengths = {}, {}
    for key, value in _object("legend", entry["legend"]).items():
        name, *rest = value if isinstance(value, list) and len(value) == 2 else [value]
        if not isinstance(name, str):
            raise ValueError(f'legend {key!r} must be "subject" or ["subject", strength], got {short(value)}')
        names[key] = name
        if rest:
            strengths[name] = typed(f"strength of subject {name!r}", rest[0], NUMBER)
    picture = _file("layout picture", entry["layout"], folder)
    return dict(read_colour_map(picture, names, entry.get("background"))), strengths


def _from_published(entry: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """A scene of the published Cones 2 configuration in our keys, and the token positions that it lists."""
    _object("a published scene", entry, PUBLISHED | {"prompt", "layout", "background"})
    paths = _object("residual_dict", entry.get("residual_dict", {}))
    seen: Counter[str] = Counter()
    subjects, positions = {}, {}
    for word, position in sorted(_listed(entry), key=lambda pair: pair[1]):
        seen[word] += 1
        name = word if seen[word] == 1 else f"{word}#{seen[word]}"
        path = paths.get(word, paths.get(split_subject(word)[0]))
        if path is None:
            raise ValueError(
                f"subject {word!r} of subject_list is not in residual_dict{nearest(word, paths)}"
            )
        subjects[name], positions[name] = {"residual": path}, position
    ours = {key: entry[key] for key in ("prompt", "layout", "background") if key in entry}
    ours["guidance"] = {name: entry[key] for key, name in PUBLISHED_GUIDANCE.items() if key in entry}
    if "color_context" in entry:
        ours["legend"] = entry["color_context"]
    return {**ours, "subjects": subjects}, positions


def _listed(entry: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The pairs of a published subject_list."""
    listed = entry.get("subject_list", [])
    for pair in listed if isinstance(listed, list) else [listed]:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(
                f'subject_list must hold pairs of ["subject", token position], got {short(pair)}'
            )
    return [(word, typed(f"position of subject {word!r}", at, GUIDANCE["steps"])) for word, at in listed]


def _object(what: str, value: Any, known: Iterable[str] | None = None) -> Mapping[str, Any]:
    """`value` if it is an object with text for keys, and these `known` where given; else ValueError."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} must be an object of named fields, got {short(value)}")
    for key in value:
        if known is not None and key not in known:
            raise ValueError(f"{what} has an unknown key {key!r}{nearest(key, known)}")
    return value


def _file(what: str, name: Any, folder: Path) -> Path:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what} must be the name of a file, got {short(name)}")
    path = folder / name
    if not path.is_file():
        raise ValueError(
            f"{what}: there is no file {name!r} in {str(folder)!r}; put it there or mend the name"
        )
    return path
