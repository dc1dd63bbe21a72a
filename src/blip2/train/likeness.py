"""ITC's target by how alike texts are to the sentence encoder that the Q-Former starts from.

A contrast of pairs knows right and wrong only: the picture of a cat is as far from "a kitten" as from "a piano". The
text encoder knew better before any training, and a picture that is drawn toward texts like its own comes to lie near
names that no picture of the training had.

Letters: B texts of this rank, N texts of all ranks, T positions, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.config import QFormerConfig
from blip2.model.qformer import QFormer
from blip2.train.distributed import World
from blip2.train.objectives import MASKED
from blip2.weights.bert import start_from_bert

TEMPERATURE = 0.1  # of cosines between sentences: of 127 other captions the likest has a sixth of the share


class Likeness(nn.Module):
    """The text encoder as it was before training, frozen.

    Not of the paper. Targets of soft labels have been made by many; here the teacher is where the student began.

    Args:
        config: of the Q-Former that is trained, whose text side has the same shape.
        bert: the text encoder's tensors, as for `start_from_bert`.
        share: of the target that goes to texts of other images.
    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """

    def __init__(self, config: QFormerConfig, bert: Mapping[str, Tensor], share: float) -> None:
        super().__init__()
        self.share = share
        self.qformer = QFormer(dataclasses.replace(config, dropout=0.0))
        start_from_bert(self.qformer, bert)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, target: Tensor, ids: Tensor, same: Tensor, world: World) -> Tensor:
        """The target with its share at other texts, float32[B, N]; rows keep their sum of 1.

        Args:
            target: float32[B, N], of each of this rank's rows.
            ids: int64[B, T], right-padded.
            same: bool[B, N], texts of the same image, which are no others.
            world: the ranks that have the other texts.
        """
        own = self.sentences(ids)
        with torch.autocast(ids.device.type, enabled=False):
            cosines = own @ world.gather(own).T  # (B, N)
        others = (cosines / TEMPERATURE).masked_fill(same, MASKED).softmax(1)
        return torch.lerp(target, others, self.share)

    @torch.no_grad()
    def sentences(self, ids: Tensor) -> Tensor:
        """Unit vectors of texts, the mean over their tokens: int64[B, T], right-padded, to float32[B, D]."""
        return F.normalize(self.qformer.mean(self.qformer.read(ids).float(), ids), dim=-1)
