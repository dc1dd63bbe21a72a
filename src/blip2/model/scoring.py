"""Teacher forcing without padding: what a decoder's `log_probs` needs beside the model itself.

Letters: B rows, S prefix positions, T target positions, L both, D width, N chosen positions, K tokens scored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.errors import ConfigError, PromptError

PADDING = -100  # in targets
GROUP = 16  # rows of like length that a CPU reads together
SCORES_AT_ONCE = 2**26  # numbers of logits that are held at a time: 256 MB in float32


def check_prefix(lengths: Tensor) -> None:
    """Raises PromptError where a row of a prefix is empty."""
    if (lengths < 1).any():
        raise PromptError("a prefix is empty: give the language model an image or at least one token to start from")


def packed(prefix: Tensor, lengths: Tensor, words: Tensor) -> Tensor:
    """Each row's prefix, float[B, S, D] right-padded, and its words, float[B, T, D], without a gap: float[B, L, D].

    What stands on the right of a row is of no meaning; attention that looks back only never sees it.
    """
    size = prefix.shape[1]
    both = torch.cat([prefix, words], dim=1)
    at = torch.arange(both.shape[1], device=prefix.device)
    source = torch.where(at < lengths[:, None], at, at + (size - lengths)[:, None])
    return pick(both, source.clamp(max=both.shape[1] - 1))


def pick(sequence: Tensor, index: Tensor) -> Tensor:
    """float[B, S, D] at int64[B, N] to float[B, N, D]."""
    return sequence.gather(1, index[..., None].expand(-1, -1, sequence.shape[-1]))


def by_length(lengths: Tensor, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`run(rows, length)`, float[N, length, D], on rows of like length together: on a CPU padding costs as any word.

    Args:
        lengths: int64[B].
    Returns:
        float[B, longest, D] in the rows' own order, zeros past their ends.
    """
    longest = int(lengths.max())
    if lengths.device.type != "cpu":
        return run(torch.arange(len(lengths), device=lengths.device), longest)
    order = lengths.argsort(descending=True, stable=True)
    groups = [run(rows, int(lengths[rows[0]])) for rows in order.split(GROUP)]
    padded = [F.pad(group, (0, 0, 0, longest - group.shape[1])) for group in groups]
    return torch.cat(padded)[order.argsort()]


def first_of_each(owners: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each owner, and which of those every row belongs to; `owners`, int64[B], does not fall."""
    change = torch.ones_like(owners, dtype=torch.bool)
    change[1:] = owners[1:] != owners[:-1]
    return change.nonzero()[:, 0], change.cumsum(0) - 1


def chosen_log_probs(
    hidden: Tensor, targets: Tensor, vocabulary: Tensor | None, vocab_size: int, logits: Callable[[Tensor], Tensor]
) -> Tensor:
    """Log-probabilities of the targets; the head runs where there is one, over the vocabulary only.

    Args:
        hidden: float[B, T, D], what each target is predicted from.
        targets: int64[B, T], right-padded with -100.
        vocabulary: int64[K], sorted, every target among them; all tokens where None.
        logits: float[N, D] to float[N, K].
    Returns:
        float32[B, T], 0 where the target is padding.
    Raises:
        ConfigError: a target is not in the vocabulary.
    """
    real = targets != PADDING
    states, wanted = hidden[real], targets[real]
    if vocabulary is not None:
        wanted = positions_in(vocabulary, wanted)
    at_once = max(1, SCORES_AT_ONCE // (vocab_size if vocabulary is None else len(vocabulary)))
    found = [
        -F.cross_entropy(logits(some), ids, reduction="none")
        for some, ids in zip(states.split(at_once), wanted.split(at_once), strict=True)
    ]
    flat = torch.cat(found)
    return flat.new_zeros(targets.shape).masked_scatter(real, flat)


def positions_in(vocabulary: Tensor, ids: Tensor) -> Tensor:
    """Where some ids, int64[N], stand in a sorted vocabulary, int64[K].

    Raises:
        ConfigError: one is not in it.
    """
    found = torch.searchsorted(vocabulary, ids).clamp(max=len(vocabulary) - 1)
    missing = ids[vocabulary[found] != ids]
    if len(missing):
        raise ConfigError(f"target {missing[0].item()} is not in the vocabulary of {len(vocabulary)} tokens")
    return found


class HeadRows:
    """Weight rows and biases of a head for some tokens; the last ones asked for are kept, since a text asks again."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
        self._product: tuple[Tensor | None, Tensor, tuple[object, ...], Callable[[Tensor], Tensor]] | None = None

    def __call__(self, vocabulary: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """float[K, D], and float[K] or None."""
        kept = self._kept
        if kept is None or kept[0] is not vocabulary or kept[1] is not weight or kept[2].dtype != weight.dtype:
            with torch.inference_mode(False):  # what is kept may be asked for with gradients later
                some = None if bias is None else bias.index_select(0, vocabulary)
                kept = vocabulary, weight, weight.index_select(0, vocabulary), some
            self._kept = kept
        return kept[2:]

    def product(
        self, vocabulary: Tensor | None, weight: Tensor, make: Callable[[Tensor], Callable[[Tensor], Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        """What `make` gives of the weights of some tokens, or of all."""
        kept, kind = self._product, (weight.dtype, weight.device, make)  # a parameter that is moved is the same one
        if kept is None or kept[0] is not vocabulary or kept[1] is not weight or kept[2] != kind:
            with torch.inference_mode(False):
                some = weight.detach() if vocabulary is None else weight.detach().index_select(0, vocabulary)
                kept = vocabulary, weight, kind, make(some)
            self._product = kept
        return kept[3]
