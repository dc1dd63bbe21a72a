"""Seeing why: where the queries look in a picture, and what in it spoke for a match, for a word, for a written text."""

from blip2.explain.maps import Explanation, Word, answer, caption, match, queries
from blip2.explain.panel import draw

__all__ = ["Explanation", "Word", "answer", "caption", "draw", "match", "queries"]
