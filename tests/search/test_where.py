"""Conditions are read strictly, and mean what they say."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import Fake, names

from blip2.errors import ConfigError, DataError, MissingExtraError
from blip2.search import ImageIndex, table
from blip2.search.where import parse, selected

FILES = [
    ("/a/2020/one.jpg", 500, int(datetime(2020, 12, 31, 23, 59, 59).timestamp() * 1e9)),
    ("/a/2021/two.png", 200_000, int(datetime(2021, 1, 1).timestamp() * 1e9)),
    ("/a/2021/x y.jpg", 3_000_000, int(datetime(2021, 6, 15, 12).timestamp() * 1e9)),
    ("/b/four.jpg", 200_000, int(datetime(2022, 2, 28).timestamp() * 1e9)),
]
COLUMNS = {
    "year": [2020.0, 2021.0, None, 1999.5],
    "camera": ["X100", None, "Nikon D5", "x100"],
    "taken by": ["Ada", "Bo", "Ada", None],
}


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("year >= 2020", [0, 1]),
        ("year != 2020", [1, 3]),  # what has no year fulfils nothing
        ("year<1999.6", [3]),
        ("year == 2.021e3", [1]),
        ("camera = X100", [0]),
        ("camera != X100", [2, 3]),
        ("camera = Nikon D5", [2]),
        ('camera ~ "Nikon*"', [2]),
        ("camera !~ *100", [2]),
        ("camera > X", [0, 3]),
        ('"taken by" = Ada', [0, 2]),
        ('camera = ""', []),
        ("path ~ 2021/*", [1, 2]),
        ("path ~ *.jpg", [0, 2, 3]),
        ("path ~ /a/*", [0, 1, 2]),
        ("path !~ four.*", [0, 1, 2]),
        ('path = "/a/2021/x y.jpg"', [2]),
        ("path != /b/four.jpg", [0, 1, 2]),
        ("size > 200kB", [2]),
        ("size >= 200000", [1, 2, 3]),
        ("size = 0.2MB", [1, 3]),
        ("size < 1GB", [0, 1, 2, 3]),
        ("date = 2021", [1, 2]),
        ("date != 2021", [0, 3]),
        ("date > 2021", [3]),
        ("date <= 2021", [0, 1, 2]),
        ("date < 2021", [0]),
        ("date >= 2021-06", [2, 3]),
        ("date = 2020-12", [0]),
        ("date <= 2020-12-31", [0]),
        ("date > 2020-12-31", [1, 2, 3]),
    ],
)
def test_a_condition_selects(condition: str, rows: list[int]) -> None:
    assert selected([parse(condition)], FILES, COLUMNS).nonzero()[0].tolist() == rows


def test_all_conditions_must_hold() -> None:
    conditions = [parse("year >= 2020"), parse("path ~ *.png")]
    assert selected(conditions, FILES, COLUMNS).tolist() == [False, True, False, False]
    assert selected([], FILES, {}).all()


@pytest.mark.parametrize(
    "text", ["", "year", "year >=", ">= 2020", "year => 2020", 'a"b = 1', 'a = "b', "year >= 2020\nor 1 = 1", "a b = c"]
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no condition; write COLUMN OPERATOR VALUE"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("month = 3", r"'month = 3': there is no column 'month'; there are path, date, size, year, camera, taken by"),
        ("year >= old", r"'year >= old': year holds numbers, and 'old' is none"),
        ("year = nan", "year holds numbers, and 'nan' is none"),
        ("year ~ 20*", "year holds numbers, which have no pattern"),
        ("date > yesterday", "a date is such as 2021, 2021-06 or 2021-06-30"),
        ("date = 2021-02-30", "a date is such as"),
        ("date = 9999-12-31", "a date is such as"),
        ("size > big", "a size is a number of bytes, or such as 200kB"),
        ("path > x", "a path is compared by =, !=, ~ or !~"),
    ],
)
def test_what_cannot_be_compared_names_the_column(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        selected([parse(text)], FILES, COLUMNS)


@given(st.text(max_size=30))
def test_any_text_is_a_condition_or_a_named_error(text: str) -> None:
    try:
        condition = parse(text)
    except ConfigError:
        return
    assert condition.column
    assert condition.source == text


# -- tables -----------------------------------------------------------------------------------------------------------

ROWS = [
    {"path": "photos/01.png", "year": 2020, "note": "a, b"},
    {"path": "photos/./02.png", "year": 2021.5, "note": ""},
    {"path": "elsewhere.png", "year": 1, "note": "c"},
]


def written(folder: Path, kind: str) -> Path:
    file = folder / f"table.{kind}"
    if kind == "csv":
        file.write_text('path,year,note\nphotos/01.png,2020,"a, b"\nphotos/./02.png,2021.5,\nelsewhere.png,1,c\n')
    elif kind == "jsonl":
        file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    return file


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_is_joined_by_path(photos: Path, kind: str) -> None:
    index = ImageIndex.build(Fake(), [photos])
    file = written(photos.parent, kind)
    for condition, found in (
        ("year >= 2020", {"01.png", "02.png"}),
        ("note ~ a*", {"01.png"}),
        ("note != x", {"01.png"}),
    ):
        assert set(names(index.search("a dog", 99, where=[condition], table=file))) == found
    with pytest.raises(ConfigError, match="there is no column 'month'; there are path, date, size, year, note"):
        index.search("a dog", where=["month = 1"], table=file)


def test_paths_of_a_table_may_be_relative_to_the_indexed_folder(photos: Path, tmp_path: Path) -> None:
    index = ImageIndex.build(Fake(), [photos])
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "table.csv"
    file.write_text(f"file_name,flag\n03.png,true\n{photos / '04.png'},false\n")
    assert names(index.search("a dog", where=["flag = true"], table=file)) == ["03.png"]
    assert names(index.search("a dog", where=["flag = false"], table=file)) == ["04.png"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.csv", "", "has no rows"),
        ("t.csv", "a,b\n1,2\n", "has no column of paths; name it one of path, image"),
        ("t.csv", "path,b\nnowhere.png,2\n", "names none of the images; its column 'path' begins with 'nowhere.png'"),
        ("t.csv", b"path\n\xff\xfe\n", "cannot be read as a table"),
        ("t.jsonl", '{"path": "a"}\n{', "cannot be read as a table"),
        ("t.jsonl", "[1]\n", "a line is no object"),
        ("t.jsonl", "[" * 100_000, "cannot be read as a table"),
        ("t.parquet", "words", "cannot be read as a table"),
        ("t.txt", "path\n", "is no table that is known; give .csv, .jsonl or .parquet"),
        ("absent.csv", None, "cannot be read as a table"),
    ],
)
def test_a_table_that_makes_no_sense_is_named(
    photos: Path, tmp_path: Path, name: str, content: str | bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=rf"{name}: .*{reason}|{name}: {reason}"):
        table.columns(tmp_path / name, list(map(os.fspath, sorted(photos.iterdir()))), [str(photos)])


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"table\.parquet: reading Parquet .*blip2\[parquet\]"):
        table.columns(tmp_path / "table.parquet", [], [])
