"""Columns about images from a table of others: CSV, JSON Lines or Parquet, joined by the images' paths."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from blip2.errors import DataError, MissingExtraError
from blip2.search.where import Values

PATH_COLUMNS = ("path", "image", "file", "file_name", "filename")
_CELL = 1 << 20  # characters of a cell at most


def columns(table: str | os.PathLike[str], paths: Sequence[str], roots: Sequence[str]) -> dict[str, Values]:
    """The columns of a table, a value for each image.

    Args:
        table: a file with a column `path` (or `image`, `file`, `file_name`, `filename`): absolute, or relative to the
            table's folder or to one of the roots.
        paths: absolute, of the images.
        roots: folders that the images were found in.
    Returns:
        By name; None where the table has nothing for an image. A column is of numbers where all its values are.
    Raises:
        DataError: the table cannot be read, has no column of paths, or names none of the images.
        MissingExtraError: it is Parquet, and the extra is not installed.
    """
    source = Path(table)
    rows = _rows(source)
    if not rows:
        raise DataError(f"{source}: has no rows")
    key = next((name for name in PATH_COLUMNS if name in rows[0]), None)
    if key is None:
        raise DataError(f"{source}: has no column of paths; name it one of {', '.join(PATH_COLUMNS)}")
    places = {path: position for position, path in enumerate(paths)}
    bases = [os.path.abspath(source.parent), *roots]  # noqa: PTH100  (resolve() would follow links)
    names = list(dict.fromkeys(name for row in rows for name in row if name != key))
    found: dict[str, list[Any]] = {name: [None] * len(paths) for name in names}
    joined = 0
    for row in rows:
        position = _position(row.get(key), bases, places)
        if position is not None:
            joined += 1
            for name, value in row.items():
                if name != key:
                    found[name][position] = value
    if not joined:
        raise DataError(
            f"{source}: names none of the images; its column {key!r} begins with {rows[0].get(key)!r}, and is "
            "taken as relative to the table's folder or to the folders of the index"
        )
    return {name: _column(values) for name, values in found.items()}


def _position(name: Any, bases: Iterable[str], places: dict[str, int]) -> int | None:
    if not isinstance(name, str):
        return None
    tried = (os.path.normpath(os.path.join(base, name)) for base in bases)  # noqa: PTH118  (an absolute name stays)
    return next((places[path] for path in tried if path in places), None)


def _column(values: Sequence[Any]) -> Values:
    """All numbers, or all texts; empty cells and not-a-numbers are missing."""
    cells = [None if _missing(value) else value for value in values]
    numbers = [_number(cell) for cell in cells]
    if all(number is not None or cell is None for number, cell in zip(numbers, cells, strict=True)):
        return numbers
    return [cell if cell is None or isinstance(cell, str) else json.dumps(cell, default=str) for cell in cells]


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _number(cell: Any) -> float | None:
    if cell is None or isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        number = float(cell)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _rows(source: Path) -> list[dict[str, Any]]:
    try:
        match source.suffix.lower():
            case ".csv":
                csv.field_size_limit(_CELL)
                with source.open(newline="", encoding="utf-8-sig") as file:
                    return [
                        {str(name): value for name, value in row.items() if name is not None}
                        for row in csv.DictReader(file)
                    ]
            case ".jsonl":
                rows = [
                    json.loads(line) for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()
                ]
                if not all(isinstance(row, dict) for row in rows):
                    raise ValueError("a line is no object")
                return cast("list[dict[str, Any]]", rows)
            case ".parquet":
                return _parquet_rows(source)
            case _:
                raise DataError(f"{source}: is no table that is known; give .csv, .jsonl or .parquet")
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # pyarrow's are ValueErrors and OSErrors
        raise DataError(f"{source}: cannot be read as a table ({error})") from error


def _parquet_rows(source: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtraError(f"{source}: reading Parquet", "parquet") from None
    return parquet.read_table(source).to_pylist()
