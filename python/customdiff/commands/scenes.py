"""What ``customdiff sample`` is asked to draw: prompts, each with its concept, residuals and layout."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import existing, match_files, positive

if TYPE_CHECKING:
    from torch import Tensor

    from ..concept import Concept
    from ..guidance import LayoutGuidance
    from ..layout_files import Scene
    from ..layouts import Layout
    from ..residual import Residual


@dataclass
class Asked:
    """The options that stand after a --prompt, or, without one, before all."""

    prompt: str | None
    concept: list[str] = field(default_factory=list)
    residual: list[str] = field(default_factory=list)
    box: list[str] = field(default_factory=list)
    layout: list[str] = field(default_factory=list)


@dataclass
class Wanted:
    """One prompt, with what it is sampled with."""

    prompt: str
    concept: Concept | None
    residuals: dict[str, Residual]
    regions: dict[str, Any]
    strengths: dict[str, float] = field(default_factory=dict)
    scene: Scene | None = None  # of a layout file

    @property
    def words(self) -> list[str]:
        return list(self.concept.modifier_tokens) if self.concept else []

    @property
    def subjects(self) -> list[str]:
        return list(dict.fromkeys([*self.regions, *self.residuals]))

    @property
    def layout(self) -> Layout | None:
        from ..layouts import Layout

        return Layout(self.regions, self.strengths) if self.regions else None


class OfPrompt(argparse.Action):
    """Collects into ``asked``: first what stands before all prompts, then an entry for each --prompt."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, flag: str | None = None
    ) -> None:
        asked: list[Asked] = getattr(namespace, "asked", None) or [Asked(None)]
        given = getattr(asked[-1], self.dest)
        if flag == "--prompt":
            asked.append(Asked(value))
        elif flag in ("--concept", "--layout") and given and asked[-1].prompt is not None:
            remedy = "; merge them first" if flag == "--concept" else ""
            parser.error(f"{flag} {value}: the prompt {asked[-1].prompt!r} has one already{remedy}")
        else:
            given.append(value)
        namespace.asked = asked
        setattr(namespace, self.dest, value)


def add_scenes(parser: argparse.ArgumentParser) -> None:
    """The options that ``read_scenes`` and ``layout_guidance`` read."""
    add = parser.add_argument
    add("--prompt", action=OfPrompt, metavar="TEXT", help="may be given several times")
    add("--concept", action=OfPrompt, metavar="FILE", help="concept file of a prompt, or of all")
    group = parser.add_argument_group("Cones 2")
    add = group.add_argument
    add(
        "--residual",
        action=OfPrompt,
        metavar="[SUBJECT=]FILE",
        help="residual of a subject, its word in the prompt (default: the file's); dog#2: the second dog",
    )
    add(
        "--box",
        action=OfPrompt,
        metavar="SUBJECT=X0,Y0,X1,Y1",
        help="where it is to be, in fractions, 0 to 1",
    )
    add(
        "--layout",
        action=OfPrompt,
        metavar="FILE",
        help="layout file of a prompt; without any --prompt, its scenes are drawn (docs/layouts.md)",
    )
    add("--draw-layout", action="store_true", help="draw the regions over the pictures")
    add(
        "--save-attention",
        action="store_true",
        help="plot where each subject was attended to, beside its region, in each prompt's first picture",
    )
    add("--layout-weight", type=float, metavar="NUMBER", help="how strongly layouts guide (default: 0.08)")
    add("--layout-schedule", metavar="NAME", help="published, constant or cosine (default: published)")
    add("--layout-steps", type=positive, metavar="N", help="guide the first N steps (default: all)")
    add("--layout-positive", type=float, metavar="NUMBER", help="in a subject's region (default: 2.5)")
    add(
        "--layout-negative",
        type=float,
        metavar="NUMBER",
        help="outside: as --layout-negative=-1e8, the default",
    )
    add("--layout-outside", type=float, metavar="NUMBER", help="in no region (default: --layout-negative)")
    add(
        "--recurrence",
        action="store_const",
        const=True,
        help="take every guided step twice, as the published code does",
    )


def read_scenes(options: argparse.Namespace) -> tuple[list[Wanted], Wanted]:
    """The prompts with what is theirs, and what stands before them all; ValueError for a file that is bad."""
    shared, *own = getattr(options, "asked", None) or [Asked(None)]
    if own:
        if len(shared.layout) > 1:
            raise ValueError(f"--layout {shared.layout[1]}: all prompts have {shared.layout[0]} already")
        entries = [(entry, _only_scene(entry.layout or shared.layout)) for entry in own]
    else:
        entries = [(Asked(scene.prompt), scene) for name in shared.layout for scene in _load(name)]
        if not entries:
            raise ValueError("--prompt is missing; give one, or a --layout file, which has its own")
    concepts = _concepts(shared.concept, [entry for entry, _ in entries])
    wanted = []
    for (entry, scene), concept in zip(entries, concepts, strict=True):
        given = Wanted(
            entry.prompt or "", concept, _residuals(entry.residual), _boxes(entry.box), scene=scene
        )
        if scene is not None:
            files = {name: _residual(str(file), name) for name, file in scene.residuals.items()}
            given.residuals = _joined(files, given.residuals, "residual")
            if scene.layout is not None:
                given.regions = _joined(scene.layout.regions, given.regions, "place")
                given.strengths = dict(scene.layout.strengths)
        wanted.append(given)
    return wanted, Wanted("", None, _residuals(shared.residual), _boxes(shared.box))


