"""The way that training on a CPU takes is torch's own attention, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.model.attention import SHORT, attend

HALF = {"rtol": 0.05, "atol": 0.05}  # scores and weights are rounded to 8 bits of fraction; the worst seen is 0.034
SINGLE = {"rtol": 1e-4, "atol": 1e-6}  # sums in another order; the worst seen is 5e-7


def drawn(count: int, dtype: torch.dtype, heads: int = 4) -> Tensor:
    return torch.randn(3, heads, count, 8, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)])
@pytest.mark.parametrize("keys", [5, SHORT + 1])
@pytest.mark.parametrize("kind", ["all", "bool", "float", "causal", "shared heads"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_with_gradients_is_what_torch_gives(
    dtype: torch.dtype, close: dict[str, float], keys: int, kind: str, scale: float | None
):
    torch.manual_seed(0)
    heads = 2 if kind == "shared heads" else 4
    query, key, value = drawn(5, dtype), drawn(keys, dtype, heads), drawn(keys, dtype, heads)
    seen = torch.rand(3, 1, 1, keys) < 0.6
    seen[..., 0] = True
    mask = {"bool": seen, "float": torch.randn(3, 4, 5, keys, dtype=dtype)}.get(kind)
    causal = kind == "causal"
    found = attend(query, key, value, mask, causal=causal, scale=scale)
    parts = [part.detach().float().requires_grad_() for part in (query, key, value)]
    wide = mask.float() if kind == "float" else mask
    options = {"attn_mask": wide, "is_causal": causal, "scale": scale, "enable_gqa": heads != 4}
    expected = F.scaled_dot_product_attention(*parts, **options).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found.float(), expected, **close)

    upstream = torch.randn(expected.shape)
    expected.backward(upstream)
    found.backward(upstream.to(dtype))
    for ours, theirs in zip((query, key, value), parts, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, **close)


def test_dropout_keeps_the_mean_of_what_is_seen():
    torch.manual_seed(0)
    query, key = drawn(1, torch.float32), drawn(4, torch.float32)
    value = torch.ones_like(key).requires_grad_()
    found = torch.stack([attend(query, key, value, None, 0.5) for _ in range(400)])
    assert found.std() > 0.1
    torch.testing.assert_close(found.mean(0), torch.ones(3, 1, 32), rtol=0, atol=0.25)  # 5 standard errors of 400 draws


@pytest.mark.parametrize("kind", ["all", "bool", "float", "causal", "shared heads"])
def test_weights_that_are_kept_sum_to_one_and_made_the_result_that_torch_gives(kind: str):
    torch.manual_seed(0)
    heads = 2 if kind == "shared heads" else 4
    query, key, value = (drawn(count, torch.float32, of).detach() for count, of in ((5, 4), (7, heads), (7, heads)))
    seen = torch.rand(3, 1, 1, 7) < 0.6
    seen[..., 0] = True
    mask = {"bool": seen, "float": torch.randn(3, 4, 5, 7)}.get(kind)
    kept: list[Tensor] = []
    found = attend(query, key, value, mask, causal=kind == "causal", kept=kept)
    torch.testing.assert_close(found, attend(query, key, value, mask, causal=kind == "causal"), **SINGLE)
    (weights,) = kept
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 5))
    by_hand = weights @ value.repeat_interleave(4 // heads, dim=1)
    torch.testing.assert_close(by_hand.transpose(1, 2).flatten(2), found, **SINGLE)


def test_a_gradient_reaches_the_weights_that_are_kept():
    query, key, value = drawn(5, torch.float32), drawn(7, torch.float32), drawn(7, torch.float32)
    kept: list[Tensor] = []
    found = attend(query, key, value, kept=kept)
    (slope,) = torch.autograd.grad(found[0, 2, :8].sum(), kept)  # of the first head's third query
    torch.testing.assert_close(slope[0, 0, 2], value[0, 0].sum(-1), **SINGLE)
    assert slope.count_nonzero() == 7
