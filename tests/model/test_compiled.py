"""`torch.compile` takes the parts of the model whole, and gives what they give. Slow: it traces, and compiles once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip2.config import Blip2Config, OPTConfig, QFormerConfig, T5Config, VisionConfig
from blip2.model.bridge import Bridge
from blip2.model.opt import OPT
from blip2.model.t5 import T5
from blip2.model.vision import VisionTransformer
from blip2.quantize import SCHEMES, quantize_layers

pytestmark = pytest.mark.slow
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order
VISION = VisionConfig(image_size=28, patch_size=7, width=64, layers=2, heads=2, mlp_width=128)
QFORMER = QFormerConfig(
    width=16, layers=2, heads=2, mlp_width=32, queries=4, encoder_width=64, vocab_size=30, positions=20
)
LANGUAGES = {
    "opt": OPTConfig(width=64, layers=2, heads=2, mlp_width=128, vocab_size=30, context=64),
    "t5": T5Config(width=64, layers=2, heads=2, head_width=32, mlp_width=128, vocab_size=30),
}


def whole(function: Any) -> Any:
    """Traced without a break; what machine code would come of it is torch's matter."""
    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_the_image_encoder(scheme: Any):
    vision = VisionTransformer(VISION).eval()
    if scheme:
        quantize_layers(vision, scheme, torch.device("cpu"))
    pixels = torch.randn(2, 3, 28, 28)
    close = CLOSE if scheme is None else {"rtol": 1e-2, "atol": 1e-2}  # a rounding may go the other way
    torch.testing.assert_close(whole(vision)(pixels), vision(pixels), **close)


def test_the_image_encoder_in_machine_code():
    vision = VisionTransformer(VISION).eval()
    pixels = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(torch.compile(vision, fullgraph=True)(pixels), vision(pixels), **CLOSE)


def test_the_bridge_looks_reads_and_matches():
    bridge = Bridge(Blip2Config(vision=VISION, qformer=QFORMER, embedding_width=8)).eval()
    patches, ids = torch.randn(2, 17, 64), torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])

    def looked(patches: Tensor) -> Tensor:
        return bridge.image_vectors(bridge.look(bridge.see(patches)).hidden)

    def joined(patches: Tensor, ids: Tensor) -> Tensor:
        return bridge.qformer.join(bridge.see(patches), ids)

    torch.testing.assert_close(whole(looked)(patches), looked(patches), **CLOSE)
    torch.testing.assert_close(whole(bridge.qformer.read)(ids), bridge.qformer.read(ids), **CLOSE)
    torch.testing.assert_close(whole(joined)(patches, ids), joined(patches, ids), **CLOSE)


@pytest.mark.parametrize("kind", LANGUAGES)
def test_steps_of_language_models_over_chosen_rows(kind: str):
    config = LANGUAGES[kind]
    model: OPT | T5 = OPT(config) if isinstance(config, OPTConfig) else T5(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    step = whole(model.step)
    found: list[list[Tensor]] = []
    for run in (model.step, step):
        _, cache = model.prefill(
            torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 3])
        )
        cache = cache.select(torch.tensor([0, 0, 1]))
        found.append([run(torch.tensor([n, n + 1, n + 2]), cache) for n in range(4)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, **CLOSE)
