"""Captions as the COCO evaluation splits them, without Java: our own rules for what its Penn Treebank tokenizer does.

The rules were written against Flickr8k's 40,445 captions, all of which they split as Java does. Known to differ: web
addresses, years such as '90s, fractions in one sign, abbreviations at the end of a caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'))
_NAMED = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_JOINED = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me", "lemme": "lem me"
}  # fmt: skip
_QUOTES = str.maketrans(
    dict.fromkeys("\u2018\u2019", "'") | dict.fromkeys("\u201c\u201d", '"') | dict.fromkeys("\u2013\u2014", "-")
)
_SHORT = "mr|mrs|ms|dr|st|jr|sr|vs|etc|no|inc|ltd|co|corp|mt|ft|prof|gen|sgt|capt|lt"  # keep their dot

_TOKEN = re.compile(
    rf"""
    (?:[a-z]\.){{2,}} | (?-i:[A-Z])\.           # u.s., and the P. of a name
    | (?:{_SHORT})\.(?=\s*[^\s.])     # mr. jones, but not at the end
    | \d+(?:[.,:/]\d+)+                         # 1,000 and 3.5
    | o'clock\b | 'n'
    | [^\W\d_]+(?=n't\b)                        # do|n't
    | n't\b
    | '(?:s|m|d|re|ve|ll)\b
    | \w+(?:[-@/.]+\w+)*                        # t-shirt, black/white
    | \.{{2,}} | -{{2,}} | [!?]{{2,}}
    | [^\w\s]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def split(text: str) -> str:
    """A caption in lower case, its tokens parted by spaces, without punctuation."""
    words = [found[0].lower() for found in _TOKEN.finditer(text.translate(_QUOTES))]
    kept = [_NAMED.get(word, word) for word in words if word not in _DROPPED and not set(word) <= {".", "-"}]
    return " ".join(_JOINED.get(word, word) for word in kept)


def tokenize(texts: Sequence[str]) -> list[str]:
    """`split` of each."""
    return [split(text) for text in texts]
