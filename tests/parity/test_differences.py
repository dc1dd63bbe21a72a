"""Where transformers goes wrong in silence: what it does, and what we do, on the same weights.

The first part of each test shows transformers' way, so that it is noticed when that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2.blip2 import Blip2
from blip2.decoding import Decoding
from blip2.errors import PromptError
from blip2.model import prefix
from blip2.model.prefix import SLOT
from published import CLOSE, config, loaded, opt, pictures, pixels, t5

PLACE = 60  # of an image, in transformers' ids
LIMITS: dict[str, Any] = {"max_new_tokens": 10, "num_beams": 1}


@pytest.fixture(scope="module", params=[opt, t5])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Blip2]:
    return loaded(config(request.param()), tmp_path_factory.mktemp("saved"))


def ids(ours: Blip2, text: str) -> list[int]:
    """transformers' ids of a prompt: an image is four places, and one that a prompt begins with stands before BOS."""
    _, tokenizer = ours.writer()
    row = [PLACE * (token == SLOT) or token for token in tokenizer.prompts([text])[0]]
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    first = next((at for at, token in enumerate(row) if token != PLACE), len(row))
    order = [*row[:first], *begin, *row[first:]]
    return [token for each in order for token in ([PLACE] * 4 if each == PLACE else [each])]


@torch.no_grad()
def written(theirs: Any, ours: Blip2, images: list[Any], rows: Tensor, mask: Tensor | None = None) -> list[list[int]]:
    """Tokens that transformers writes, up to the end."""
    mask = torch.ones_like(rows) if mask is None else mask
    given = {"pixel_values": pixels(ours, images), "input_ids": rows, "attention_mask": mask}
    found = theirs.generate(**given, **LIMITS, do_sample=False)
    skipped = 1 if theirs.config.text_config.model_type == "t5" else rows.shape[1]
    return [row[: row.index(1)] if 1 in row else row for row in found[:, skipped:].tolist()]


@torch.no_grad()
def embedded(theirs: Any, ours: Blip2, images: list[Any], rows: Tensor) -> Tensor:
    """What transformers' language model is given to read."""
    given: list[Tensor] = []
    reader = theirs.language_model.get_encoder() if theirs.config.is_encoder_decoder else theirs.language_model
    hook = reader.register_forward_pre_hook(
        lambda _, __, named: given.append(named.get("inputs_embeds")), with_kwargs=True
    )
    written(theirs, ours, images, rows)
    hook.remove()
    return given[0]


def wrote(ours: Blip2, images: Any, prompts: Sequence[str], counts: Sequence[int]) -> list[list[int]]:
    found = ours.write(ours.encode(images), prompts, Decoding.of(LIMITS), counts=counts)
    return [list(text.ids) for [text] in found]


def test_places_that_are_not_as_many_as_images_are_an_error_always(pair: tuple[Any, Blip2]):
    theirs, ours = pair
    images = pictures(2)
    whole = ids(ours, "<image> w5 w9")
    missing = torch.tensor([whole[1:]] * 2)  # three places for four queries, in each of two rows
    assert len(written(theirs, ours, images, missing)) == 2  # and nothing is said
    seen = [embedded(theirs, ours, first + images[1:], missing)[1] for first in (images[:1], pictures(3)[2:])]
    assert not torch.equal(*seen)  # the second row begins with what is left of the first one's picture
    for prompt in ("<image> <image> w5", "w5 <image><image><image>"):
        for images_of_it in (1, 4):
            message = rf"the prompt has \d places for images and was given {images_of_it}: write <image> once for each"
            with pytest.raises(PromptError, match=message):
                ours.ask([pictures(images_of_it)], prompt)
            with pytest.raises(PromptError, match=message):
                ours.caption([pictures(images_of_it)], prompt=prompt)
            with pytest.raises(PromptError, match=message):
                next(iter(ours.caption([pictures(images_of_it)], prompt=prompt, stream=True)))
            with pytest.raises(PromptError, match=message):
                ours.ask([pictures(images_of_it)], prompt, choices=["w1", "w2"])


