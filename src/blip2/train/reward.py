"""Self-critical training: the model writes captions itself, and those that people would agree with become likelier.

Not of the paper. Maximum likelihood spreads a caption's probability over all that people say of a picture; CIDEr asks
for what most of them say.

Letters: N pictures, S texts drawn for each, T' target positions, Q queries, Dl width of the language model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip2.adapters.narrowed import Narrowed
from blip2.config import PromptConfig
from blip2.data.sources import Sample
from blip2.generate import Limits, generate
from blip2.generate import Sample as Drawing
from blip2.generate.capture import without_graphs
from blip2.model import prefix
from blip2.protocols import LanguageModel
from blip2.text import Tokenizer, pad
from blip2.train.distributed import World
from blip2.train.draws import draw_seed
from blip2.train.sections import Reward

if TYPE_CHECKING:
    from blip2.train.data import Texts

Ids = Sequence[int]

ORDERS = 4  # of the n-grams that CIDEr-D counts
SIGMA = 6.0  # of its penalty for another length, in tokens
SCALE = 10.0
LITTLE = 0.1  # a spread of CIDEr-D within a picture that teaches little


@dataclass(frozen=True)
class _Weighted:
    """A text's n-grams by tf-idf, one mapping an order, their norms, and its length in tokens."""

    grams: list[dict[tuple[int, ...], float]]
    norms: list[float]
    length: int


class Consensus:
    """CIDEr-D of texts against what people wrote of the same picture.

    Over token ids, the one that ends a text among them, so that a text that breaks off is worth less.

    Args:
        pictures: the references of each picture of the training set, from which words are found common or rare.
    Source: Vedantam et al. 2015, section 6.
    """

    def __init__(self, pictures: Iterable[Sequence[Ids]]) -> None:
        self._pictures_with: Counter[tuple[int, ...]] = Counter()  # pictures of which an n-gram is said
        count = 0
        for references in pictures:
            count += 1
            self._pictures_with.update({gram for ids in references for order in _counted(ids) for gram in order})
        self._log_count = math.log(max(count, 1))

    def __call__(self, written: Sequence[Ids], references: Sequence[Ids]) -> list[float]:
        """The score of each text of one picture, from 0 to 10.

        Args:
            references: of that picture, at least one.
        """
        known = [self._weighted(ids) for ids in references]
        return [fmean(_alike(own, other) for other in known) for own in map(self._weighted, written)]

    def _weighted(self, ids: Ids) -> _Weighted:
        grams = [{gram: count * self._rarity(gram) for gram, count in order.items()} for order in _counted(ids)]
        norms = [math.sqrt(math.fsum(value * value for value in order.values())) for order in grams]
        return _Weighted(grams, norms, len(ids))

    def _rarity(self, gram: tuple[int, ...]) -> float:
        return self._log_count - math.log(max(1, self._pictures_with[gram]))


def _counted(ids: Ids) -> list[Counter[tuple[int, ...]]]:
    """How often each n-gram occurs, one counter an order."""
    return [Counter(zip(*(ids[start:] for start in range(order)), strict=False)) for order in range(1, ORDERS + 1)]


def _alike(own: _Weighted, other: _Weighted) -> float:
    """The clipped cosine of two texts, averaged over the orders."""
    near = math.exp(-((own.length - other.length) ** 2) / (2 * SIGMA**2))
    cosines: list[float] = []
    for mine, theirs, norms in zip(own.grams, other.grams, zip(own.norms, other.norms, strict=True), strict=True):
        shared = math.fsum(min(mine[gram], theirs[gram]) * theirs[gram] for gram in mine.keys() & theirs.keys())
        cosines.append(shared / math.prod(norms) if all(norms) else 0.0)
    return SCALE * near * fmean(cosines)


