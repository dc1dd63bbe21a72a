"""From scores to a token: pure functions on tensors.

Letters: N sequences, V vocabulary, L tokens generated so far. Scores are logits (greedy, sampling) or log-probabilities
(beams), and -inf where a token must not come.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from blip2.generate.methods import Limits, Sample

FORBIDDEN = float("-inf")
FIRST_LOOK = 512  # how many of the most probable tokens top_p looks at before it looks at more


def apply_limits(
    scores: Tensor, history: Tensor, limits: Limits, stop_ids: tuple[int, ...], said: Tensor | None = None
) -> Tensor:
    """The rules of `limits`, in the order of transformers' `generate`.

    Args:
        scores: float[N, V].
        history: int64[N, L], of what was written.
        said: int64[N, H], what counts as said before it: it may not be repeated either.
    Returns:
        float[N, V]; the arguments stay as they are.
    """
    all_said = history if said is None else torch.cat([said, history], 1)
    scores = penalise_repetition(scores, all_said, limits.repetition_penalty)
    scores = forbid_repeated_ngrams(scores, all_said, limits.no_repeat_ngram)
    if history.shape[1] < limits.min_new_tokens:
        scores = scores.index_fill(1, torch.tensor(stop_ids, dtype=torch.long, device=scores.device), FORBIDDEN)
    return scores


def penalise_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Positive scores of tokens in `history`, int64[N, L], divided by the penalty, negative ones multiplied.

    Source: Keskar et al. 2019 (CTRL), section 4.1.
    """
    if penalty == 1.0:
        return scores
    seen = scores.gather(1, history)
    return scores.scatter(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid_repeated_ngrams(scores: Tensor, history: Tensor, size: int) -> Tensor:
    """No token that would complete `size` tokens in a row that `history`, int64[N, L], already has."""
    length = history.shape[1]
    if size == 0 or length < size:
        return scores
    ngrams = history.unfold(1, size, 1)  # (N, L - size + 1, size)
    tail = history[:, length - size + 1 :]  # what the next token would complete
    row, place = (ngrams[..., :-1] == tail[:, None]).all(-1).nonzero(as_tuple=True)
    return scores.index_put((row, ngrams[row, place, -1]), scores.new_tensor(FORBIDDEN))


def narrow(scores: Tensor, method: Sample, keep: int = 1) -> Tensor:
    """Temperature, then top-k, then top-p; at least `keep` tokens stay."""
    return top_p(top_k(scores / method.temperature, method.top_k, keep), method.top_p, keep)


def top_k(scores: Tensor, k: int, keep: int = 1) -> Tensor:
    """The k highest scores of each row, at least `keep`; all where k is 0."""
    if k == 0:
        return scores
    lowest = scores.topk(min(max(k, keep), scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < lowest, FORBIDDEN)


def top_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """The smallest set of highest scores whose probabilities reach p, at least `keep`.

    Source: Holtzman et al. 2020, section 3.1.
    """
    if p == 1.0:
        return scores
    probabilities = scores.softmax(-1)
    size = scores.shape[-1]
    count = min(FIRST_LOOK, size)
    while True:  # most nuclei are small: sorting 262,144 scores would cost more than the rest of a step
        ordered, order = probabilities.topk(count)
        reached = ordered.cumsum(-1)
        if count == size or bool((reached[..., -1] >= p).all()):
            break
        count = min(8 * count, size)
    kept = reached - ordered < p  # while the tokens above do not reach it
    kept[..., :keep] = True
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, kept)
    return scores.masked_fill(~mask, FORBIDDEN)


def draw(probabilities: Tensor, uniforms: Sequence[float]) -> Tensor:
    """One token a row by inversion of the distribution: float[N, V] and N numbers in [0, 1) to int64[N].

    The noise is an argument, so that a row's token depends on nothing but its own distribution and seed.
    """
    exact = _exact(probabilities.device)
    cumulative = probabilities.to(exact).cumsum(-1)
    points = torch.tensor(uniforms, dtype=exact, device=cumulative.device)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, points, right=True)[:, 0]
    return found.clamp(max=probabilities.shape[-1] - 1)


def draw_without_replacement(scores: Tensor, count: int, noise: Sequence[random.Random]) -> tuple[Tensor, Tensor]:
    """Some candidates a row from softmax(scores), in the order drawn.

    Args:
        scores: float[N, V].
        noise: one generator a row.
    Returns:
        scores float[N, count], -inf where nothing was left to draw, and indices int64[N, count].
    """
    left = scores.softmax(-1)
    values: list[Tensor] = []
    indices: list[Tensor] = []
    for _ in range(count):
        index = draw(left, [generator.random() for generator in noise])[:, None]
        value = scores.gather(1, index).masked_fill(left.gather(1, index) == 0, FORBIDDEN)
        left = left.scatter(1, index, 0.0)
        values.append(value)
        indices.append(index)
    return torch.cat(values, 1), torch.cat(indices, 1)


def to_host(*tensors: Tensor) -> list[list[float]]:
    """The values of some tensors on one device, flat, in one transfer; a token is exact as a number of any type."""
    flat = torch.cat([each.flatten().to(_exact(each.device)) for each in tensors]).tolist()
    values = iter(flat)
    return [list(islice(values, each.numel())) for each in tensors]


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def noise(seed: int, caption: int = 0) -> random.Random:
    """The random numbers of one caption: the same on every machine and with every version of torch."""
    return random.Random(f"{seed}:{caption}")
