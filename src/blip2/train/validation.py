"""Held-out data, looked at while training: the losses, and retrieval by ITC where the objective learns it.

Letters: N pictures, M captions, Q queries, E image-text space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from blip2.data.sources import Sample
from blip2.evaluate.ranking import DEPTHS, belonging, ranks
from blip2.model.bridge import Bridge
from blip2.text import plain
from blip2.train.data import Batches, Images, Mixture, Texts
from blip2.train.distributed import World
from blip2.train.objectives import Batch, encode

if TYPE_CHECKING:
    from blip2.train.parts import Data

OF_QUESTIONS = "lm of questions"
_IMAGES, _TEXTS = 64, 256  # that go through the bridge together


class Validation:
    """Call it for the metrics of the weights as they are, and one score of them, higher is better.

    The score is minus the `lm` loss in stage 2, that of captions and that of questions in the shares of training; the
    mean of the recalls in stage 1.

    Args:
        objective: its losses are averaged over the held-out data, drawn in the same way each time.
        rows: of one batch, over all ranks, as in training, since contrast is harder among more.
        questions: share of the texts of stage 2 that are question and answer.
    """

    def __init__(
        self,
        bridge: Bridge,
        objective: nn.Module,
        data: Sequence[Data],
        texts: Texts,
        rows: int,
        world: World,
        device: torch.device,
        *,
        questions: float = 0.0,
    ) -> None:
        self.bridge = bridge
        self.objective = objective
        self.data = data
        self.texts = texts
        self.world = world
        self.device = device
        self.questions = questions
        self.told = self._batches([(each.samples, each.images) for each in data], rows, questions=0.0)
        asked = [part for each in data if (part := _asked(each))[0]] if questions else []
        self.asked = self._batches(asked, rows, questions=1.0) if asked else []

    def _batches(
        self, data: Sequence[tuple[Sequence[Sample], Images]], rows: int, *, questions: float
    ) -> list[Callable[[], Batch]]:
        """This rank's part of each batch, read when it is called for."""
        total, world = sum(len(samples) for samples, _ in data), self.world
        rows = max(world.size, min(rows, total - total % world.size))
        mixture = Mixture([(samples, len(samples)) for samples, _ in data], seed=0, questions=questions)
        batches = Batches(mixture, [images for _, images in data], self.texts, rows, rank=world.rank, world=world.size)
        return [partial(batches.__getitem__, number) for number in range(max(1, total // rows))]

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], float]:
        metrics = self._losses(self.told)
        recalls = self._recalls() if self.texts.qformer is not None else {}
        if "lm" not in metrics:
            return metrics | recalls, sum(recalls.values()) / len(recalls)
        loss = metrics["lm"]
        if self.asked:
            metrics[OF_QUESTIONS] = self._losses(self.asked)["lm"]
            loss = (1 - self.questions) * loss + self.questions * metrics[OF_QUESTIONS]
        return metrics | recalls, -loss

    def _losses(self, batches: Sequence[Callable[[], Batch]]) -> dict[str, float]:
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            losses = self.objective(batch().to(self.device), number)
            totals = {name: totals.get(name, 0) + self.world.mean(loss) for name, loss in losses.items()}
        return {name: float(loss) / len(batches) for name, loss in totals.items()}

    def _recalls(self) -> dict[str, float]:
        """R@k by ITC of all held-out pictures and captions, both ways."""
        assert self.texts.qformer is not None
        images = torch.cat([part for each in self.data for part in self._image_vectors(each)])  # (N, Q, E)
        samples = [sample for each in self.data for sample in each.samples]
        captions = [plain(caption) for sample in samples for caption in sample.captions]
        ids = self.texts.qformer.batch(captions, self.texts.max_length).to(self.device)
        texts = torch.cat([self.bridge.text_vectors(part).float() for part in ids.split(_TEXTS)])  # (M, E)
        with torch.autocast(self.device.type, enabled=False):  # a half precision ties what it cannot tell apart
            similar = torch.stack([(image @ texts.T).amax(0) for image in images]).cpu().numpy()  # (N, M)
        owner = np.repeat(np.arange(len(samples)), [len(sample.captions) for sample in samples])
        right = belonging(owner, len(samples))
        found = {"text to image": ranks(similar.T, right.T), "image to text": ranks(similar, right)}
        return {f"{way} R@{depth}": float((place < depth).mean()) for way, place in found.items() for depth in DEPTHS}

    def _image_vectors(self, data: Data) -> list[Tensor]:
        encoder = getattr(self.objective, "encoder", None)
        rows = range(len(data.samples))
        parts: list[Tensor] = []
        for start in range(0, len(rows), _IMAGES):
            some = rows[start : start + _IMAGES]
            images = data.images(some, [0] * len(some)).float().to(self.device)
            look = self.bridge.look(self.bridge.see(encode(encoder, images)))
            parts.append(self.bridge.image_vectors(look.hidden).float())
        return parts


def _asked(data: Data) -> tuple[list[Sample], Images]:
    """The samples that have questions, and their images."""
    rows = [row for row, sample in enumerate(data.samples) if sample.questions]
    return [data.samples[row] for row in rows], lambda some, views: data.images([rows[row] for row in some], views)
