"""Conditions on images: on their path, date and size, and on any column of a table.

`year >= 2020`, `path ~ "2021/*.jpg"`, `date < 2021-06`, `size > 2MB`, `"taken by" = Ada`: a column, one of
`= != < <= > >= ~ !~`, a value. Nothing is ever evaluated as code.
"""

from __future__ import annotations

import fnmatch
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blip2.errors import ConfigError
from blip2.search.store import File

Values: TypeAlias = Sequence[float | str | None]  # of a column, one an image; all numbers or all texts
Mask: TypeAlias = NDArray[np.bool_]

OWN_COLUMNS = ("path", "date", "size")
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(
    r"""\s*(?: "(?P<quoted>[^"]+)" | (?P<bare>\w[\w.\-]*) )
        \s*(?P<operator> <= | >= | != | !~ | == | [=<>~] )
        \s*(?: "(?P<text>[^"]*)" | (?P<word>[^"\s=<>~!](?:[^"\n]*[^"\s])?) )\s*""",
    re.VERBOSE,
)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_DATE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d))?)?")


@dataclass(frozen=True)
class Condition:
    """One comparison.

    Attributes:
        source: as it was written.
    """

    column: str
    operator: str
    value: str
    source: str


def parse(text: str) -> Condition:
    """A condition.

    Raises:
        ConfigError: it is none.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{text!r}: is no condition; write COLUMN OPERATOR VALUE, such as 'year >= 2020', with one of "
            f"{' '.join(_OPERATORS)} ~ !~ (a pattern), and quotes around what has quotes or spaces at its ends"
        )
    sign = "=" if found["operator"] == "==" else found["operator"]
    return Condition(found["quoted"] or found["bare"], sign, found["text"] or found["word"] or "", text)


def selected(conditions: Sequence[Condition], files: Sequence[File], columns: Mapping[str, Values]) -> Mask:
    """Which images fulfil all conditions: bool[N]. What an image has no value for, it fulfils no condition on.

    Args:
        columns: of a table, beside path, date and size, which images have of themselves.
    Raises:
        ConfigError: a column is unknown, or cannot be compared with the value.
    """
    mask = np.ones(len(files), bool)
    for condition in conditions:
        mask &= _fulfilled(condition, files, columns)
    return mask


def _fulfilled(condition: Condition, files: Sequence[File], columns: Mapping[str, Values]) -> Mask:
    if condition.column in columns:
        return _compared(condition, columns[condition.column])
    if condition.column == "path":
        return (
            _matching(condition, [file[0] for file in files]) if "~" in condition.operator else _path(condition, files)
        )
    if condition.column == "date":
        return _dated(condition, np.array([file[2] / 1e9 for file in files]))
    if condition.column == "size":
        return _OPERATORS[_ordering(condition)](np.array([file[1] for file in files]), _bytes(condition))
    known = ", ".join([*OWN_COLUMNS, *columns])
    raise ConfigError(f"{condition.source!r}: there is no column {condition.column!r}; there are {known}")


def _path(condition: Condition, files: Sequence[File]) -> Mask:
    if condition.operator not in ("=", "!="):
        raise ConfigError(f"{condition.source!r}: a path is compared by =, !=, ~ or !~")
    return np.array([(file[0] == condition.value) == (condition.operator == "=") for file in files], bool)


def _matching(condition: Condition, values: Sequence[str | None]) -> Mask:
    """By a pattern, from the beginning of the value or of any folder in it."""
    pattern = re.compile(fnmatch.translate(condition.value))
    inner = re.compile(fnmatch.translate(f"*/{condition.value}"))
    wanted = condition.operator == "~"
    return np.array(
        [v is not None and bool(pattern.match(v) or inner.match(v)) == wanted for v in values], bool
    )  # fmt: skip


def _ordering(condition: Condition) -> str:
    if "~" in condition.operator:
        raise ConfigError(f"{condition.source!r}: {condition.column} holds numbers, which have no pattern")
    return condition.operator


def _bytes(condition: Condition) -> float:
    found = _SIZE.fullmatch(condition.value)
    if found is None:
        raise ConfigError(f"{condition.source!r}: a size is a number of bytes, or such as 200kB, 1.5MB")
    return float(found[1]) * _UNITS[found[2].lower()]


def _dated(condition: Condition, times: NDArray[np.float64]) -> Mask:
    """By the year, month or day as a whole: `= 2021` is any time in it, `> 2021` any after it."""
    sign = _ordering(condition)
    found = _DATE.fullmatch(condition.value)
    try:
        if found is None:
            raise ValueError
        year, month, day = int(found[1]), int(found[2] or 1), int(found[3] or 1)
        start = datetime(year, month, day)
        if found[3]:
            end = datetime.fromordinal(start.toordinal() + 1)
        elif found[2]:
            end = datetime(year + month // 12, month % 12 + 1, 1)
        else:
            end = datetime(year + 1, 1, 1)
        first, after = start.timestamp(), end.timestamp()
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"{condition.source!r}: a date is such as 2021, 2021-06 or 2021-06-30") from None
    within = (times >= first) & (times < after)
    match sign:
        case "=" | "!=":
            return within if sign == "=" else ~within
        case "<" | ">=":
            return _OPERATORS[sign](times, first)
        case _:
            return times < after if sign == "<=" else times >= after


def _compared(condition: Condition, values: Values) -> Mask:
    there = np.array([value is not None for value in values], bool)
    if any(isinstance(value, str) for value in values):
        texts = [value if isinstance(value, str) else None for value in values]
        if "~" in condition.operator:
            return _matching(condition, texts)
        compare = _OPERATORS[condition.operator]
        return np.array([text is not None and compare(text, condition.value) for text in texts], bool)
    sign = _ordering(condition)
    try:
        wanted = float(condition.value)
        if not math.isfinite(wanted):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{condition.source!r}: {condition.column} holds numbers, and {condition.value!r} is none"
        ) from None
    numbers = np.array([value if isinstance(value, int | float) else 0.0 for value in values])
    return there & _OPERATORS[sign](numbers, wanted)
