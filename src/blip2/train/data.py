"""What each step reads: a pure function of seed and step, so that a run resumed anywhere goes on as if never stopped.

Letters: B rows of this rank, T text positions, P patches, D width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from blip2.config import PromptConfig
from blip2.data.sources import Prototype, Sample
from blip2.errors import DataError
from blip2.text import Tokenizer, pad, plain
from blip2.train.draws import draw_seed
from blip2.train.objectives import Batch

Images = Callable[[Sequence[int], Sequence[int]], Tensor]
"""Rows of one source and a view of each, to float[B, P, D] patches or float[B, 3, H, W] pixels."""


@dataclass(frozen=True)
class Draw:
    """One row of a batch.

    Attributes:
        source, sample: positions in the mixture.
        caption: position among the sample's captions, the one that stage 1 learns from; None where it has none.
        captions, questions: positions of what the language model learns to write (stage 2).
        view: 0 for the plain picture, from 1 on the augmented ones; of a prototype the epoch.
    """

    source: int
    sample: int
    caption: int | None
    captions: tuple[int, ...]
    questions: tuple[int, ...]
    view: int


class Mixture:
    """Several sources in fixed shares of every batch; within a source each sample comes once an epoch.

    No sample comes twice in a batch unless its source is smaller than its share. The captions of a sample follow
    each other from epoch to epoch.

    Args:
        sources: samples and weight of each; weights are shares of the batch, in any unit.
        questions: share of the texts of samples with questions that ask one; without captions all of them do.
        texts: how many of a picture the language model learns from at once, fewer where it has no more.
        views: how many views of a picture there are, drawn evenly; a prototype has another at each epoch.
    Raises:
        DataError: no source, an empty one, or a weight, share or number of views out of range.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[Sample], float]],
        seed: int,
        *,
        questions: float = 0.0,
        texts: int = 1,
        views: int = 1,
    ) -> None:
        if not sources:
            raise DataError("a mixture needs at least one source")
        for number, (samples, weight) in enumerate(sources):
            if not samples:
                raise DataError(f"source {number} of the mixture has no samples")
            if not weight > 0:
                raise DataError(f"source {number} of the mixture: its weight must be above 0, not {weight}")
        if not 0 <= questions <= 1:
            raise DataError(f"the share of questions must lie between 0 and 1, not {questions}")
        if views < 1:
            raise DataError(f"there must be at least one view, not {views}")
        self.sources = [samples for samples, _ in sources]
        self.seed = seed
        self.questions = questions
        self.texts = texts
        self.views = views
        shares = [Fraction(str(weight)) for _, weight in sources]
        self._of_rest = [share / sum(shares[number:]) for number, share in enumerate(shares)]
        self._orders: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}  # the last epoch used, and its order

    def draw(self, step: int, batch_size: int) -> list[Draw]:
        """The rows of a step, in an order that mixes the sources.

        Depends on nothing but the seed, the sources and the arguments; `batch_size` must stay the same over a run.
        """
        starts, stops = self._drawn(step * batch_size), self._drawn((step + 1) * batch_size)
        draws: list[Draw] = []
        for source, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            most = self._most(source, batch_size)
            draws += [self._one(source, position, most) for position in range(start, stop)]
        order = _permutation(len(draws), self.seed, "batch", step)
        return [draws[row] for row in order]

    def _drawn(self, rows: int) -> list[int]:
        """How many of the first `rows` rows of a run come from each source."""
        counts: list[int] = []
        for share in self._of_rest:
            counts.append(int(rows * share))  # of what the sources before left: never falls as rows grow
            rows -= counts[-1]
        return counts

    def _most(self, source: int, batch_size: int) -> int:
        """The most rows that a batch can have of a source: its share, and what rounding adds for each before it."""
        share = self._of_rest[source]
        for earlier in self._of_rest[:source]:
            share *= 1 - earlier
        return min(batch_size, int(batch_size * share) + 1 + source, len(self.sources[source]))

    def _one(self, source: int, position: int, most: int) -> Draw:
        samples = self.sources[source]
        epoch, place = divmod(position, len(samples))
        index = int(self._order(source, epoch, most)[place])
        sample = samples[index]
        key = (self.seed, source, index, epoch)
        start = draw_seed(self.seed, source, index) + epoch
        asked = self.texts
        if sample.captions:
            asked = sum(_share(*key, "asks", number) < self.questions for number in range(self.texts))
        questions = _varied(sample.questions, asked, *key)
        told = min(self.texts - len(questions), len(sample.captions))
        return Draw(
            source=source,
            sample=index,
            caption=start % len(sample.captions) if sample.captions else None,
            captions=tuple((start + number) % len(sample.captions) for number in range(told)),
            questions=questions,
            view=epoch if isinstance(sample.image, Prototype) else draw_seed(*key, "view") % self.views,
        )

    def _order(self, source: int, epoch: int, most: int) -> NDArray[np.int64]:
        """The order of an epoch: whatever stands in the last rows of the one before does not stand in the first."""
        size = len(self.sources[source])
        reached, order = self._orders.get((source, most), (epoch + 1, np.empty(0, dtype=np.int64)))
        if reached > epoch:  # each order hangs on the one before, back to the first
            reached, order = 0, _permutation(size, self.seed, "order", source, 0)
        for later in range(reached + 1, epoch + 1):
            order = _apart(order, _permutation(size, self.seed, "order", source, later), most)
        self._orders[source, most] = epoch, order
        return order


