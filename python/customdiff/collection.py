"""Large captioned collections: every caption is read at once, a picture only when it is wanted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from . import data

# Names in use among published data sets, in any case; pictures are bytes, or paths from the table's folder.
CAPTION_COLUMNS = ("caption", "text")
PICTURE_COLUMNS = ("image", "jpg", "png", "webp", "file_name", "file", "image_path", "path")


class Entry(NamedTuple):
    """One picture: a file, or a row of the Parquet file that holds it."""

    caption: str
    path: Path
    row: int | None = None


class Collection:
    """The captioned pictures of a folder, its subfolders and their Parquet files, or of one Parquet file.

    A caption stands where ``data.read_captioned`` finds it, or in a Parquet file: a column named as in
    CAPTION_COLUMNS beside one of PICTURE_COLUMNS, which holds bytes, paths, or both as the datasets library
    writes them. The order is that of the names, then of the rows.

    entries: list of Entry, those with a caption.
    without_caption: how many pictures have none, and are left out.

    Raises:
        ValueError: if there is nothing at `root`, no picture in it has a caption, or a table cannot be read.
    """

    def __init__(self, root: str | Path):
        root = Path(root)
        self._open: tuple[Any, Any] = (None, None)  # the row group read last: which, and its pictures
        if root.is_dir():
            rows, files = _walk(root)
        elif root.suffix.lower() == ".parquet" and root.is_file():
            rows, files = _parquet(root, required=True)
        else:
            raise ValueError(
                f"images {str(root)!r} is neither a folder nor a .parquet file; give captioned pictures"
            )
        found = [*(Entry(caption, path) for path, caption in files.items()), *rows]
        self.entries = [entry for entry in found if entry.caption]
        self.without_caption = len(found) - len(self.entries)
        if not self.entries:
            has = f"{len(found)} pictures, none with a caption" if found else "no picture"
            raise ValueError(
                f"images {str(root)!r} holds {has}; captions stand in a .txt beside each picture, in "
                "captions.csv (columns file, caption), captions.jsonl, or in a .parquet file"
            )

    def read(self, entry: Entry) -> bytes:
        """The picture of `entry` as it is stored; raises one of ``data.UNREADABLE`` where it cannot be."""
        if entry.row is None:
            return entry.path.read_bytes()
        import pyarrow.parquet as pq

        with pq.ParquetFile(entry.path) as file:
            first, group = 0, 0
            while entry.row >= first + file.metadata.row_group(group).num_rows:
                first += file.metadata.row_group(group).num_rows
                group += 1
            if self._open[0] != (entry.path, group):
                name = _column(file.schema_arrow.names, PICTURE_COLUMNS)
                self._open = (entry.path, group), file.read_row_group(group, columns=[name]).column(0)
        value = self._open[1][entry.row - first].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return (entry.path.parent / value).read_bytes()
        if not value:
            raise ValueError(f"row {entry.row} of {str(entry.path)!r} holds no picture")
        return value


def _walk(root: Path) -> tuple[list[Entry], dict[Path, str]]:
    """Pictures inside of tables, and {file: caption or ""} of all others, below `root`."""
    rows: list[Entry] = []
    files: dict[Path, str] = {}
    tables: dict[Path, str] = {}
    for name, subfolders, names in os.walk(root):
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        folder, present = Path(name), set(names)
        for file, caption in data.caption_table(folder).items():
            if file:
                tables[folder / file] = caption
        for file in sorted(names):
            path = folder / file
            if file.lower().endswith(data.SUFFIXES):
                beside = path.with_suffix(".txt")
                files[path] = data.read_text(beside).strip() if beside.name in present else ""
            elif file.lower().endswith(".parquet"):
                held, named = _parquet(path)
                rows += held
                tables = named | tables
    for path, caption in tables.items():
        files[path] = files.get(path) or caption
    return rows, files


def _parquet(path: Path, required: bool = False) -> tuple[list[Entry], dict[Path, str]]:
    """The pictures inside of a Parquet file, and {file: caption} of those that it names.

    Without columns of both kinds, as in img2dataset's tables beside pictures, there are none; an error if
    `required`.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ValueError(f"reading {str(path)!r} needs pyarrow: pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            text, picture = (_column(names, known) for known in (CAPTION_COLUMNS, PICTURE_COLUMNS))
            if text is None or picture is None:
                if not required:
                    return [], {}
                raise ValueError(
                    f"it has the columns {', '.join(names)}; wanted are one of {', '.join(CAPTION_COLUMNS)} "
                    f"and one of {', '.join(PICTURE_COLUMNS)}"
                )
            kinds = [file.schema_arrow.field(name).type for name in (text, picture)]
            words = [pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds]
            if not words[0]:
                raise ValueError(f"its column {text} holds {kinds[0]}, wanted is text")
            columns = [text, picture] if words[1] else [text]
            table = file.read(columns=columns)
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no Parquet file that can be read: {error}") from error
    captions = [(caption or "").strip() for caption in table.column(text).to_pylist()]
    if words[1]:
        places = table.column(picture).to_pylist()
        return [], {
            path.parent / place: caption for place, caption in zip(places, captions, strict=True) if place
        }
    return [Entry(caption, path, row) for row, caption in enumerate(captions)], {}


def _column(names: list[str], known: tuple[str, ...]) -> str | None:
    """The column of `names` that comes first among the `known`."""
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in known if name in lower), None)
