"""TrainConfig from a preset, a YAML file and the command line: each overrides those before it."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from .config import ConceptConfig, TrainConfig
from .documents import nearest, read_json, read_yaml
from .presets import PRESETS, preset

# keys of the published concept_list.json, and ours
PUBLISHED = {
    "instance_prompt": "prompts",
    "instance_data_dir": "images",
    "class_prompt": "regularization_prompt",
    "class_data_dir": "regularization",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` one option a field of TrainConfig, `--like-this`, and --config and --preset."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of any of the options below")
    presets = "; ".join(f"{name}: {about}" for name, (about, *_) in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help=f"named settings: {presets}")
    for field in dataclasses.fields(TrainConfig):
        kind = _kind(field)
        text = field.metadata["help"].replace("%", "%%")
        if field.default not in (None, (), False):
            text += f" (default: {field.default})"
        flag, keywords = "--" + field.name.replace("_", "-"), {"help": text, "default": argparse.SUPPRESS}
        if kind.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **keywords)
        elif kind.type is ConceptConfig:
            parser.add_argument(flag, metavar="FILE", **keywords)
        else:
            parser.add_argument(
                flag,
                type=kind.type,
                nargs="+" if kind.many else None,
                choices=kind.choices,
                metavar=None if kind.choices else kind.type.__name__.upper().replace("STR", "TEXT"),
                **keywords,
            )


def from_arguments(arguments: argparse.Namespace) -> TrainConfig:
    """The configuration in a namespace parsed with `add_arguments`."""
    given = {
        f.name: getattr(arguments, f.name) for f in dataclasses.fields(TrainConfig) if f.name in arguments
    }
    return configuration(given, arguments.config, arguments.preset)


def configuration(
    given: Mapping[str, Any], file: str | None = None, preset_name: str | None = None
) -> TrainConfig:
    """`given` fields of TrainConfig over those of a YAML `file` over those of a preset, named here or there.

    Raises ValueError for a file that cannot be read, and naming fields that are unknown or of another type.
    """
    written = _settings(file) if file is not None else {}
    name = written.pop("preset", None)
    settings = {**written, **given}
    listed, where = settings.pop("concepts", None) or (), f"concepts of {file!r}"
    if isinstance(listed, str):
        listed, where = read_json("concepts", listed), f"concepts {listed!r}"
    if name := preset_name or name:
        about = preset(name, len(listed) > 1)
        own, asked = (d.get("method", TrainConfig.method) for d in (about, settings))
        if "method" in settings and own != asked:
            fitting = [n for n in PRESETS if preset(n).get("method", TrainConfig.method) == asked]
            raise ValueError(
                f"preset {name!r} is of method {own!r}, and method is {asked!r}; its presets are "
                f"{', '.join(fitting)}"
            )
        settings = {**about, **settings}
    if not listed:
        return TrainConfig(**settings)
    # what is said of all concepts holds for each that does not say it itself
    own = {field.name for field in dataclasses.fields(ConceptConfig)} - {"images", "prompts", "category"}
    shared = {name: settings.pop(name) for name in own & settings.keys()}
    return TrainConfig(**settings, concepts=read_concepts(listed, where, shared))


def _settings(file: str) -> dict[str, Any]:
    """The fields of TrainConfig in a YAML file, and perhaps "preset"."""
    found = read_yaml("config", file)
    if not isinstance(found, dict):
        raise ValueError(f"config {file!r} must hold fields, as 'steps: 250', got {type(found).__name__}")
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    settings = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name != "preset" and name not in fields:
            raise ValueError(f"config {file!r} has an unknown field {key!r}{nearest(name, fields)}")
        kept = name in ("preset", "concepts")
        settings[name] = value if kept else typed(f"{name} of {file!r}", value, _kind(fields[name]))
    return settings


def read_concepts(
    entries: Any, where: str = "concepts", shared: Mapping[str, Any] | None = None
) -> tuple[ConceptConfig, ...]:
    """Concepts from a list of objects, in the keys of the published concept_list.json or in ours.

    A concept without a "modifier_token" has the ``<word>`` of its prompt, and none if there is none. A file
    as "class_data_dir" or "class_prompt" (the published images.txt and caption.txt) stands for its folder.

    Args:
        where: what the list is called in errors.
        shared: what a concept has that does not say otherwise.

    Raises ValueError for what is no list of objects, an unknown key, or a value of another type.
    """
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"{where} must be a list of concepts, got {str(entries)[:60]}")
    return tuple(_concept(entry, f"{where}, number {i}", shared or {}) for i, entry in enumerate(entries, 1))


def _concept(entry: Any, where: str, shared: Mapping[str, Any]) -> ConceptConfig:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must be an object of fields, got {str(entry)[:60]}")
    fields = {field.name: field for field in dataclasses.fields(ConceptConfig)}
    settings: dict[str, Any] = dict(shared)
    for key, value in entry.items():
        name = PUBLISHED.get(key, key)
        if name not in fields:
            raise ValueError(f"{where} has an unknown key {key!r}{nearest(key, {*fields, *PUBLISHED})}")
        settings[name] = typed(f"{key} of {where}", value, _kind(fields[name]))
    prompts = settings.get("prompts", ())
    if "modifier_token" not in entry and prompts:
        word = re.search(r"<[\w-]+>", prompts[0])
        settings["modifier_token"] = word[0] if word else None
    folder = settings.get("regularization")
    if folder and Path(folder).suffix == ".txt":
        settings["regularization"] = str(Path(folder).parent)
    if (settings.get("regularization_prompt") or "").endswith(".txt"):
        del settings["regularization_prompt"]  # it is read with the folder
    return ConceptConfig(**settings)


class Kind(NamedTuple):
    """Of a field's value: its type, its choices, whether there may be several, or none."""

    type: Any
    choices: tuple[str, ...] | None
    many: bool
    optional: bool


NUMBER = Kind(float, None, many=False, optional=False)


def _kind(field: Any) -> Kind:
    owner = ConceptConfig if field.name in ConceptConfig.__annotations__ else TrainConfig
    hint = typing.get_type_hints(owner)[field.name]
    optional = type(None) in typing.get_args(hint)
    if optional:
        hint = next(argument for argument in typing.get_args(hint) if argument is not type(None))
    many = typing.get_origin(hint) is tuple
    hint = typing.get_args(hint)[0] if many else hint
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
    return Kind(str if choices else hint, choices, many, optional)


def typed(what: str, value: Any, kind: Kind) -> Any:
    """`value` as its field wants it; YAML reads 8e-5 as text, and one prompt is no list."""
    if value is None and kind.optional:
        return None
    if kind.many:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(typed(what, one, kind._replace(many=False)) for one in values)
    wanted = kind.type
    if wanted in (int, float):
        number = _number(value)
        if number is not None and (wanted is float or number.is_integer()):
            return wanted(number)
    elif isinstance(value, wanted) and (kind.choices is None or value in kind.choices):
        return value
    expected = f"one of {', '.join(kind.choices)}" if kind.choices else f"of type {wanted.__name__}"
    raise ValueError(f"{what} must be {expected}, got {short(value)}")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
