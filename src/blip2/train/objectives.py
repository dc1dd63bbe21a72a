"""What is minimised: stage 1 (ITC + ITM + ITG) and stage 2 (language modelling through the frozen model).

An objective is a module around the bridge: a batch in, named losses out; their sum is minimised.

Letters: B rows of this rank, R texts about them, N rows of all ranks, P patches, Q queries, T text positions,
E image-text space, K words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.model import prefix
from blip2.model.bridge import Bridge
from blip2.model.qformer import Look, Sight
from blip2.packed import learns
from blip2.protocols import ImageEncoder, LanguageModel
from blip2.train.distributed import World
from blip2.train.reward import SelfCritical

if TYPE_CHECKING:
    from blip2.train.likeness import Likeness

LOSSES = ("itc", "itm", "itg", "diversity")  # of stage 1
NEARLY_ONE = 1e-3  # keeps the diversity of equal queries finite
SILENCE = 0.25  # of a query's length: one that differs less than that between images says little
MASKED = -1e4  # a similarity that softmax never draws, finite so that a row of nothing else stays a distribution


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one step.

    Attributes:
        images: float[B, P, Dv] patches of the frozen encoder, or float[B, 3, H, W] pixels for it.
        image_ids: int64[B]; equal where the image is the same, so that it is no negative of itself.
        ids: int64[B, T] Q-Former tokens, [CLS] .. [SEP], right-padded; (B, 0) where only stage 2 reads the batch.
        owners: int64[R], the row that each text of the language model is about, in order; empty in stage 1.
        questions: int64[R, T''], Q-Former tokens of the question that each of them answers, a row of padding for a
            caption; (0, 0) where the Q-Former reads no questions.
        prompts: R tuples of language-model ids that stand after the queries; empty in stage 1.
        targets: int64[R, T'] language-model ids to predict, right-padded with -100; (0, 0) in stage 1.
        references: of the first rows, each of its captions in the language model's ids, none where what the model
            writes of a picture is not judged; empty without a reward.
    """

    images: Tensor
    image_ids: Tensor
    ids: Tensor
    owners: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    prompts: tuple[tuple[int, ...], ...] = ()
    targets: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    questions: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    references: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same on a device; prompts and references stay tuples."""
        move = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("images", "image_ids", "ids", "owners", "targets", "questions")
        }
        return Batch(prompts=self.prompts, references=self.references, **move)


class Stage1(nn.Module):
    """Representation learning: image-text contrast, matching and image-grounded text generation.

    Args:
        bridge: what is trained.
        encoder: the image encoder, where batches hold pixels; None where they hold its patches.
        weights: of the losses, by name; one of weight 0 is not computed.
        smoothing: label smoothing of ITC and ITG.
        likeness: in training a share of ITC's target goes to texts like an image's own, and not evenly to all; None as
            published.
        gather_gradient: ITC's gradient crosses ranks, which equals one process with the whole batch; False is what
            the public code does (`reference`).
        vocabulary: int64[K], sorted: ITG's softmax runs over these tokens, all where None.
        itm_share, itg_share: share of a rank's rows that ITM and ITG learn from, the first of them; 1 as published.
            ITM reads three pairs a row, two thirds of the cost of a step; ITC is the one that wants large batches.
        itm_hardness: power of the softmax by which ITM draws wrong partners: 1 as published, 0 draws them evenly.
            Partners as similar as the right one teach nothing before the model can tell dissimilar ones apart.
        patch_dropout: share of each image's patches that a step of training does not see.
    Source: BLIP-2, section 3.2.
    """

    vocabulary: Tensor | None

    def __init__(
        self,
        bridge: Bridge,
        encoder: ImageEncoder | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        smoothing: float = 0.1,
        likeness: Likeness | None = None,
        gather_gradient: bool = True,
        vocabulary: Tensor | None = None,
        itm_share: float = 1.0,
        itg_share: float = 1.0,
        itm_hardness: float = 1.0,
        patch_dropout: float = 0.0,
        world: World | None = None,
    ) -> None:
        super().__init__()
        self.bridge = bridge
        self.encoder = encoder
        self.itm_share = itm_share
        self.itg_share = itg_share
        self.itm_hardness = itm_hardness
        self.patch_dropout = patch_dropout
        self.weights = dict(weights or {"itc": 1.0, "itm": 1.0, "itg": 1.0})
        self.smoothing = smoothing
        self.likeness = likeness
        self.gather_gradient = gather_gradient
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        self.world = world or World()

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Losses by name, each a float32 scalar: the mean over this rank's rows, times its weight.

        Args:
            seed: of the negatives that ITM draws, the same on every rank.
        """
        patches = encode(self.encoder, batch.images)
        if self.bridge.training:
            patches = thinned(patches, self.patch_dropout)
        sight = self.bridge.see(patches)
        return self.losses(self.bridge.look(sight), sight, patches, batch, seed)

    def losses(self, look: Look, sight: Sight, patches: Tensor, batch: Batch, seed: int) -> dict[str, Tensor]:
        """The same from what the queries already saw, for objectives that share it."""
        itc, itm, itg, diversity = (self.weights.get(name, 0.0) for name in LOSSES)
        losses: dict[str, Tensor] = {}
        if itc or itm:
            by_image, by_text = self._similarities(look, batch.ids)
            image_ids = self.world.gather(batch.image_ids)  # (N,)
            if itc:
                losses["itc"] = itc * self._itc(by_image, by_text, image_ids, batch.ids)
            if itm:
                wrong_texts = self._draw_negatives(by_image, image_ids, seed)
                wrong_images = self._draw_negatives(by_text, image_ids, seed + 1)
                losses["itm"] = itm * self._itm(wrong_texts, wrong_images, sight, patches, batch.ids)
        if itg:
            losses["itg"] = itg * self._itg(look, batch.ids)
        if diversity:
            losses["diversity"] = diversity * self._diversity(look)
        return losses

    def _similarities(self, look: Look, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Own images with all texts and own texts with all images, float32[B, N] each, over the temperature."""
        assert self.bridge.heads is not None
        temperature = self.bridge.heads.temperature.float()
        image_vectors = self.bridge.image_vectors(look.hidden).float()  # (B, Q, E)
        text_vectors = self.bridge.text_vectors(ids).float()  # (B, E)
        all_images = self.world.gather(image_vectors, gradient=self.gather_gradient)  # (N, Q, E)
        all_texts = self.world.gather(text_vectors, gradient=self.gather_gradient)  # (N, E)
        with torch.autocast(ids.device.type, enabled=False):  # float32, whatever the rest is computed in
            by_image = torch.einsum("bqe,ne->bnq", image_vectors, all_texts).amax(-1)  # (B, N)
            by_text = torch.einsum("be,nqe->bnq", text_vectors, all_images).amax(-1)  # (B, N)
        return by_image / temperature, by_text / temperature

    def _itc(self, by_image: Tensor, by_text: Tensor, image_ids: Tensor, ids: Tensor) -> Tensor:
        """Cross-entropy both ways; the texts of one image share the target's mass."""
        own = self.world.own(image_ids, len(by_image))
        same = own[:, None] == image_ids[None, :]  # (B, N)
        target = same / same.sum(1, keepdim=True)
        if self.likeness is not None and self.bridge.training:
            target = self.likeness(target, ids, same, self.world)
        else:
            target = (1 - self.smoothing) * target + self.smoothing / len(image_ids)
        return (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)) / 2

    def _itm(self, wrong_texts: Tensor, wrong_images: Tensor, sight: Sight, patches: Tensor, ids: Tensor) -> Tensor:
        """Pairs that match, each image with a hard wrong text, each text with a hard wrong image."""
        all_ids = self._gather_ids(ids)
        rows = math.ceil(self.itm_share * len(ids))
        own, own_ids = torch.arange(rows, device=ids.device), self.world.own(all_ids, len(ids))[:rows]
        wrong_texts, wrong_images = wrong_texts[:rows], wrong_images[:rows]
        if self.world.size > 1:  # other ranks' images are seen anew
            sight = sight.rows(own).extended(self.bridge.see(self.world.gather(patches)[wrong_images]))
            wrong_images = own + rows
        logits = self.bridge.match(
            sight,
            torch.cat([own, wrong_images, own]),
            torch.cat([own_ids, own_ids, all_ids[wrong_texts]]),
        )  # (3 B, 2)
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        labels[:rows] = 1
        return F.cross_entropy(logits.float(), labels)

    def _draw_negatives(self, similarity: Tensor, image_ids: Tensor, seed: int) -> Tensor:
        """One wrong partner a row, int64[B] among all ranks' rows, by the softmax of the similarity (times hardness).

        The noise is drawn for all rows and then cut, so that ranks together draw what one process would.
        """
        own = self.world.own(image_ids, len(similarity))
        scores = (self.itm_hardness * similarity.detach()).masked_fill(own[:, None] == image_ids[None, :], MASKED)
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(image_ids), len(image_ids), generator=generator).clamp_min(1e-20)
        gumbel = -torch.log(-torch.log(uniform))  # argmax(score + gumbel) is a draw from softmax(score)
        return (scores + self.world.own(gumbel, len(similarity)).to(scores.device)).argmax(1)

    def _gather_ids(self, ids: Tensor) -> Tensor:
        """Texts of all ranks, padded to the longest of them."""
        if self.world.size == 1:
            return ids
        width = self.world.gather(torch.tensor([ids.shape[1]], device=ids.device)).max()
        return self.world.gather(F.pad(ids, (0, int(width) - ids.shape[1]), value=self.bridge.config.qformer.pad_id))

    def _itg(self, look: Look, ids: Tensor) -> Tensor:
        """Each token from the queries and the tokens before it; padding carries no loss."""
        rows = math.ceil(self.itg_share * len(ids))
        states: list[Tensor] = []
        wanted: list[Tensor] = []
        for some, texts in self.bridge.groups(ids[:rows]):
            real = self.bridge.qformer.real(texts)[:, 1:]  # (B', T' - 1)
            states.append(self.bridge.write(look.rows(some), texts)[:, :-1][real])
            wanted.append(texts[:, 1:][real])
        hidden, targets = torch.cat(states), torch.cat(wanted)  # (M, D), (M,)
        if self.vocabulary is not None:
            targets = torch.searchsorted(self.vocabulary, targets)
        logits = self.bridge.word_logits(hidden, self.vocabulary)
        total = F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing, reduction="sum")
        count = torch.tensor(float(len(targets)), device=total.device)
        return total / self.world.mean(count)  # a token weighs the same on every rank

    def _diversity(self, look: Look) -> Tensor:
        """How alike the queries are in what they say about an image: the mean of -log(1 - cosine^2) of any two.

        Not of the paper. ITC rewards the best query alone, so nothing there keeps all of them from becoming it; a
        language model then reads one vector Q times. What every image has in common does not count. The logarithm
        pulls hardest where queries are almost one, which is where a squared cosine pulls least. Saying the same of
        every image is no way out: silence is a direction that all queries share.
        """
        hidden = look.hidden.float()
        silence = SILENCE * hidden.detach().norm(dim=-1, keepdim=True)  # (B, Q, 1)
        said = hidden - self.world.mean(hidden.mean(0))  # (B, Q, D)
        said = F.normalize(torch.cat([said, silence], dim=-1), dim=-1)
        one, other = torch.triu_indices(hidden.shape[1], hidden.shape[1], offset=1, device=hidden.device)
        cosines = (said[:, one] * said[:, other]).sum(-1)  # (B, Q (Q - 1) / 2)
        return -torch.log1p(NEARLY_ONE - cosines.square()).sum() / max(1, cosines.numel())


