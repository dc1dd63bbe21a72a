"""Question-answer pairs made of captions by rule: what, colour, how many, where, yes/no.

A rule fires only where captions of one picture agree and none speaks against it: few pairs, but right ones.
Every yes/no question is asked as often with the answer yes as with no, word by word, so that the question alone
tells nothing; the no comes from a picture whose captions speak of something else.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lexicon import LEXICON
from stamps import share

Kind = Literal["what", "color", "how many", "where", "yes/no"]
KINDS: tuple[Kind, ...] = ("what", "color", "how many", "where", "yes/no")


@dataclass(frozen=True)
class Question:
    """One pair.

    Attributes:
        picture: id of the picture.
    """

    picture: str
    kind: Kind
    question: str
    answer: str


_COLOURS: list[str] = LEXICON["colours"]
_PEOPLE: list[str] = LEXICON["people"]
_ANIMALS: list[str] = LEXICON["animals"]
_COLOURED: list[str] = LEXICON["coloured"]
_THINGS: dict[str, list[str]] = LEXICON["things"]
_ACTIONS: dict[str, list[str]] = LEXICON["actions"]
_PLACE_OF: dict[str, str] = {word: answer for answer, words in LEXICON["places"].items() for word in words}
_COMPANY = frozenset(LEXICON["company"])
_COMPOUNDS = frozenset(LEXICON["compounds"])
_SAME = {word: same[0] for word, same in LEXICON["same"].items()}
_PLURALS = {noun: several[0] for noun, several in LEXICON["plurals"].items()}
_ALIKE = {frozenset((colour, other)) for colour, others in LEXICON["alike"].items() for other in others}
_NUMBERS = ("one", "two", "three", "four", "five", "six")
_MOST = 250  # times that a yes/no question is asked with each answer, so that a few do not crowd out all others
_ALWAYS_PLURAL = frozenset(("shorts", "pants"))
_UNCOUNTED = frozenset(("snow", "water", "grass"))
_PLACED = re.compile(
    r"\b(?:in|on|at|through|across|along)\s+(?:(?:the|a|an|some|deep|wet|green|shallow|fresh)\s+)*"
    r"((?:\w+\s+)?\w+)"
)


def with_article(noun: str) -> str:
    """`a ball`, `an umbrella`, `soccer`."""
    return noun if noun in LEXICON["bare"] else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(name: str) -> str:
    """The plural of a noun, or of a name that ends with one: `red foxes`."""
    *before, noun = name.split(" ")
    if noun in _PLURALS:
        several = _PLURALS[noun]
    elif re.search(r"(s|x|z|ch|sh)$", noun):
        several = noun + "es"
    elif re.search(r"[^aeiou]y$", noun):
        several = noun[:-1] + "ies"
    else:
        several = noun + "s"
    return " ".join((*before, several))


class Picture:
    """One picture's captions, and what they agree on.

    Attributes:
        captions: their words, in lower case.
        mentioned: all of these.
        subject: the one person or animal that captions begin with, where none speaks of another or of several.
    """

    def __init__(self, key: str, captions: Sequence[str]) -> None:
        self.key = key
        self.captions = [re.findall(r"[a-z]+", caption.lower()) for caption in captions]
        self.mentioned = frozenset(word for caption in self.captions for word in caption)
        self.subject = self._subject()

    def _subject(self) -> str | None:
        living = (*_PEOPLE, *_ANIMALS)
        named = [[word for word in caption if word in living] for caption in self.captions]
        firsts = Counter(words[0] for words in named if words)
        if not firsts:
            return None
        best, count = firsts.most_common(1)[0]
        same = {*_PEOPLE} if best in _PEOPLE else {"puppy", "dog"} if best in ("dog", "puppy") else {best}
        others = {*living} - same | {plural(noun) for noun in living} | _COMPANY
        return best if count >= 2 and max(map(len, named)) == 1 and not self.mentioned & others else None

    def counts(self, forms: Mapping[str, Iterable[str]]) -> list[tuple[str, int]]:
        """How many captions use one of the forms of each word, the most used first."""
        found = {
            name: sum(not set(own).isdisjoint(caption) for caption in self.captions) for name, own in forms.items()
        }
        return sorted(((name, count) for name, count in found.items() if count), key=lambda item: -item[1])

    def has(self, thing: str) -> bool:
        """Whether three captions name it."""
        return sum(thing in caption and _after(caption, thing) not in _COMPOUNDS for caption in self.captions) >= 3

    def lacks(self, thing: str) -> bool:
        """Whether no caption names a thing or anything that could be it or come with it."""
        words = [thing, *_THINGS[thing]]
        return self.mentioned.isdisjoint(words) and self.mentioned.isdisjoint(map(plural, words))


def _after(caption: Sequence[str], word: str) -> str:
    """The word after another's first place, empty at the end."""
    return next(iter(caption[caption.index(word) + 1 :]), "")


