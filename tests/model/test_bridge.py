"""The bridge's own part: texts of like length computed together, and each image seen once for all of its pairs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blip2.config import Blip2Config, QFormerConfig, VisionConfig
from blip2.model import bridge as module
from blip2.model.bridge import Bridge

QFORMER = QFormerConfig(
    width=16, layers=3, heads=2, mlp_width=32, queries=4, encoder_width=12, vocab_size=40, positions=16, decoder_id=39,
    cls_id=1, sep_id=2,
)  # fmt: skip
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def bridge() -> Bridge:
    torch.manual_seed(0)
    return Bridge(Blip2Config(vision=VisionConfig(width=12), qformer=QFORMER, embedding_width=8)).eval()


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_texts_in_groups_of_like_length_are_what_each_is_alone(bridge: Bridge, lengths: list[int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 39, (length,), generator=generator) for length in lengths]
    ids = torch.stack([F.pad(row, (0, 9 - len(row))) for row in rows])
    patches = torch.randn(3, 5, 12, generator=generator)
    images = torch.randint(0, 3, (len(rows),), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP", 2)
        vectors, logits = bridge.text_vectors(ids), bridge.match(bridge.see(patches), images, ids)

    alone = torch.cat([bridge.text_vectors(row[None]) for row in rows])
    torch.testing.assert_close(vectors, alone, **CLOSE)
    pairs = zip(images.split(1), rows, strict=True)
    paired = [bridge.match(bridge.see(patches[image]), torch.tensor([0]), row[None]) for image, row in pairs]
    torch.testing.assert_close(logits, torch.cat(paired), **CLOSE)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    images=st.integers(1, 4),
    together=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_every_image_with_every_text_is_what_each_pair_is_alone(
    bridge: Bridge, lengths: list[int], images: int, together: int, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 39, (length,), generator=generator) for length in lengths]
    ids = torch.stack([F.pad(row, (0, 9 - len(row))) for row in rows])
    patches = torch.randn(images, 5, 12, generator=generator)
    found = bridge.match_all(bridge.see(patches), ids, together)

    alone = [[bridge.match(bridge.see(one[None]), torch.tensor([0]), row[None])[0] for row in rows] for one in patches]
    torch.testing.assert_close(found, torch.stack([torch.stack(row) for row in alone]), **CLOSE)
