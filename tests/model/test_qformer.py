"""The three attention patterns, stated as what a token can and cannot notice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.config import QFormerConfig
from blip2.model.qformer import QFormer, Watch

CONFIG = QFormerConfig(
    width=16, layers=3, heads=2, mlp_width=32, queries=4, encoder_width=12, vocab_size=50, positions=16, decoder_id=49
)
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def qformer() -> QFormer:
    torch.manual_seed(0)
    model = QFormer(CONFIG).eval()
    for parameter in model.parameters():  # far enough from zero that a wrong mask shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def texts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 49, (rows, length), generator=torch.Generator().manual_seed(seed))


def patches(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 5, 12, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 9), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_itg_with_reused_keys_equals_one_pass_under_the_combined_mask(
    qformer: QFormer, length: int, rows: int, seed: int
):
    ids, image = texts(rows, length, seed), patches(rows, seed)
    queries = CONFIG.queries
    mask = torch.zeros(queries + length, queries + length, dtype=torch.bool)
    mask[:queries, :queries] = True  # queries see queries
    mask[queries:, :queries] = True  # text sees queries
    mask[queries:, queries:] = torch.ones(length, length).tril().bool()  # and the text before it
    embedded = qformer.norm(qformer.words(ids) + qformer.positions.weight[:length])
    x = torch.cat([qformer.norm(qformer.query_tokens).expand(rows, -1, -1), embedded], dim=1)
    for layer in qformer.layers:
        seen = layer.cross_attention.keys_values(image) if layer.cross_attention else None
        x = layer(x, queries, *layer.attention.keys_values(x), mask[None, None], seen)

    look = qformer.look(qformer.see(image))

    torch.testing.assert_close(look.hidden, x[:, :queries], **CLOSE)
    torch.testing.assert_close(qformer.write(look, ids), x[:, queries:], **CLOSE)


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 8), padding=st.integers(1, 5), seed=st.integers(0, 99))
def test_padding_changes_no_pattern(qformer: QFormer, length: int, padding: int, seed: int):
    ids, image = texts(1, length, seed), patches(1, seed)
    padded = torch.nn.functional.pad(ids, (0, padding), value=CONFIG.pad_id)
    look = qformer.look(qformer.see(image))

    torch.testing.assert_close(qformer.read(padded)[:, :length], qformer.read(ids), **CLOSE)
    torch.testing.assert_close(qformer.write(look, padded)[:, :length], qformer.write(look, ids), **CLOSE)
    end = CONFIG.queries + length
    torch.testing.assert_close(
        qformer.join(qformer.see(image), padded)[:, :end], qformer.join(qformer.see(image), ids), **CLOSE
    )


def test_contrast_text_sees_both_ways_and_generation_only_back(qformer: QFormer):
    ids = texts(1, 6)
    changed = ids.clone()
    changed[0, -1] = 1 + ids[0, -1] % 48
    look = qformer.look(qformer.see(patches(1)))

    assert not torch.allclose(qformer.read(ids)[0, 0], qformer.read(changed)[0, 0])
    torch.testing.assert_close(qformer.write(look, ids)[0, :-1], qformer.write(look, changed)[0, :-1], **CLOSE)
    assert not torch.allclose(qformer.write(look, ids)[0, -1], qformer.write(look, changed)[0, -1])


def test_generated_text_and_matching_notice_the_image_and_contrast_text_cannot(qformer: QFormer):
    ids = texts(1, 6)
    one, other = (qformer.see(patches(1, seed)) for seed in (1, 2))
    looks = qformer.look(one), qformer.look(other)

    assert not torch.allclose(qformer.write(looks[0], ids), qformer.write(looks[1], ids))
    assert not torch.allclose(qformer.join(one, ids)[:, 4:], qformer.join(other, ids)[:, 4:])


def test_matching_queries_notice_the_text_and_looking_queries_are_the_same_whatever_it_is(qformer: QFormer):
    image = patches(1)
    joined = [qformer.join(qformer.see(image), texts(1, 6, seed))[:, :4] for seed in (1, 2)]

    assert not torch.allclose(*joined)


def test_a_batch_equals_its_rows(qformer: QFormer):
    ids, image = texts(3, 7), patches(3)
    sight = qformer.see(image)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(
            qformer.join(sight, ids)[one], qformer.join(qformer.see(image[one]), ids[one]), **CLOSE
        )
        torch.testing.assert_close(
            qformer.look(sight).hidden[one], qformer.look(qformer.see(image[one])).hidden, **CLOSE
        )


def test_cross_attention_stands_in_every_nth_layer_and_text_parts_only_where_wanted():
    with_text = QFormer(CONFIG)
    assert [layer.cross_attention is not None for layer in with_text.layers] == [True, False, True]
    names = QFormer(QFormerConfig(**{**CONFIG.__dict__, "text": False})).state_dict()
    assert not [name for name in names if "text_" in name or "words" in name or "positions" in name]


def test_the_positions_that_are_wanted_are_those_of_the_whole(qformer: QFormer):
    image, ids = patches(3), texts(3, 6)
    whole = qformer.join(qformer.see(image), ids)
    torch.testing.assert_close(qformer.join(qformer.see(image), ids, wanted=4), whole[:, :4], **CLOSE)


def test_being_watched_changes_nothing_and_tells_who_looked_where(qformer: QFormer):
    sight, ids = qformer.see(patches(2)), texts(2, 6)
    joined, looked = Watch(), Watch()
    torch.testing.assert_close(qformer.join(sight, ids, watch=joined), qformer.join(sight, ids), **CLOSE)
    torch.testing.assert_close(qformer.look(sight, looked).hidden, qformer.look(sight).hidden, **CLOSE)
    assert [weights.shape for weights in joined.within] == [(2, 2, 10, 10)] * 3
    assert [weights.shape for weights in looked.within] == [(2, 2, 4, 4)] * 3
    assert [weights.shape for weights in joined.across] == [weights.shape for weights in looked.across]
    assert [weights.shape for weights in joined.across] == [(2, 2, 4, 5)] * 2  # layers 0 and 2 of 3 cross