@pytest.mark.parametrize(
    "prompt", ["<image><image> w5 w9", "<image> w3 <image> w5", "w1 <image> w2 w3 <image>", "<image>w8<image>w8"]
)
def test_several_images_in_one_prompt(pair: tuple[Any, Blip2], prompt: str):
    theirs, ours = pair
    images = pictures(2)
    rows = torch.tensor([ids(ours, prompt)])
    assert (rows == PLACE).sum() == 8  # its processor never lays out more than one image's, and drops the second
    assert wrote(ours, images, [prompt], [2]) == written(theirs, ours, images, rows)
    both, swapped = (ours.caption([each], prompt=prompt, details=True, **LIMITS)[0] for each in (images, images[::-1]))
    assert both.log_probs[0] != swapped.log_probs[0]

    language, tokenizer = ours.writer()
    with torch.no_grad():
        embeds = theirs.get_input_embeddings()(rows)
        visual = ours.bridge.project(ours.encode(images).queries.clone())
        embeds[rows == PLACE] = visual.flatten(0, 1)
        found, _ = prefix.build(language, visual, tokenizer.prompts([prompt]), tokenizer.bos, "before_bos", [2])
    torch.testing.assert_close(found, embeds, rtol=0, atol=0)


def test_prompts_with_none_one_and_three_places_share_a_batch_and_change_nothing(pair: tuple[Any, Blip2]):
    _, ours = pair
    images = pictures(6)
    prompts = ["w1", "w2 <image> w3 w4 w5", "<image> w5 <image> w6 <image>", "w9 w9 w9 w9 w9 w9 w9 w9"]
    counts, starts = [1, 1, 3, 1], [0, 1, 2, 5]
    together = wrote(ours, images, prompts, counts)
    alone = [
        wrote(ours, images[start : start + count], [prompt], [count])[0]
        for start, count, prompt in zip(starts, counts, prompts, strict=True)
    ]
    assert together == alone


def test_several_images_without_a_place_stand_before_the_text(pair: tuple[Any, Blip2]):
    _, ours = pair
    images = pictures(2)
    assert wrote(ours, images, ["w5 w9"], [2]) == wrote(ours, images, ["<image><image>w5 w9"], [2])
    assert wrote(ours, images[:1], ["w5 w9"], [1]) == wrote(ours, images[:1], ["<image>w5 w9"], [1])


def test_the_verbs_take_a_list_of_images_for_one_prompt(pair: tuple[Any, Blip2]):
    _, ours = pair
    one, two = pictures(2)
    options: dict[str, Any] = {"max_new_tokens": 5}
    words = "w7 <image> w3 <image>"
    [said] = ours.caption([[one, two]], prompt=words, **options)
    assert said == ours.caption([ours.encode([one, two])], prompt=words, **options)[0]
    assert (
        "".join(ours.caption([[one, two]], prompt=words, stream=True, **options)).strip()
        == ours.caption([[one, two]], prompt=words, num_beams=1, **options)[0]
    )
    asked = ours.ask([[one, two], [two, one]], words, **options)
    assert asked == [ours.ask([[one, two]], words, **options)[0], ours.ask([[two, one]], words, **options)[0]]
    assert len(ours.ask([[one, two]], [words, "w5", "<image><image>"], **options)) == 3
    assert ours.ask([[one, two]], words, choices=["w1", "w2 w3"])[0] in ("w1", "w2 w3")


@torch.no_grad()
def test_padding_on_the_right_and_ragged_prompts_change_nothing(pair: tuple[Any, Blip2]):
    theirs, ours = pair
    prompts = ["w1", "w3 w4 w5 w6 w7 w8", "", "w9 w2"]
    images = pictures(len(prompts))
    rows = [ids(ours, f"<image>{prompt}") for prompt in prompts]
    alone = [written(theirs, ours, [image], torch.tensor([row]))[0] for image, row in zip(images, rows, strict=True)]
    longest = max(map(len, rows))
    padded = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    together = written(theirs, ours, images, padded, mask)
    if theirs.config.text_config.model_type == "opt":  # it goes on from the padding
        assert together != alone
    assert wrote(ours, images, prompts, [1] * len(prompts)) == alone

    language, tokenizer = ours.writer()
    visual = ours.bridge.project(ours.encode(images).queries.clone())
    embeds, lengths = prefix.build(language, visual, tokenizer.prompts(prompts), tokenizer.bos, "before_bos")
    logits, _ = language.prefill(embeds, lengths)
    noise = torch.where(torch.arange(longest)[None, :, None] < lengths[:, None, None], embeds, 1e4)
    torch.testing.assert_close(language.prefill(noise, lengths)[0], logits, **CLOSE)


def test_a_place_takes_the_room_of_an_image(pair: tuple[Any, Blip2]):
    _, ours = pair
    language, _ = ours.writer()
    room = language.context
    many = "w5 " * (room - 4 * 3 - 30)
    with pytest.raises(PromptError, match="images, prompt and answer need"):
        ours.caption([pictures(3)], prompt=f"<image><image><image> {many}", max_new_tokens=31)
