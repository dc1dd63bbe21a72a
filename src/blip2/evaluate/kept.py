"""What an evaluation has found so far, in a folder: a run that is stopped or killed goes on where it was.

`run.json` says what the run is, `journal.jsonl` has a line a case as they come, `blocks/` arrays that are too large for
lines. What is finished is never done again; what a kill cut short is done anew, in the same batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import nn

from blip2.blip2 import Blip2
from blip2.errors import DataError
from blip2.files import replacing

Row = dict[str, Any]
T = TypeVar("T")

SAMPLED = 64  # values of a tensor that tell a model from another
_RUN, _JOURNAL, _BLOCKS = "run.json", "journal.jsonl", "blocks"


class Kept:
    """Rows by key, and arrays by name; in a folder too, where there is one.

    Args:
        folder: None keeps them in memory only.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.rows: dict[str, Row] = {}
        self._folder = folder
        if folder is None:
            return
        try:
            (folder / _BLOCKS).mkdir(parents=True, exist_ok=True)
            self._read(folder / _JOURNAL)
        except OSError as error:
            raise _unwritable(folder, error) from error

    def complete(
        self,
        items: Sequence[T],
        key: Callable[[T], str],
        work: Callable[[Sequence[T]], Sequence[Row]],
        batch_size: int,
        progress: Callable[[int, int], None],
    ) -> list[Row]:
        """A row of each item, in order: those that are kept, and the others by `work`, batch by batch.

        A batch always holds the same items, whatever was done before, so that its results are the same to the last bit.
        """
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            if any(key(item) not in self.rows for item in batch):
                found = {key(item): row for item, row in zip(batch, work(batch), strict=True)}
                self._add({name: row for name, row in found.items() if name not in self.rows})
            progress(min(start + batch_size, len(items)), len(items))
        return [self.rows[key(item)] for item in items]

    def block(self, name: str, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        """An array by its name: the kept one, or made and kept."""
        if self._folder is None:
            return make()
        path = self._folder / _BLOCKS / f"{name}.npy"
        if path.is_file():
            try:
                return np.load(path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: is damaged ({error}); delete it, and the run makes it again") from None
        found = make()
        try:
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, found)
        except OSError as error:
            raise _unwritable(path, error) from error
        return found

    def _add(self, rows: Mapping[str, Row]) -> None:
        self.rows.update(rows)
        if self._folder is None or not rows:
            return
        lines = [json.dumps({"key": key, **row}, ensure_ascii=False) + "\n" for key, row in rows.items()]
        path = self._folder / _JOURNAL
        try:
            with path.open("ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(path, error) from error

    def _read(self, path: Path) -> None:
        """The journal, mended: a last line that a kill cut short leaves it."""
        content = path.read_bytes() if path.exists() else b""
        whole, newline, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self.rows[row.pop("key")] = row
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{path}: line {number} is damaged; take it out, and the run does it again") from None
        if torn:
            with replacing(path) as partial:
                partial.write_bytes(whole + newline)


def identity(model: Blip2) -> str:
    """What tells a model from another, all of its parts with it: 16 hexadecimal digits.

    A digest of the model's own identity (its files, or the frozen parts' digests), of its configuration, of the special
    tokens, and of name, shape, type and some values of each tensor in memory, wherever it came from. Packed layers are
    read one by one.
    """
    found = hashlib.sha256(f"{model.identity} {model.config}".encode())
    for tokenizer in (model.tokenizer, model.text_tokenizer):
        ids = tokenizer and (tokenizer.bos, tokenizer.pad, tokenizer.stop_ids, tokenizer.end, tokenizer.frame)
        found.update(repr(ids).encode())
    for part in (model.encoder, model.bridge, model.language):
        for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
            whole = any(True for _ in module.children())
            state = dict(module.named_parameters(recurse=False)) if whole else module.state_dict()
            for name, tensor in state.items():
                values = tensor.detach().flatten()
                some = values[:: max(1, len(values) // SAMPLED)].float().cpu()
                found.update(f"{path}.{name}{list(tensor.shape)}{tensor.dtype}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]


@contextmanager
def keeping(folder: Path | None, about: Mapping[str, Any]) -> Generator[Kept]:
    """What a folder keeps of a run, and the folder to this process alone.

    Args:
        folder: made where it is not there; None keeps nothing.
        about: what the run's results depend on, in values of JSON; another run is refused the folder.
    Raises:
        DataError: the folder holds another run, is in use, or cannot be written.
    """
    if folder is None:
        yield Kept()
        return
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"{folder}: another run is writing to it; wait for it, or give another folder") from None
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        _claim(folder, json.loads(json.dumps(about)))
        yield Kept(folder)
    finally:
        lock.release()


def _claim(folder: Path, about: Mapping[str, Any]) -> None:
    path = folder / _RUN
    if not path.is_file():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise DataError(f"{folder}: holds other files; give a new folder, or one of an earlier run")
        write_json(path, about)
        return
    try:
        known = json.loads(path.read_bytes())
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise DataError(f"{path}: is damaged; delete the folder, or give another")
    for name in sorted({*known, *about}):
        if known.get(name) != about.get(name):
            raise DataError(
                f"{folder}: holds a run with {name} {_brief(known.get(name))}, this one has {_brief(about.get(name))}; "
                "give another folder, or delete this one"
            )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def write_json(path: Path, value: Any) -> None:
    """JSON that appears whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """A JSON list, an item a line: the official evaluations read it, and so do people.

    Raises:
        DataError: it cannot be written.
    """
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    try:
        with replacing(path) as partial:
            partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """JSON Lines that appear whole or not at all.

    Raises:
        DataError: they cannot be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be written ({error.strerror}); what was finished is kept: run again to go on")
