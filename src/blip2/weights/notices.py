"""What each part of a model is licensed under and known to get wrong: facts for `blip2 info` and for model cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """What to know before a part is used.

    Attributes:
        licence: in a few words; its text, with its author, decides.
        risks: what it is known to get wrong, and what it was never tried for.
    """

    licence: str
    risks: str


APACHE = "Apache-2.0"

NOTICES: Mapping[str, Notice] = {
    "EVA-CLIP ViT-g/14": Notice(
        "MIT",
        "Learned from hundreds of millions of pictures and texts of the web, little filtered: it sees some groups, "
        "places and things worse than others and carries stereotypes. Not for recognising or judging people.",
    ),
    "CLIP ViT-L/14": Notice(
        "MIT",
        "Its authors measured different error rates by gender, age and skin colour, and put surveillance, recognising "
        "faces and any use that was not tested for its own place out of scope. English texts only.",
    ),
    "Q-Former": Notice(
        "code BSD-3-Clause; published weights MIT; one that you trained is yours, within the terms of its data",
        "The published ones learned from 129 million web pictures: names, counts, text in pictures and relations are "
        "often wrong, and what is said sounds sure. Not tried in any real application by its authors.",
    ),
    "OPT": Notice(
        "OPT-175B licence: for research only, no commercial use",
        "Trained on unfiltered web text and forums: it readily writes insults, stereotypes and untruths, repeats "
        "itself and may give back what it read word by word. English.",
    ),
    "Flan-T5": Notice(
        APACHE,
        "Fine-tuned on texts that nobody filtered for harm: it can write offensive or false things and mirrors the "
        "bias of its data. Its authors ask that it be tested for safety and fairness before any use.",
    ),
    "Gemma 3 270M": Notice(
        "Gemma terms of use, with a list of prohibited uses; accepted by using it",
        "A small base model, not tuned to instructions: fluent, often wrong in facts, numbers and reasoning, and "
        "biased as web text is.",
    ),
    "EfficientNet-Lite2": Notice(
        f"{APACHE}; ImageNet's pictures are for research without commercial aim",
        "Knows the 1,000 classes of ImageNet: rich in dogs, poor in people, text and places, and mostly Western.",
    ),
    "MiniLM-L6, word embeddings": Notice(
        APACHE,
        "Learned from a billion sentence pairs of the web, English only: they carry the prejudices of those sentences.",
    ),
}
UNKNOWN = Notice("its own", "Not known here: read what its author says.")


def notice(name: str) -> Notice:
    """Of a part, by its name or by its family's: `OPT-2.7B` is an OPT."""
    found = next((known for known in NOTICES if name.startswith(known)), None)
    return UNKNOWN if found is None else NOTICES[found]