@dataclass(frozen=True)
class SelfCritical:
    """The policy gradient of `Consensus`: a text's advantage is over the mean of the others of its picture.

    A picture's advantages are divided by their spread, so that pictures of one short caption, where a draw is worth all
    or nothing, do not drown those of five long ones.

    Attributes:
        consensus: what a text is worth.
        tokenizer: of the language model.
        prompts: that of captions, and where the image stands.
        samples: S.
        max_length: most tokens of a text, the one that ends it included.
        weight: of the loss.
    Source: Rennie et al. 2017, section 3; the others' mean as baseline: Luo 2020; the spread: Shao et al. 2024,
    section 4.1.
    """

    consensus: Consensus
    tokenizer: Tokenizer
    prompts: PromptConfig
    samples: int
    max_length: int
    weight: float
    world: World

    def __call__(
        self,
        language: LanguageModel,
        visual: Tensor,
        references: Sequence[Sequence[Ids]],
        seed: int,
        vocabulary: Tensor | None = None,
    ) -> Tensor:
        """Minus the mean CIDEr-D of what the model draws, with the policy's gradient; float32 scalar.

        Args:
            visual: float[N, Q, Dl], the projected queries.
            references: N pictures' captions in the language model's tokens, each with the one that ends it; N may be 0
                where another rank has some.
            seed: of the draws, the same on every rank.
            vocabulary: int64[K], sorted: the tokens that may be written, all where None.
        """
        if not references:
            self.world.mean(visual.new_zeros(()))  # the others wait for it
            return visual.sum()  # of nothing
        bos, layout = self.tokenizer.bos, self.prompts.visual
        prompt = self.tokenizer.prompts([self.prompts.caption])[0]
        embeds, lengths = prefix.build(language, visual, [prompt] * len(references), bos, layout)
        written = self._written(language, embeds.detach(), lengths, seed, vocabulary)
        rewards = torch.tensor(
            [self.consensus(texts, known) for texts, known in zip(written, references, strict=True)],
            device=visual.device,
        )  # (N, S)
        owners = torch.arange(len(references), device=visual.device).repeat_interleave(self.samples)  # (N S,)
        targets = pad([ids for texts in written for ids in texts], -100).to(visual.device)  # (N S, T')
        common = owners, embeds.shape[1]
        log_probs = language.log_probs(embeds[owners], lengths[owners], targets, vocabulary, common)
        tokens = self.world.mean((targets != -100).sum().float())
        gained = (self.advantages(rewards).flatten() * log_probs.sum(1)).sum() / tokens
        return -self.weight * (rewards.mean() + gained - gained.detach())  # the value is CIDEr-D's alone

    def advantages(self, rewards: Tensor) -> Tensor:
        """How much better each text is than the others of its picture, in their spread: float[N, S] to float[N, S]."""
        over = (rewards - rewards.mean(1, keepdim=True)) * self.samples / (self.samples - 1)
        return over / (rewards.std(1, keepdim=True) + LITTLE)

    def _written(
        self, language: LanguageModel, embeds: Tensor, lengths: Tensor, seed: int, vocabulary: Tensor | None
    ) -> list[list[list[int]]]:
        """S texts of each picture as targets: with the token that ended them, unless they are too long."""
        writer = language if vocabulary is None else Narrowed(language, vocabulary)
        first = self.world.rank * len(lengths)
        seeds = [draw_seed(seed, first + row) for row in range(len(lengths))]
        limits = Limits(max_new_tokens=self.max_length, captions=self.samples)
        with without_graphs():
            found = generate(writer, embeds, lengths, Drawing(), limits, self.tokenizer.stop_ids, seeds)
        return [[[*text.ids, *([] if text.end is None else [text.end])] for text in texts] for texts in found]


def self_critical(reward: Reward, texts: Texts, samples: Sequence[Sample], world: World) -> SelfCritical:
    """As the recipe's section says, over the captions that are trained on."""
    assert texts.language is not None  # stage 2 has it
    return SelfCritical(
        Consensus(texts.references(sample) for sample in samples),
        texts.language,
        texts.prompts,
        reward.samples,
        texts.max_length,
        reward.weight,
        world,
    )