def questions(captions: Mapping[str, Sequence[str]], seed: int) -> list[Question]:
    """All pairs that the rules make of some pictures' captions; the same for the same arguments."""
    pictures = [Picture(key, texts) for key, texts in captions.items()]
    rules = (_what, _colour, _how_many, _where)
    made = [question for picture in pictures for rule in rules for question in rule(picture)]
    return _capped(made, seed) + _balanced(pictures, seed)


def _capped(made: Sequence[Question], seed: int) -> list[Question]:
    """No answer of a question more than twice as often as the next: `what animal is this?` is not always a dog."""
    answers: dict[str, dict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for question in made:
        answers[question.question][question.answer].append(question)
    kept: list[Question] = []
    for groups in answers.values():
        sizes = sorted(map(len, groups.values()), reverse=True)
        most = 2 * sizes[1] if len(sizes) > 1 else 0  # a question with one answer teaches nothing about pictures
        for group in groups.values():
            kept += _drawn(group, most, seed)
    return kept


def _drawn(group: Iterable[Question], count: int, seed: int) -> list[Question]:
    return sorted(group, key=lambda question: share(seed, question.question, question.picture))[:count]


def _clear(counts: Sequence[tuple[str, int]]) -> bool:
    """Whether the first of some counted answers is told twice and alone, or three times and once disputed."""
    second = counts[1][1] if len(counts) > 1 else 0
    return bool(counts) and counts[0][1] >= 2 + second and second <= 1


def _what(picture: Picture) -> Iterator[Question]:
    animals = [name for name in _ANIMALS if picture.has(name)]
    if len(animals) == 1:
        yield Question(picture.key, "what", "what animal is this?", with_article(animals[0]))
    if picture.subject is None:
        return
    actions = picture.counts(_ACTIONS)
    if _clear(actions):
        yield Question(picture.key, "what", f"what is the {picture.subject} doing?", actions[0][0])
    for verb, known in LEXICON["objects"].items():
        found = _objects(picture, known["forms"], known["answers"])
        if len(found) == 1 and found.total() >= 2:
            answer = with_article(next(iter(found)))
            yield Question(picture.key, "what", f"what is the {picture.subject} {verb}?", answer)


def _objects(picture: Picture, forms: Sequence[str], answers: Sequence[str]) -> Counter[str]:
    """What captions name within four words of a verb, one for each caption."""
    found: Counter[str] = Counter()
    for caption in picture.captions:
        place = next((place for place, word in enumerate(caption) if word in forms), len(caption))
        phrase = caption[place + 1 : place + 5]
        thing = next((word for word in phrase if word in answers), None)
        if thing is not None and "and" not in phrase[: phrase.index(thing)]:
            found[_SAME.get(thing, thing)] += 1
    return found


def _colour(picture: Picture) -> Iterator[Question]:
    for noun in _COLOURED:
        colour = _certain_colour(picture, noun)
        if colour is not None:
            yield Question(picture.key, "color", f"what color {_be(noun)} the {noun}?", colour)


def _be(noun: str) -> str:
    return "are" if noun in _ALWAYS_PLURAL else "is"


def _certain_colour(picture: Picture, noun: str) -> str | None:
    """The colour of a noun that no caption has in another colour, twice, spotted, or on one of several."""
    found: Counter[str] = Counter()
    for caption in picture.captions:
        if caption.count(noun) == 1:
            place = caption.index(noun)
            before = [_SAME.get(word, word) for word in caption[max(0, place - 3) : place]]
            match before:
                case [str(one), "and", str(other)] if one in _COLOURS and other in _COLOURS:
                    found[" and ".join(sorted((one, other)))] += 1
                case [*_, str(one)] if one in _COLOURS:
                    found[one] += 1
                case _:
                    pass
    several = any(caption.count(noun) > 1 for caption in picture.captions) or plural(noun) in picture.mentioned
    beside = picture.mentioned & {"dogs", "puppies", "horses", "two", "three", "another", "other", "spotted", "spots"}
    enough = 1 if picture.subject is not None else 2
    return None if several or beside or len(found) != 1 or found.total() < enough else next(iter(found))


def _how_many(picture: Picture) -> Iterator[Question]:
    for noun in ("dog", "person", "man", "woman", "boy", "girl", "child", "horse", "bird"):
        number = _count(picture, noun)
        if number is not None:
            yield Question(picture.key, "how many", f"how many {plural(noun)} are there?", number)


def _count(picture: Picture, noun: str) -> str | None:
    """How many of a noun there are, where captions agree."""
    found: Counter[str] = Counter()
    for caption in picture.captions:
        for place, word in enumerate(caption):
            if word == plural(noun):
                near = reversed(caption[max(0, place - 4) : place])
                found[next((word for word in near if word in _NUMBERS), "some")] += 1
    if found:
        numbers = {number: count for number, count in found.items() if number != "some"}
        number, count = max(numbers.items(), key=lambda item: item[1], default=("one", 0))
        return number if len(numbers) == 1 and count >= 2 and number != "one" else None
    named = [caption.count(noun) for caption in picture.captions if noun in caption]
    others = {plural(other) for other in (*_PEOPLE, *_ANIMALS)} | {"people", "animals"} | _COMPANY
    if noun == "person":
        others |= {*_PEOPLE} - {noun}
    return "one" if len(named) >= 4 and max(named) == 1 and not picture.mentioned & others else None


def _where(picture: Picture) -> Iterator[Question]:
    if picture.subject is None:
        return
    found: Counter[str] = Counter()
    for caption in picture.captions:
        phrases = [match[1].split()[::-1] for match in _PLACED.finditer(" ".join(caption))]
        near = {next((word for word in phrase if word in _PLACE_OF), "") for phrase in phrases}  # `park bench`: bench
        found.update({_PLACE_OF[word] for word in near if word})
    counts = found.most_common(2)
    if _clear(counts):
        yield Question(picture.key, "where", f"where is the {picture.subject}?", counts[0][0])


def _balanced(pictures: Sequence[Picture], seed: int) -> list[Question]:
    """Yes/no questions, each asked as often with either answer."""
    asked: dict[str, tuple[list[Question], list[Question]]] = defaultdict(lambda: ([], []))
    for picture in pictures:
        for text, true in (*_presence(picture), *_actions(picture), *_colour_claims(picture)):
            asked[text][true].append(Question(picture.key, "yes/no", text, "yes" if true else "no"))
    made: list[Question] = []
    for no, yes in asked.values():
        count = min(len(no), len(yes), _MOST)
        made += _drawn(yes, count, seed) + _drawn(no, count, seed)
    return made


def _presence(picture: Picture) -> Iterator[tuple[str, bool]]:
    for thing in _THINGS:
        has = picture.has(thing)
        if has or picture.lacks(thing):
            yield f"is there {thing if thing in _UNCOUNTED else with_article(thing)} in the picture?", has


def _actions(picture: Picture) -> Iterator[tuple[str, bool]]:
    if picture.subject is None:
        return
    counts = dict(picture.counts(_ACTIONS))
    sure = {action for action, count in counts.items() if count >= 3}
    for action, unlike in LEXICON["unlike"].items():
        text = f"is the {picture.subject} {action}?"
        if action in sure:
            yield text, True
        elif sure & set(unlike) and action not in counts and picture.mentioned.isdisjoint(LEXICON["hints"][action]):
            yield text, False


def _colour_claims(picture: Picture) -> Iterator[tuple[str, bool]]:
    for noun in _COLOURED:
        colour = _certain_colour(picture, noun)
        if colour is None or " and " in colour:
            continue
        for asked in _COLOURS:
            if asked in _SAME or frozenset((asked, colour)) in _ALIKE:
                continue
            yield f"{_be(noun)} the {noun} {asked}?", asked == colour
