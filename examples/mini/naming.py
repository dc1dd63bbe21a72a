"""Whether a caption names a thing: its head noun is the thing, or shares a WordNet synset with it.

The head noun is the last noun of the first noun phrase. A phrase ends at a preposition, conjunction, auxiliary or
punctuation, and where a verb follows a noun: `a dog runs`, `two dogs play`, `a dog running`, but not `a toy train`
(a bare form after a singular is no verb). How often a word is noun or verb comes from WordNet's own counts. What a
picture or an amount is *of* is what is named.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cached_property

from wordnet import WordNet


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPENINGS = re.compile(r"^\s*(?:(?:there|this|it|that|here|these|those)(?:'s| is| are)|i see)\s+")
_DETERMINERS = _words("a an the some this that these those its his her their my your our another")
_NUMBERS = _words("one two three four five six seven eight nine ten several many few")
_ENDS = _words(
    """of in on at with for from to by inside into onto over under near behind between around like beside across
    through along against above below off out up down before after without while and or but that which who where when
    because as is are was were be being has have had next"""
)
_CONTAINERS = _words(
    """picture photo photograph image drawing painting illustration close-up closeup view shot pair couple bunch
    group set piece slice kind type sort lot row pile stack number"""
)
_COLOURS = _words("black white red orange yellow green blue purple pink brown gray grey silver gold tan")
_GERUNDS = _words("building painting clothing railing")  # things, after a noun too: a brick building
_VERB_ENDINGS = (("ies", "y"), ("es", "e"), ("es", ""), ("s", ""), ("ing", "e"), ("ing", ""), ("ed", "e"), ("ed", ""))


class Naming:
    """Head nouns and synonymy, by one WordNet."""

    def __init__(self, wordnet: WordNet) -> None:
        self.wordnet = wordnet

    @cached_property
    def _counts(self) -> Counter[tuple[str, str]]:
        """How often a lemma was seen as noun (`1`) and as verb (`2`) in WordNet's tagged texts."""
        counts: Counter[tuple[str, str]] = Counter()
        for line in (self.wordnet.root / "cntlist.rev").read_text().splitlines():
            sense, _, count = line.split()
            lemma, _, rest = sense.partition("%")
            counts[lemma, rest[0]] += int(count)
        return counts

    def head_nouns(self, text: str) -> tuple[str, ...]:
        """The head noun's lemma, then the longer WordNet nouns that end in it: `bear`, `polar bear`.

        Only the longer where it is something else: `sea lion`. Empty where the text names nothing.
        """
        words = re.findall(
            r"[a-z]+(?:[-'][a-z]+)*|[.,;:!?]", _OPENINGS.sub("", text.lower().replace("close up", "close-up"))
        )
        while words:
            phrase, words = self._phrase(words)
            places = [place for place, word in enumerate(phrase) if self.wordnet.lemma(word)]
            if places and not (words[:1] == ["of"] and self._singular(phrase[-1]) in _CONTAINERS):
                return self._with_compounds(phrase[: places[-1] + 1])
            words = words[1:]
        return ()

    def same_thing(self, text: str, thing: str) -> bool:
        """Whether a caption's (or a class name's) head noun is the thing, a noun or a phrase, or its synonym."""
        named, meant = self.head_nouns(text), self.head_nouns(thing)
        return any(self._meanings(one) & self._meanings(other) for one in named for other in meant)

    def _phrase(self, words: list[str]) -> tuple[list[str], list[str]]:
        """The words of a noun phrase, without its determiners, and what follows it."""
        phrase: list[str] = []
        for place, word in enumerate(words):
            if word in ("and", ",") and phrase and phrase[-1] in _COLOURS:
                continue  # a black and white dog
            after = words[place + 1] if place + 1 < len(words) else ""
            if word in _ENDS or not word[0].isalpha() or (phrase and self._is_verb(phrase[-1], word, after)):
                return phrase, words[place:]
            if word not in _DETERMINERS | _NUMBERS:
                phrase.append(word)
        return phrase, []

    def _is_verb(self, before: str, word: str, after: str) -> bool:
        """Whether a word ends the noun phrase that the word before it belongs to."""
        noun = self._singular(before)
        if noun is None or word in _GERUNDS:
            return False
        if self.wordnet.senses(f"{noun} {word}") or self.wordnet.senses(f"{word} {after}"):
            return False  # a fire truck, a metal cutting board
        plural = noun != before or before == "people"
        ending = next((ending for ending in ("ing", "ed", "s") if word.endswith(ending)), "")
        if (ending == "s" and plural) or (ending == "" and not plural):
            return False
        stems = [word.removesuffix(e) + stem for e, stem in _VERB_ENDINGS if word.endswith(e)] if ending else [word]
        if ending in ("ing", "ed"):
            stems += [stem[:-1] for stem in stems if stem[-2:-1] == stem[-1:]]  # running: runn, run
        return max(self._counts[stem, "2"] for stem in stems) > self._counts[self._singular(word) or word, "1"]

    def _singular(self, word: str) -> str | None:
        """The noun's lemma, and the singular where WordNet has both: `shoes` (a predicament) is `shoe` here."""
        noun = self.wordnet.lemma(word)
        if noun and noun.endswith("s") and not noun.endswith("ss") and self.wordnet.senses(noun[:-1]):
            return noun[:-1]
        return noun

    def _with_compounds(self, phrase: list[str]) -> tuple[str, ...]:
        """The head and the compounds that end in it; the head falls where a compound is no kind of it: `sea lion`."""
        head = self._singular(phrase[-1]) or phrase[-1]
        longer = (" ".join([*phrase[start:-1], head]) for start in range(len(phrase) - 2, -1, -1))
        compounds = [name for name in longer if self.wordnet.senses(name)]
        return (head, *compounds) if all(self._is_kind(name, head) for name in compounds) else tuple(compounds)

    def _is_kind(self, name: str, head: str) -> bool:
        senses = self.wordnet.senses
        return any(self.wordnet.is_kind_of(one, other) for one in senses(name) for other in senses(head))

    def _meanings(self, noun: str) -> frozenset[object]:
        """The noun itself and its synsets: two nouns are synonyms where these meet."""
        return frozenset([noun, *self.wordnet.senses(noun)])
