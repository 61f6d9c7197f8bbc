"""JSON and YAML files that people write: read with errors that name the file, and the key that is meant."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_json(what: str, file: str | Path) -> Any:
    """The content of a JSON file, `what` in errors; raises ValueError, also where a key is repeated."""
    return _read(what, file, "JSON", lambda text: json.loads(text, object_pairs_hook=_unique))


def read_yaml(what: str, file: str | Path) -> Any:
    """The content of a YAML file, of plain types alone, as `read_json`."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            written = node.value if isinstance(node, yaml.MappingNode) else ()  # before << is merged in
            _unique((str(self.construct_object(key, deep=True)), None) for key, _ in written)
            return super().construct_mapping(node, deep)

    tags = (AttributeError, LookupError, TypeError)  # what PyYAML raises of a value that its tag does not fit
    return _read(what, file, "YAML", lambda text: yaml.load(text, Loader), yaml.YAMLError, *tags)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error on an unknown `name`: which is meant, or which there are."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known) or 'none'}"


def _read(what: str, file: str | Path, kind: str, parse: Any, *errors: type[Exception]) -> Any:
    try:
        return parse(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{what} {str(file)!r} cannot be read: {error.strerror}") from error
    except _Repeated as error:
        raise ValueError(f"{what} {str(file)!r} {error}") from error
    except (ValueError, RecursionError, *errors) as error:
        raise ValueError(f"{what} {str(file)!r} is not {kind}: {error}") from error


class _Repeated(ValueError):
    pass


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Repeated(f"has {key!r} twice in one place; keep one of them")
        found[key] = value
    return found
