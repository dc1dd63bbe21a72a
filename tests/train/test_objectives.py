"""The losses against their equations, written out plainly."""

import pytest
import torch
import torch.nn.functional as F

from blip2.config import Blip2Config, PartConfig, QFormerConfig, VisionConfig
from blip2.model.bridge import Bridge
from blip2.model.qformer import Look
from blip2.train.objectives import Batch, Stage1, Stage2, alike, thinned

QFORMER = QFormerConfig(
    width=16, layers=2, heads=2, mlp_width=32, queries=4, encoder_width=12, vocab_size=40, positions=16, decoder_id=39,
    cls_id=1, sep_id=2, dropout=0.0,
)  # fmt: skip
CONFIG = Blip2Config(vision=VisionConfig(width=12), qformer=QFORMER, embedding_width=8)


@pytest.fixture
def bridge() -> Bridge:
    torch.manual_seed(0)
    return Bridge(CONFIG)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 39, (5, 7), generator=generator)
    ids[:, 0] = 1
    for row, length in enumerate((7, 4, 6, 3, 5)):
        ids[row, length - 1] = 2
        ids[row, length:] = 0
    return Batch(torch.randn(5, 6, 12, generator=generator), torch.tensor([10, 11, 12, 13, 14]), ids)


def test_itc_is_cross_entropy_over_the_best_query_both_ways(bridge: Bridge, batch: Batch):
    loss = Stage1(bridge, weights={"itc": 1.0})(batch, seed=0)["itc"]

    images, texts = bridge.image_vectors(bridge.look(bridge.see(batch.images)).hidden), bridge.text_vectors(batch.ids)
    scores = torch.stack([(image @ texts.T).max(0).values for image in images]) / 0.07
    target = torch.arange(5)
    expected = sum(F.cross_entropy(s, target, label_smoothing=0.1) for s in (scores, scores.T)) / 2
    torch.testing.assert_close(loss, expected)


def test_texts_of_one_image_share_the_target_and_are_no_negatives(bridge: Bridge, batch: Batch):
    ids = torch.tensor([10, 10, 12, 13, 14])
    objective = Stage1(bridge)
    for seed in range(50):
        drawn = objective._draw_negatives(torch.zeros(5, 5), ids, seed)
        assert not (ids[drawn] == ids).any()
    shared = Batch(batch.images, ids, batch.ids)
    assert objective(shared, 0)["itc"] != objective(batch, 0)["itc"]


