"""ITC's target by how alike the texts are to the text encoder that the Q-Former starts from."""

from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blip2.config import Blip2Config, QFormerConfig, VisionConfig
from blip2.errors import ConfigError
from blip2.model.bridge import Bridge
from blip2.train.distributed import World
from blip2.train.likeness import TEMPERATURE, Likeness
from blip2.train.objectives import Batch, Stage1

QFORMER = QFormerConfig(
    width=16, layers=2, heads=2, mlp_width=32, queries=4, encoder_width=12, vocab_size=30, positions=8, decoder_id=29,
    cls_id=1, sep_id=2, dropout=0.1,
)  # fmt: skip
IDS = torch.tensor([[1, 5, 7, 2], [1, 9, 2, 0], [1, 5, 2, 0], [1, 8, 9, 2]])
IMAGES = torch.tensor([10, 11, 12, 11])  # two texts of one image


@pytest.fixture(scope="module")
def bert() -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def vectors(bert: transformers.BertModel) -> Tensor:
    """As sentence-transformers makes them of MiniLM: the mean over the tokens, of length 1."""
    real = (IDS != 0)[..., None]
    with torch.no_grad():
        hidden = bert(IDS, attention_mask=real[..., 0].long()).last_hidden_state
    return F.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


def test_sentences_are_the_mean_of_what_bert_says_of_their_tokens(bert: transformers.BertModel):
    likeness = Likeness(QFORMER, bert.state_dict(), 0.5).train()
    torch.testing.assert_close(likeness.sentences(IDS), vectors(bert), atol=1e-5, rtol=1e-5)


@given(share=st.floats(0, 0.99), images=st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_the_share_goes_to_texts_of_other_images_by_their_likeness(
    bert: transformers.BertModel, share: float, images: list[int]
):
    ids = torch.tensor(images)
    same = ids[:, None] == ids[None, :]
    target = same / same.sum(1, keepdim=True)
    found = Likeness(QFORMER, bert.state_dict(), share)(target, IDS, same, World())

    one = vectors(bert)
    weights = torch.exp(one @ one.T / TEMPERATURE) * ~same
    others = weights / weights.sum(1, keepdim=True).clamp_min(1e-9)
    expected = (1 - share) * target + share * torch.where(same.all(1, keepdim=True), target, others)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_step_of_training_learns_from_it_and_validation_does_not(bert: transformers.BertModel):
    torch.manual_seed(1)
    bridge = Bridge(Blip2Config(vision=VisionConfig(width=12), qformer=QFORMER, embedding_width=8)).eval()
    batch = Batch(torch.randn(4, 6, 12), IMAGES, IDS)
    likeness = Likeness(QFORMER, bert.state_dict(), 0.4)
    plain, taught = (Stage1(bridge, weights={"itc": 1.0}, likeness=each) for each in (None, likeness))
    assert taught(batch, 0)["itc"] == plain(batch, 0)["itc"]

    with torch.no_grad():
        by_image, by_text = taught._similarities(bridge.look(bridge.see(batch.images)), batch.ids)  # pyright: ignore[reportPrivateUsage]
        same = IMAGES[:, None] == IMAGES[None, :]
        target = likeness(same / same.sum(1, keepdim=True), IDS, same, World())
        expected = (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)) / 2
        bridge.training = True  # its layers keep still, so that no dropout is in the way
        torch.testing.assert_close(taught(batch, 0)["itc"], expected)
    assert not any(parameter.requires_grad for parameter in likeness.parameters())


def test_a_model_without_a_text_encoder_to_start_from_is_refused(tmp_path: Path):
    shapes = tiny.draw_shapes(tmp_path / "shapes", 8, seed=0)
    with pytest.raises(ConfigError, match="likeness: this model's Q-Former starts from no text encoder"):
        tiny.run(shapes, tmp_path / "run", likeness=0.3)


def test_a_run_learns_with_it(tmp_path: Path):
    shapes = tiny.draw_shapes(tmp_path / "shapes", 64, seed=0)
    model = tiny.model() | {"text": {"name": "tiny-text", "width": 96}}
    run = {"model": model, "steps": 60, "batch_size": 32, "lr": 3e-3, "losses": {"itm": 0.0, "itg": 0.0}}
    validate = {"data": str(shapes), "every": 60, "limit": 64}
    report = tiny.run(shapes, tmp_path / "run", likeness=0.2, validate=validate, **run)
    assert report.validations[-1][1]["text to image R@5"] > 3 * 5 / 64, "three times chance; 0.64 was measured"
