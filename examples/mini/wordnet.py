"""What the preparation and the judging of names need of WordNet: nouns, their synonyms, and what is a kind of what.

Reads the database files as Debian's `wordnet-base` installs them. Format: wndb(5WN), WordNet 3.0.
"""

from __future__ import annotations

import re
from functools import cache, cached_property
from pathlib import Path

from lexicon import LEXICON

DATABASE = Path("/usr/share/wordnet")

_ENDINGS = (("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"))
_QUANTITIES = frozenset(LEXICON["quantities"])
_DETERMINERS = frozenset(LEXICON["determiners"])
_ENDS = frozenset(LEXICON["ends"])
_COLOURS = frozenset(LEXICON["colours"])


class WordNet:
    """The nouns of WordNet; a synset is named by its offset, as ImageNet names its classes (`n01440764`)."""

    def __init__(self, root: Path = DATABASE) -> None:
        if not (root / "data.noun").is_file():
            raise FileNotFoundError(f"{root}: no WordNet here; `apt install wordnet-base`, or name its folder")
        self.root = root

    @cached_property
    def _senses(self) -> dict[str, tuple[int, ...]]:
        """Synsets of each noun, the most frequent sense first."""
        senses: dict[str, tuple[int, ...]] = {}
        for line in (self.root / "index.noun").read_text().splitlines():
            if not line.startswith(" "):  # the licence
                fields = line.split()
                senses[fields[0]] = tuple(int(offset) for offset in fields[-int(fields[2]) :])
        return senses

    @cached_property
    def _irregular(self) -> dict[str, str]:
        lines = (self.root / "noun.exc").read_text().splitlines()
        return {plural: singular for plural, singular, *_ in map(str.split, lines)}

    @cached_property
    def _data(self) -> bytes:
        return (self.root / "data.noun").read_bytes()

    @cache  # noqa: B019 (one database lives as long as the program)
    def _synset(self, offset: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Words of a synset, and the synsets that it is a kind of."""
        fields = self._data[offset : self._data.index(b"\n", offset)].decode().split(" | ")[0].split()
        count = int(fields[3], 16)
        words = tuple(fields[4 + 2 * n].lower().replace("_", " ") for n in range(count))
        pointers = fields[5 + 2 * count :]
        return words, tuple(int(pointers[n + 1]) for n in range(0, len(pointers) - 1, 4) if pointers[n] in ("@", "@i"))

    def lemma(self, word: str) -> str | None:
        """The singular of a noun, None for what is no noun: `geese` is `goose`."""
        word = word.lower()
        if word in self._irregular:
            return self._irregular[word]
        if word in self._senses:  # `scissors` and `Mars` too
            return word
        for ending, singular in _ENDINGS:
            if word.endswith(ending) and (stem := word.removesuffix(ending) + singular) in self._senses:
                return stem
        if word.endswith("s") and not word.endswith("ss") and word[:-1] in self._senses:
            return word[:-1]
        return None

    def senses(self, noun: str) -> tuple[int, ...]:
        """Synsets of a noun or a collocation, the most frequent first; none for what WordNet does not know."""
        return self._senses.get(noun.lower().replace(" ", "_"), ())

    def words(self, offset: int) -> tuple[str, ...]:
        """The synonyms that make a synset."""
        return self._synset(offset)[0]

    def synonyms(self, noun: str) -> frozenset[str]:
        """The noun and all words that share a sense with it."""
        return frozenset([noun]).union(*(self.words(offset) for offset in self.senses(noun)))

    def is_kind_of(self, offset: int, ancestor: int) -> bool:
        """Whether a synset is another one or below it."""
        return offset == ancestor or any(self.is_kind_of(above, ancestor) for above in self._synset(offset)[1])

    def nouns(self, text: str) -> list[str]:
        """Lemmas of all words of a text that can be nouns."""
        return [noun for word in re.findall(r"[a-z]+", text.lower()) if (noun := self.lemma(word)) is not None]

    def head_noun(self, text: str) -> str | None:
        """What a picture's title or caption names first: `A pair of red cherries in a bowl.` is `cherry`."""
        text = re.sub(r"\([^)]*\)|[\"“”]", " ", text)
        parts = re.split(r"[.!?,;:\u2013\u2014]|\s-\s", text.strip().lower())
        heads = [head for part in parts if (head := self._head(part)) is not None]
        return next((head for head in heads[:2] if self.senses(head)), next(iter(heads), None))

    def _head(self, text: str) -> str | None:
        words = re.findall(r"[a-z]+(?:[-'\u2019][a-z]+)*", text)
        while words:
            stop = next((place for place in range(len(words)) if self._ends(words, place)), len(words))
            name = [word for word in words[:stop] if word not in _DETERMINERS]
            if words[stop : stop + 1] == ["of"] and name and self.lemma(name[-1]) in _QUANTITIES:
                words = words[stop + 1 :]
            elif not name:
                return None
            elif (noun := self.lemma(name[-1])) is not None:
                return noun
            else:
                pair = " ".join(name[-2:])  # `santa claus`, where `claus` alone is no word
                return pair if self.senses(pair) else name[-1]
        return None

    @staticmethod
    def _ends(words: list[str], place: int) -> bool:
        """Whether a name is over before this word; `a red and white flag` goes on."""
        return words[place] in _ENDS and not (words[place] == "and" and place and words[place - 1] in _COLOURS)