def share(wanted: Sequence[Wanted], shared: Wanted, tokenizer: Any) -> None:
    """Gives what stands before all prompts to those that name its subject, and have no such of their own.

    Raises ValueError, naming the subject, if that is none, or a file lists it at another token.
    """
    for entry in wanted:
        if entry.scene is not None and entry.scene.prompt == entry.prompt:
            entry.scene.check(tokenizer, entry.words)
    for flag in ("residuals", "regions"):
        for name, value in getattr(shared, flag).items():
            fitting = [entry for entry in wanted if _names(entry, name, tokenizer)]
            if not fitting:
                raise ValueError(f"subject {name!r} is in no prompt; write it there, or leave its option out")
            for entry in fitting:
                getattr(entry, flag).setdefault(name, value)


def layout_guidance(options: argparse.Namespace, wanted: Sequence[Wanted]) -> LayoutGuidance:
    """What the options say; for the rest what the layout files do, which must agree: there is one batch."""
    from ..guidance import LayoutGuidance

    found: dict[str, Any] = {}
    for name in (each.name for each in fields(LayoutGuidance)):
        said = getattr(options, _flag(name))
        of_files = [e.scene.guidance[name] for e in wanted if e.scene and name in e.scene.guidance]
        if said is not None:
            found[name] = said
        elif any(value != of_files[0] for value in of_files):
            raise ValueError(
                f"the layouts set guidance {name} to {of_files[0]} and to others; sample them one by one, or "
                "say it with an option"
            )
        elif of_files:
            found[name] = of_files[0]
    return LayoutGuidance(**found)


def check_guided(options: argparse.Namespace, wanted: Sequence[Wanted]) -> None:
    """Raises ValueError for an option of layouts where no prompt has one."""
    from ..guidance import LayoutGuidance

    names = ["draw_layout", *(_flag(each.name) for each in fields(LayoutGuidance))]
    said = [name for name in names if getattr(options, name) not in (None, False)]
    if said and not any(entry.regions for entry in wanted):
        raise ValueError(f"--{said[0].replace('_', '-')} needs a layout; give --box or --layout")


def subject_maps(entry: Wanted, maps: Tensor, tokenizer: Any) -> list[tuple[str, Tensor]]:
    """(title, map): each subject's region, and where it was attended to, of a picture's ``maps`` (S,h,w)."""
    from ..layouts import Layout
    from ..subjects import find_subject

    found = []
    for name in entry.subjects:
        at = find_subject(tokenizer, entry.prompt, name, entry.words)
        if name in entry.regions:
            alone = Layout({name: entry.regions[name]})
            region = alone.bias({name: at}, tuple(maps.shape[1:]), len(maps), 1.0, 0.0).dense()
            found.append((f"{name}: region", region[0, 0, :, at[0]].unflatten(0, maps.shape[1:])))
        found.append((name, maps[list(at)].sum(0)))
    return found


def _flag(name: str) -> str:
    """The option that sets a field of LayoutGuidance."""
    return name if name == "recurrence" else f"layout_{name}"


def _names(entry: Wanted, subject: str, tokenizer: Any) -> bool:
    from ..subjects import find_subject

    try:
        return bool(find_subject(tokenizer, entry.prompt, subject, entry.words))
    except ValueError:
        return False


def _concepts(shared: list[str], asked: Sequence[Asked]) -> list[Concept | None]:
    """The concept of each prompt; without a file of its own the one of the shared files that fits."""
    from ..concept import Concept

    own = [file for entry in asked for file in entry.concept]
    files = {name: Concept.load(existing(name)) for name in dict.fromkeys([*shared, *own])}
    common = {name: files[name] for name in shared}
    matched = match_files([entry.prompt or "" for entry in asked if not entry.concept], common, "--prompt")
    rest = iter(matched)
    return [files[entry.concept[0]] if entry.concept else next(rest) for entry in asked]


def _load(name: str) -> list[Scene]:
    from ..layout_files import load_layout

    return load_layout(name)


def _only_scene(names: list[str]) -> Scene | None:
    """The scene of a --layout of a prompt."""
    if not names:
        return None
    scenes = _load(names[0])
    if len(scenes) != 1:
        raise ValueError(
            f"--layout {names[0]} has {len(scenes)} scenes, and a --prompt takes one; leave --prompt out to "
            "draw them all"
        )
    return scenes[0]


def _residuals(texts: Sequence[str]) -> dict[str, Residual]:
    found: dict[str, Residual] = {}
    for text in texts:
        name, _, file = ("", "", text) if Path(text).is_file() or "=" not in text else text.partition("=")
        residual = _residual(file, name.strip() or None)
        found = _joined(found, {name.strip() or residual.word: residual}, "residual")
    return found


def _residual(file: str, name: str | None) -> Residual:
    """``name``: of the subject, whose word a published file does not know."""
    from ..residual import Residual
    from ..subjects import split_subject

    return Residual.load(file, split_subject(name)[0] if name else None)


def _boxes(texts: Sequence[str]) -> dict[str, Any]:
    from ..layouts import parse_boxes

    return dict(parse_boxes(texts).regions) if texts else {}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any], what: str) -> dict[str, Any]:
    if both := sorted(first.keys() & second.keys()):
        raise ValueError(f"subject {both[0]!r} has a {what} twice; keep one, or name the second {both[0]}#2")
    return {**first, **second}