def test_negatives_follow_the_softmax_of_the_similarity(bridge: Bridge):
    similarity = torch.tensor([[9.0, 0.0, 1.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    draws = torch.stack([Stage1(bridge)._draw_negatives(similarity, torch.arange(3), seed) for seed in range(2000)])

    share = (draws[:, 0] == 2).float().mean()  # between text 1 and text 2: e^1 / (e^0 + e^1) = 0.731
    assert abs(share - 0.731) < 0.04  # four standard deviations of 2,000 draws
    assert not (draws == torch.arange(3)).any()


@pytest.mark.parametrize(("hardness", "expected"), [(0.0, 0.5), (0.5, 0.622)])
def test_softer_negatives_are_drawn_more_evenly(bridge: Bridge, hardness: float, expected: float):
    similarity = torch.tensor([[9.0, 0.0, 1.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    objective = Stage1(bridge, itm_hardness=hardness)
    draws = torch.stack([objective._draw_negatives(similarity, torch.arange(3), seed) for seed in range(2000)])

    assert abs((draws[:, 0] == 2).float().mean() - expected) < 0.045


def test_itg_predicts_each_token_after_decoder_start_and_padding_carries_no_loss(bridge: Bridge, batch: Batch):
    loss = Stage1(bridge, weights={"itg": 1.0})(batch, seed=0)["itg"]

    look = bridge.look(bridge.see(batch.images))
    started = batch.ids.clone()
    started[:, 0] = QFORMER.decoder_id
    logits = F.linear(bridge.heads.words(bridge.qformer.write(look, started)), bridge.qformer.words.weight)
    logits = (logits + bridge.heads.words.bias)[:, :-1]
    labels = batch.ids[:, 1:].masked_fill(batch.ids[:, 1:] == 0, -100)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_a_smaller_vocabulary_is_a_softmax_over_its_words(bridge: Bridge, batch: Batch):
    vocabulary = batch.ids[batch.ids != 0].unique()
    with torch.no_grad():
        outside = torch.ones(40, dtype=torch.bool)
        outside[vocabulary] = False
        small = Stage1(bridge, weights={"itg": 1.0}, smoothing=0.0, vocabulary=vocabulary)(batch, 0)["itg"]
        bridge.heads.words.bias[outside] = -1e9
        masked = Stage1(bridge, weights={"itg": 1.0}, smoothing=0.0)(batch, 0)["itg"]
    torch.testing.assert_close(small, masked)


def test_matching_learns_from_pairs_and_hard_negatives(bridge: Bridge, batch: Batch):
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=3e-3)
    objective = Stage1(bridge, weights={"itc": 1.0, "itm": 1.0})
    first = last = 0.0
    for step in range(400):
        losses = objective(batch, step)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        first, last = (losses["itm"].item(), last) if step == 0 else (first, losses["itm"].item())
    assert first > 0.5
    assert last < 0.3


def test_weights_scale_losses_and_leave_out_what_is_zero(bridge: Bridge, batch: Batch):
    whole = Stage1(bridge)(batch, 3)
    part = Stage1(bridge, weights={"itc": 0.0, "itm": 0.5, "itg": 1.0})(batch, 3)
    assert list(whole) == ["itc", "itm", "itg"]
    assert list(part) == ["itm", "itg"]
    torch.testing.assert_close(part["itm"], whole["itm"] / 2)


def test_a_share_of_the_rows_is_what_a_smaller_batch_of_them_gives(bridge: Bridge, batch: Batch):
    part = Stage1(bridge, weights={"itg": 1.0}, itg_share=0.6)(batch, 0)["itg"]
    first = Stage1(bridge, weights={"itg": 1.0})(Batch(batch.images[:3], batch.image_ids[:3], batch.ids[:3]), 0)["itg"]
    torch.testing.assert_close(part, first)

    objective, calls = Stage1(bridge, weights={"itm": 1.0}, itm_share=0.4), []
    matched = bridge.match
    bridge.match = lambda sight, images, ids: calls.append(len(ids)) or matched(sight, images, ids)
    objective(batch, 0)
    assert calls == [3 * 2]


def test_diversity_is_of_the_cosines_of_what_queries_say(bridge: Bridge, batch: Batch):
    loss = Stage1(bridge, weights={"diversity": 0.5})(batch, 0)["diversity"]

    hidden = bridge.look(bridge.see(batch.images)).hidden
    silence = 0.25 * hidden.norm(dim=-1, keepdim=True)
    said = torch.cat([hidden - hidden.mean(0), silence], dim=-1)
    pairs = [(one, two) for one in range(4) for two in range(4) if one != two]
    cosines = torch.stack([F.cosine_similarity(said[:, one], said[:, two], dim=-1) for one, two in pairs])
    torch.testing.assert_close(loss, -0.5 * torch.log(1.001 - cosines.square()).mean(), rtol=1e-4, atol=0)


def test_diversity_keeps_queries_apart(batch: Batch):
    def alike(weight: float) -> float:
        torch.manual_seed(0)
        own = Bridge(CONFIG)
        objective = Stage1(own, weights={"itc": 1.0, "diversity": weight})
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
        for step in range(60):
            optimizer.zero_grad()
            sum(objective(batch, step).values()).backward()
            optimizer.step()
        return Stage1(own, weights={"diversity": 1.0})(batch, 0)["diversity"].item()

    assert alike(1.0) < 0.5 * alike(0.0)


def test_equal_queries_part(batch: Batch):
    def parted(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        bridge = Bridge(CONFIG)
        with torch.no_grad():
            start = bridge.qformer.query_tokens[:, :1] + 1e-3 * torch.randn(1, 4, 16)
            bridge.qformer.query_tokens.copy_(start)
        objective = Stage1(bridge, weights={"diversity": 1.0})
        optimizer = torch.optim.AdamW(bridge.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=100)
        losses = []
        for step in range(100):
            losses.append(objective(batch, step)["diversity"])
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            schedule.step()
        return losses[0].item(), losses[-1].item()

    begun, ended = zip(*map(parted, range(5)), strict=True)
    assert min(begun) > 3.0  # cosines of 0.975 and more
    assert sum(ended) / 5 < 0.5  # of 0.63 and less; where one beginning ends hangs on the processor's rounding


def test_queries_that_say_the_same_of_every_image_are_no_different_ones(bridge: Bridge):
    """What they differ by there is nothing, however it points; it was once scaled up, and most queries fell silent."""

    def alike(hidden: torch.Tensor) -> tuple[float, float]:
        hidden.requires_grad_(True)
        loss = Stage1(bridge, weights={"diversity": 1.0})._diversity(Look(hidden, (), ()))  # pyright: ignore[reportPrivateUsage]
        loss.backward()
        return loss.item(), hidden.grad.norm().item()

    torch.manual_seed(0)
    constant, apart = torch.randn(1, 4, 16), torch.randn(50, 4, 16)
    silent, silent_pull = alike(constant + 1e-4 * apart)
    telling, telling_pull = alike(constant + apart)
    assert silent > 6 > 1 > telling
    assert silent_pull > 1e-6, "there is a way out of it"
    assert max(silent_pull, telling_pull) < 1, "and nothing that is small is divided by"


def test_a_step_of_training_does_not_see_all_patches(bridge: Bridge, batch: Batch):
    some = thinned(batch.images, 0.5)
    assert some.shape == (5, 3, 12)
    for seen, image in zip(some, batch.images, strict=True):
        places = [(image == patch).all(1).nonzero().item() for patch in seen]
        assert len(set(places)) == 3
    assert thinned(batch.images, 0.1) is batch.images  # a tenth of six is none

    objective = Stage1(bridge, weights={"itc": 1.0}, patch_dropout=0.5)
    whole = Stage1(bridge, weights={"itc": 1.0})(batch, 0)["itc"]
    assert objective(batch, 0)["itc"] != whole
    bridge.eval()
    torch.testing.assert_close(objective(batch, 0)["itc"], whole)


def test_a_question_s_text_is_read_after_queries_that_heed_it_and_a_caption_s_after_plain_ones(
    batch: Batch,
):
    class Echo(torch.nn.Module):
        """Keeps the prefixes that it is given."""

        width, vocab_size = 20, 9

        def embed(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 20)

        def log_probs(self, embeds: torch.Tensor, *rest: object) -> torch.Tensor:
            self.embeds, self.alike = embeds, rest[-1]
            return embeds.sum(-1)[:, :2]

    torch.manual_seed(0)
    language, bridge = Echo(), Bridge(CONFIG.replace(language=PartConfig("echo", Echo.width), question_aware=True))
    objective = Stage2(bridge, language, bos=None)  # type: ignore[arg-type]
    owners = torch.tensor([0, 0, 2])
    questions = torch.zeros(3, 7, dtype=torch.int64)
    questions[1], questions[2, :4] = batch.ids[0], batch.ids[1, :4]
    texts = {"owners": owners, "prompts": ((), (), ()), "targets": torch.zeros(3, 2, dtype=torch.int64)}
    objective(Batch(batch.images, batch.image_ids, batch.ids, questions=questions, **texts), seed=0)

    sight = bridge.see(batch.images)
    plain = bridge.project(bridge.look(sight).hidden)
    heeding = bridge.project(bridge.heed(sight, owners[1:], questions[1:]))
    torch.testing.assert_close(language.embeds, torch.cat([plain[:1], heeding]))
    assert language.alike[0].tolist() == [0, 1, 2], "prefixes of one picture differ"
    objective(Batch(batch.images, batch.image_ids, batch.ids, **texts), seed=0)
    torch.testing.assert_close(language.embeds, plain[owners])
    assert torch.equal(language.alike[0], owners)


def test_captions_of_one_picture_share_a_prefix_and_questions_have_their_own():
    owners = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    asked = torch.zeros(7, dtype=torch.bool)
    asked[[2, 3, 6]] = True
    assert alike(owners, asked).tolist() == [0, 0, 1, 2, 3, 3, 4]
