"""Blocks of the matching head: as large as the memory allows, and the same numbers whatever their size."""

import pytest
import torch

from blip2 import matching
from blip2.config import Blip2Config, QFormerConfig, VisionConfig
from blip2.model.bridge import Bridge

QFORMER = QFormerConfig(
    width=16, layers=3, heads=2, mlp_width=32, queries=4, encoder_width=12, vocab_size=40, positions=16, decoder_id=39,
    cls_id=1, sep_id=2,
)  # fmt: skip


@pytest.mark.parametrize("budget", [1, 10_000, 40_000, 2**26])
def test_blocks_of_any_size_give_the_same_logits(monkeypatch: pytest.MonkeyPatch, budget: int):
    torch.manual_seed(0)
    bridge = Bridge(Blip2Config(vision=VisionConfig(width=12), qformer=QFORMER, embedding_width=8)).eval()
    patches, ids = torch.randn(5, 6, 12), torch.randint(1, 39, (7, 9))
    ids[2, 4:] = ids[5, 2:] = 0
    with torch.no_grad():
        expected = bridge.match_all(bridge.see(patches), ids)
        monkeypatch.setattr(matching, "CPU_BLOCK", budget)
        found = matching.match_all(bridge, patches, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # sums in another order; the worst seen is 1e-7


def test_a_block_grows_with_the_memory_images_last(monkeypatch: pytest.MonkeyPatch):
    sizes: list[tuple[int, int]] = []
    for budget in (1, 2**15, 2**17, 2**20, 2**24):
        monkeypatch.setattr(matching, "CPU_BLOCK", budget)
        sizes.append(matching.block(QFORMER, 6, torch.ones(30, 9)))
    assert sizes[0] == (1, 1)
    assert 1 < sizes[1][1] < 30
    assert sizes[1][0] == 1
    assert sizes == sorted(sizes)
    assert sizes[-1][0] > 1
    assert sizes[-1][1] == 30
