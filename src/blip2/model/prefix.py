"""What a language model reads before it writes: the visual prefix, the begin token and the prompt.

Letters: B rows, Q queries, S prefix positions, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from blip2.protocols import LanguageModel


def build(
    language: LanguageModel,
    visual: Tensor,
    prompts: Sequence[Sequence[int]],
    bos: int | None,
    layout: Literal["before_bos", "after_bos"],
) -> tuple[Tensor, Tensor]:
    """Prefix embeddings of each row.

    Args:
        visual: float[B, Q, D], the projected queries.
        prompts: B lists of ids, of any length, empty too.
        bos: the begin token, None where the model has none.
        layout: whether the queries stand before the begin token (published OPT) or after it.
    Returns:
        float[B, S, D], right-padded, in the language model's dtype, and int64[B] lengths.
    Source: BLIP-2, section 3.3.
    """
    begin = [] if bos is None else [bos]
    texts = [[*begin, *prompt] for prompt in prompts]
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts], device=visual.device)
    embeds = language.embed(ids.reshape(len(texts), longest).long())  # (B, S - Q, D)
    head = len(begin) if layout == "after_bos" else 0
    prefix = torch.cat([embeds[:, :head], visual.to(embeds.dtype), embeds[:, head:]], dim=1)  # (B, S, D)
    lengths = torch.tensor([visual.shape[1] + len(text) for text in texts], device=visual.device)
    return prefix, lengths
