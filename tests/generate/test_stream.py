from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from blip2.generate import pieces


def _decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text())
def test_pieces_of_single_bytes_add_up_to_the_text_and_each_is_whole(text: str) -> None:
    found = list(pieces(text.encode(), _decode_bytes))
    assert "".join(found) == text
    assert len(found) == len(text.replace("\ufffd", "")) or "\ufffd" in text


@given(st.lists(st.text(min_size=1), max_size=8))
def test_each_token_speaks_at_once_where_it_is_text(words: list[str]) -> None:
    words = [word for word in words if not word.endswith("\ufffd")]
    assert list(pieces(range(len(words)), lambda ids: "".join(words[i] for i in ids))) == words


def test_tokens_that_end_inside_a_character_end_in_a_replacement_character() -> None:
    assert list(pieces("né".encode()[:-1], _decode_bytes)) == ["n", "\ufffd"]


def _fallback(text: str) -> str:
    """As sentencepiece decodes: one character that is not whole (+) spoils the bytes right before it too."""
    return {"aé+": "a\ufffd\ufffd\ufffd", "aé+x": "a\ufffd\ufffd\ufffdx"}.get(text, text)


def test_what_was_said_stays_where_a_decoder_takes_it_back_for_a_while() -> None:
    assert list(pieces(range(4), lambda ids: _fallback(["a", "aé", "aé+", "aéü"][ids[-1]]))) == ["a", "é", "ü"]


def test_a_broken_character_does_not_swallow_what_follows() -> None:
    found = list(pieces(range(4), lambda ids: _fallback(["a", "aé", "aé+", "aé+x"][ids[-1]])))
    assert found == ["a", "é", "\ufffd\ufffdx"]


def test_a_token_without_text_says_nothing() -> None:
    assert list(pieces([0, 1, 2], lambda ids: "x" * (ids[-1] // 2))) == ["x"]
    assert list(pieces([], _decode_bytes)) == []