class Stage2(nn.Module):
    """Generative learning: the frozen language model writes the text after the projected queries.

    For an encoder-decoder a batch's prompt is the caption's first words and its target the rest (prefix LM).

    Args:
        keep: stage-1 losses that go on beside it, so that the one bridge still matches and embeds; None as published.
        reward: the captions that the model itself writes while it trains, judged; None as published.
        vocabulary: int64[K], sorted: the softmax runs over these tokens, all where None.
        patch_dropout: share of each image's patches that a step of training does not see.
    Source: BLIP-2, section 3.3.
    """

    vocabulary: Tensor | None

    def __init__(
        self,
        bridge: Bridge,
        language: LanguageModel,
        encoder: ImageEncoder | None = None,
        *,
        bos: int | None,
        world: World | None = None,
        keep: Stage1 | None = None,
        reward: SelfCritical | None = None,
        vocabulary: Tensor | None = None,
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.bridge = bridge
        self.language = language
        self.patch_dropout = patch_dropout
        self.encoder = encoder
        self.bos = bos
        self.world = world or World()
        self.keep = keep
        self.reward = reward
        self.register_buffer("vocabulary", vocabulary, persistent=False)

    def forward(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Losses: `lm`, the mean over this rank's target tokens; `reward`, in training; what is kept of stage 1."""
        patches = encode(self.encoder, batch.images)
        if self.bridge.training:
            patches = thinned(patches, self.patch_dropout)
        sight = self.bridge.see(patches)
        look = self.bridge.look(sight)
        asked = self._asked(batch)
        visual = self._visual(look, sight, batch, asked)  # (R, Q, Dl)
        layout = self.bridge.config.prompts.visual
        embeds, lengths = prefix.build(self.language, visual, batch.prompts, self.bos, layout)
        before = alike(batch.owners, asked), visual.shape[1] + (self.bos is not None)  # the prompts
        log_probs = self.language.log_probs(embeds, lengths, batch.targets, self.vocabulary, before)  # (R, T')
        losses = {"lm": -log_probs.sum() / self.world.mean((batch.targets != -100).sum().float())}
        if self.reward is not None and self.bridge.training:
            judged = [row for row, references in enumerate(batch.references) if references]
            known = [batch.references[row] for row in judged]
            seen = self.bridge.project(look.hidden[judged])
            losses["reward"] = self.reward(self.language, seen, known, seed, self.vocabulary)
        if self.keep is not None:
            losses |= self.keep.losses(look, sight, patches, batch, seed)
        return losses

    def _visual(self, look: Look, sight: Sight, batch: Batch, asked: Tensor | None) -> Tensor:
        """What the language model reads before each text: of queries beside the question where they heed one."""
        if asked is None:
            return self.bridge.project(look.hidden)[batch.owners]
        rows = asked.nonzero()[:, 0]
        heeding = self.bridge.project(self.bridge.heed(sight, batch.owners[rows], batch.questions[rows]))
        if len(rows) == len(batch.owners):
            return heeding
        return self.bridge.project(look.hidden)[batch.owners].index_copy(0, rows, heeding)

    def _asked(self, batch: Batch) -> Tensor | None:
        """bool[R]: texts that answer a question which the Q-Former reads; None where it reads none."""
        return self.bridge.qformer.real(batch.questions).any(1) if batch.questions.numel() else None


def alike(owners: Tensor, asked: Tensor | None) -> Tensor:
    """int64[R], not falling: equal where rows have the same queries before them, as captions of one picture do.

    Args:
        owners: int64[R], the picture of each row.
        asked: bool[R], rows whose queries heed a question of their own; None where none does.
    """
    if asked is None:
        return owners
    other = owners[1:] != owners[:-1]
    return F.pad((other | asked[1:] | asked[:-1]).cumsum(0), (1, 0))


def encode(encoder: ImageEncoder | None, images: Tensor) -> Tensor:
    """Patches float[B, P, D] of a batch's images, which are patches already or pixels float[B, 3, H, W]."""
    if images.ndim == 3:
        return images
    assert encoder is not None, "a batch of pixels needs the encoder"
    trains = torch.is_grad_enabled() and isinstance(encoder, nn.Module) and learns(encoder)
    with torch.set_grad_enabled(trains):
        return encoder(images)


def thinned(patches: Tensor, share: float) -> Tensor:
    """Each image without a share of its patches, others for each: float[B, P, D] to float[B, P', D]."""
    rows, count, width = patches.shape
    kept = count - int(share * count)
    if kept == count:
        return patches
    chosen = torch.rand(rows, count, device=patches.device).argsort(1)[:, :kept]  # (B, P')
    return patches.gather(1, chosen[..., None].expand(-1, -1, width))