def _apart(before: NDArray[np.int64], order: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """`order`, changed as little as keeps any `window` neighbours of both orders in a row distinct."""
    recent = before[len(before) - window + 1 :].tolist()
    waiting: list[int] = order.tolist()
    head: list[int] = []
    while recent:
        blocked = set(recent)
        place = next(place for place, item in enumerate(waiting) if item not in blocked)
        head.append(waiting.pop(place))
        recent.pop(0)
    return np.array(head + waiting, dtype=np.int64)


def _varied(questions: Sequence[tuple[str, str]], count: int, *key: object) -> tuple[int, ...]:
    """Positions of `count` questions, or of all there are: each kind's first, in any order, before any kind's second.

    A kind is a question's first two words: "how many", "what color", "is there".
    """
    if not count:
        return ()
    seen: Counter[str] = Counter()
    places: list[tuple[int, int, int]] = []
    for place in _permutation(len(questions), *key, "questions").tolist():
        kind = " ".join(questions[place][0].lower().split()[:2])
        places.append((seen[kind], draw_seed(*key, kind), place))
        seen[kind] += 1
    return tuple(place for *_, place in sorted(places)[:count])


def _share(*key: object) -> float:
    return draw_seed(*key) / 2**63


def _permutation(size: int, *key: object) -> NDArray[np.int64]:
    return np.argsort(np.random.Philox(key=draw_seed(*key)).random_raw(size), kind="stable")


@dataclass(frozen=True)
class Texts:
    """How captions and questions become ids.

    Attributes:
        qformer: tokenizer of the Q-Former's text (stage 1); None where nothing reads it.
        language: tokenizer of the language model (stage 2); None in stage 1.
        questions: tokenizer of the Q-Former where it reads questions too; None elsewhere.
        prefix_lm: a caption is cut at random, its first words join the prompt: for encoder-decoders.
        max_length: most ids of a Q-Former text; and of a target.
    """

    qformer: Tokenizer | None = None
    language: Tokenizer | None = None
    questions: Tokenizer | None = None
    prompts: PromptConfig = field(default_factory=PromptConfig)
    prefix_lm: bool = False
    max_length: int = 32

    def __post_init__(self) -> None:
        if self.qformer is None and self.language is None:
            raise DataError("texts need the Q-Former's tokenizer (stage 1), the language model's (stage 2), or both")

    def pairs(self, sample: Sample, draw: Draw, key: tuple[object, ...]) -> list[tuple[str, str]]:
        """Prompt and target of each text of a row for the language model; `key` decides where captions are cut."""
        asked = [sample.questions[place] for place in draw.questions]
        told = [self._told(sample.captions[place], (*key, place)) for place in draw.captions]
        return [*told, *((self.prompts.question.format(question), answer) for question, answer in asked)]

    def asked(self, sample: Sample, draw: Draw) -> list[str]:
        """The question of each of `pairs`, empty for a caption."""
        return [*("" for _ in draw.captions), *(sample.questions[place][0] for place in draw.questions)]

    def ids_of_questions(self, questions: Sequence[str]) -> Tensor:
        """Q-Former tokens int64[R, T], a row of padding for an empty question; (0, 0) where it reads none."""
        if self.questions is None or not any(questions):
            return torch.empty(0, 0, dtype=torch.int64)
        ids = self.questions.encode([plain(question) for question in questions], self.max_length)
        return pad([row if question else [] for row, question in zip(ids, questions, strict=True)], self.questions.pad)

    def _told(self, caption: str, key: tuple[object, ...]) -> tuple[str, str]:
        prompt, words = self.prompts.caption, plain(caption).split(" ")
        if self.prefix_lm and len(words) > 1:
            cut = 1 + draw_seed(*key) % (len(words) // 2)
            prompt = f"{prompt} {' '.join(words[:cut])}".lstrip()
            words = words[cut:]
        return prompt, " ".join(words)

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> tuple[tuple[tuple[int, ...], ...], Tensor]:
        """Prompts, and targets int64[B, T] that end with the stop id, right-padded with -100 and cut to their limit."""
        assert self.language is not None
        targets = pad([row[: self.max_length] for row in self._targets(pairs)], -100)
        return tuple(tuple(prompt) for prompt in self.language.prompts([prompt for prompt, _ in pairs])), targets

    def _targets(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Whole targets, each with its stop id.

        Prompt and target are tokenized as one text, so that the seam is where the language model itself would put it.
        """
        assert self.language is not None
        prompts = self.language.encode([prompt for prompt, _ in pairs])
        whole = self.language.encode([f"{prompt} {target}" if prompt else target for prompt, target in pairs])
        alone = self.language.encode([f" {target}" if prompt else target for prompt, target in pairs])
        return [
            [*(full[len(prompt) :] if full[: len(prompt)] == prompt else target), self.language.stop_ids[0]]
            for prompt, full, target in zip(prompts, whole, alone, strict=True)
        ]

    def references(self, sample: Sample) -> tuple[tuple[int, ...], ...]:
        """A picture's captions as targets, whole and without padding."""
        pairs = [(self.prompts.caption, plain(caption)) for caption in sample.captions]
        return tuple(tuple(row) for row in self._targets(pairs))


class Batches(Dataset[Batch]):
    """`batches[step]` is this rank's rows of a step: for `DataLoader(batches, batch_size=None, sampler=range(...))`.

    Args:
        images: one for each source of the mixture, such as `FeatureCache.patches` or `Pixels`.
        batch_size: rows of all ranks together; ranks hold consecutive parts of it.
        lm_share: share of a rank's rows, the first of them, that have texts for the language model.
        reward_share: share of a rank's rows, the first of them, whose captions come along as references.
        reward_captions: fewest captions of a picture for that.
    Raises:
        DataError: the batch cannot be shared evenly, or a sample has no caption where stage 1 or a reward needs one.
    """

    def __init__(
        self,
        mixture: Mixture,
        images: Sequence[Images],
        texts: Texts,
        batch_size: int,
        *,
        lm_share: float = 1.0,
        reward_share: float = 0.0,
        reward_captions: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(images) != len(mixture.sources):
            raise DataError(f"{len(mixture.sources)} sources, but images for {len(images)}")
        if batch_size < 1 or batch_size % world:
            raise DataError(f"a batch of {batch_size} cannot be shared by {world} ranks; choose a multiple of {world}")
        if texts.qformer is not None or reward_share:
            for sample in (sample for samples in mixture.sources for sample in samples):
                if not sample.captions:
                    raise DataError(f"{sample.id!r} has no caption; stage 1 and rewards need one for every picture")
        self.mixture = mixture
        self.images = images
        self.texts = texts
        self.batch_size = batch_size
        self.lm_share = lm_share
        self.reward_share = reward_share
        self.reward_captions = reward_captions
        self.rank = rank
        self.world = world

    def __getitem__(self, step: int) -> Batch:
        own = slice(self.rank * self.batch_size // self.world, (self.rank + 1) * self.batch_size // self.world)
        everyone = self.mixture.draw(step, self.batch_size)
        samples = [self.mixture.sources[draw.source][draw.sample] for draw in everyone]
        captions = [
            "" if draw.caption is None else plain(sample.captions[draw.caption])
            for sample, draw in zip(samples, everyone, strict=True)
        ]
        image_ids = torch.tensor(_same([sample.image for sample in samples], captions)[own], dtype=torch.int64)
        images = self._pictures(everyone[own])
        ids = torch.empty(len(image_ids), 0, dtype=torch.int64)
        if self.texts.qformer is not None:
            ids = self.texts.qformer.batch(captions[own], self.texts.max_length)
        if self.texts.language is None:
            return Batch(images=images, image_ids=image_ids, ids=ids)
        written = slice(own.start, own.start + math.ceil(self.lm_share * len(image_ids)))
        pairs = [
            self.texts.pairs(samples[row], everyone[row], (self.mixture.seed, "cut", step, row))
            for row in range(written.start, written.stop)
        ]
        owners = torch.tensor([row for row, texts in enumerate(pairs) for _ in texts])
        prompts, targets = self.texts.tokenize([pair for texts in pairs for pair in texts])
        rows = zip(samples[written], everyone[written], strict=True)
        questions = self.texts.ids_of_questions([text for row in rows for text in self.texts.asked(*row)])
        rewarded = samples[own][: math.ceil(self.reward_share * len(image_ids))]
        references = tuple(
            self.texts.references(sample) if len(sample.captions) >= self.reward_captions else () for sample in rewarded
        )
        return Batch(images, image_ids, ids, owners, prompts, targets, questions, references)

    def _pictures(self, draws: Sequence[Draw]) -> Tensor:
        """Images of the rows, float32, each source asked once."""
        images: Tensor | None = None
        for source in sorted({draw.source for draw in draws}):
            rows = [row for row, draw in enumerate(draws) if draw.source == source]
            part = self.images[source]([draws[row].sample for row in rows], [draws[row].view for row in rows]).float()
            if images is None:
                images = part.new_empty(len(draws), *part.shape[1:])
            if part.shape[1:] != images.shape[1:]:
                shapes = f"{tuple(images.shape[1:])} and {tuple(part.shape[1:])}"
                raise DataError(f"sources of one batch must have images of one shape, not {shapes}")
            images[rows] = part
        assert images is not None
        return images


def _same(images: Sequence[object], captions: Sequence[str]) -> list[int]:
    """A number for each row; rows of one picture or one caption share it, for they are no negatives of each other."""
    first: dict[object, int] = {}
    numbers: list[int] = []
    for row, (picture, caption) in enumerate(zip(images, captions, strict=True)):
        keys = [picture, caption] if caption else [picture]
        known = {numbers[first[key]] for key in keys if key in first}
        numbers.append(min(known, default=row))
        numbers = [numbers[row] if number in known else number for number in numbers]
        for key in keys:
            first.setdefault(key, row)
    return numbers
