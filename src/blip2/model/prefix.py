"""What a language model reads before it writes: the visual prefix, the begin token and the prompt.

Letters: B rows, N images, Q queries, S prefix positions, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from blip2.errors import PromptError
from blip2.protocols import LanguageModel

SLOT = -1  # among a prompt's ids: here stands an image


def build(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[Sequence[int]],
    bos: int | None,
    layout: Literal["before_bos", "after_bos"],
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Prefix embeddings of each row.

    Args:
        visual: float[N, Q, D], the projected queries of all rows' images, in order.
        prompts: B lists of ids, of any length, empty too. `SLOT` among them is where an image stands; without any, a
            row's images stand before its text.
        bos: the begin token, None where the model has none.
        layout: whether the images that a row begins with stand before the begin token (published OPT) or after it.
        counts: images of each row, N together; one each where None.
    Returns:
        float[B, S, D], right-padded, in the language model's dtype, and int64[B] lengths.
    Raises:
        PromptError: a prompt has another number of slots than its row has images.
    Source: BLIP-2, section 3.3.
    """
    begin = [] if bos is None else [bos]
    queries = visual.shape[1]
    rows = [
        _row(prompt, count, begin, layout, queries)
        for prompt, count in zip(prompts, [1] * len(prompts) if counts is None else counts, strict=True)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=visual.device).long()  # (B, S)
    embeds = language.embed(ids.clamp(min=0))  # (B, S, D)
    prefix = embeds.masked_scatter((ids == SLOT)[..., None], visual.to(embeds.dtype))
    return prefix, torch.tensor([len(row) for row in rows], device=visual.device)


def length(prompt: Sequence[int], count: int, queries: int, bos: int | None) -> int:
    """Positions of a row: a prompt's tokens, its images' queries, the begin token."""
    return len(prompt) - prompt.count(SLOT) + count * queries + (bos is not None)


def _row(prompt: Sequence[int], count: int, begin: list[int], layout: str, queries: int) -> list[int]:
    """A row's ids with every slot as wide as an image."""
    if SLOT not in prompt:
        prompt = [*[SLOT] * count, *prompt]
    slots = prompt.count(SLOT)
    if slots != count:
        raise PromptError(
            f"the prompt has {slots} places for images and was given {count}: write <image> once for each, or never "
            "to have them before the text"
        )
    first = [*takewhile(lambda token: token == SLOT, prompt)]
    rest = prompt[len(first) :]
    order = [*first, *begin, *rest] if layout == "before_bos" else [*begin, *first, *rest]
    return [token for each in order for token in ([SLOT] * queries if each == SLOT else [each])]
