"""`generate` gives the rows of ids that transformers gives: what stands before them, the new tokens, the padding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hub import picture

from blip2.compat import transformers as compat
from blip2.errors import ConfigError, PromptError

transformers = pytest.importorskip("transformers")

CASES: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 9},
    {"max_length": 40},
    {"max_length": 40, "min_length": 36},
    {"max_new_tokens": 12, "min_new_tokens": 8, "num_beams": 3},
    {"max_new_tokens": 9, "num_beams": 5},
    {"max_new_tokens": 9, "num_beams": 5, "num_return_sequences": 3, "early_stopping": True},
    {"max_new_tokens": 14, "num_beams": 4, "length_penalty": -1.0},
    {"max_new_tokens": 14, "num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"max_new_tokens": 14, "repetition_penalty": 1.5},
    {"max_new_tokens": 14, "no_repeat_ngram_size": 2, "num_beams": 3},
    {"max_new_tokens": 14, "repetition_penalty": 0.8, "no_repeat_ngram_size": 3},
    {"max_new_tokens": 9, "eos_token_id": [70, 80, 90], "pad_token_id": 5},
    {"max_new_tokens": 9, "num_beams": 2, "eos_token_id": 10, "temperature": 0.3, "top_k": 3},
]
ALIKE = ["what is it?", "who is it? ", "a photo of "]  # of one length: where padding is nothing differs
RAGGED = ["what is it?", "a", "a photo of two", "who"]
Pair = tuple[Any, Any, Any]


def inputs(processor: Any, texts: list[str], side: str = "right") -> Any:
    processor.tokenizer.padding_side = side
    return processor([picture(seed) for seed in range(len(texts))], texts, return_tensors="pt", padding=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_the_same_after_prompts(pair: Pair, case: dict[str, Any]):
    theirs, ours, processor = pair
    given = inputs(processor, ALIKE)
    assert ours.generate(**given, **case).tolist() == theirs.generate(**given, **case).tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_the_same_from_pictures_alone(pair: Pair, case: dict[str, Any]):
    theirs, ours, processor = pair
    given = processor([picture(seed) for seed in range(4)], return_tensors="pt")
    if theirs.config.is_encoder_decoder and case.get("max_length") is None:
        theirs.config.text_config.bos_token_id = 1  # this tokenizer has none, and transformers cannot begin without
        ours.config.text_config.bos_token_id = 1
    assert ours.generate(**given, **case).tolist() == theirs.generate(**given, **case).tolist()


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[9]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_any_side_gives_each_row_what_it_gets_alone(pair: Pair, case: dict[str, Any], side: str):
    theirs, ours, processor = pair
    given = inputs(processor, RAGGED, side)
    whole = ours.generate(**given, **case)
    skip = 1 if theirs.config.is_encoder_decoder else given["input_ids"].shape[1]
    for row, text in enumerate(RAGGED):
        one = processor(picture(row), text, return_tensors="pt")
        alone = theirs.generate(**one, **case)[0]
        new = alone[1 if theirs.config.is_encoder_decoder else one["input_ids"].shape[1] :].tolist()
        assert whole[row, skip : skip + len(new)].tolist() == new
    if side == "left" and "repetition_penalty" not in case and skip > 1:  # where transformers has it right as well
        assert whole.tolist() == theirs.generate(**given, **case).tolist()


def test_right_padding_changes_what_transformers_says_and_nothing_here(folders: dict[str, Path]):
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folders["opt"]).eval()
    ours = compat.Blip2ForConditionalGeneration.from_pretrained(folders["opt"])
    processor = compat.Blip2Processor.from_pretrained(folders["opt"])
    rows = {side: inputs(processor, RAGGED, side) for side in ("left", "right")}
    new = {side: ours.generate(**given, max_new_tokens=12)[:, -12:].tolist() for side, given in rows.items()}
    assert new["left"] == new["right"]
    wrong = {side: theirs.generate(**given, max_new_tokens=12)[:, -12:].tolist() for side, given in rows.items()}
    assert wrong["left"] == new["left"]
    assert wrong["right"] != wrong["left"]


def test_a_repetition_penalty_leaves_padding_out(folders: dict[str, Path]):
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folders["opt"]).eval()
    ours = compat.Blip2ForConditionalGeneration.from_pretrained(folders["opt"])
    processor = compat.Blip2Processor.from_pretrained(folders["opt"])
    likely = ours.generate(**processor(picture(0), "a", return_tensors="pt"), max_new_tokens=1)[0, -1]
    for model in (theirs, ours):  # a model that likes to write what rows are padded with
        model.config.text_config.pad_token_id = model.generation_config.pad_token_id = int(likely)
    given = inputs(processor, ["a", "a photo of two"], "left")
    given["input_ids"][given["attention_mask"] == 0] = likely
    alone = ours.generate(**processor(picture(0), "a", return_tensors="pt"), max_new_tokens=1, repetition_penalty=9.0)
    new = [model.generate(**given, max_new_tokens=1, repetition_penalty=9.0)[0, -1] for model in (theirs, ours)]
    assert new[1] == alone[0, -1] == likely
    assert new[0] != likely


def test_drawing_follows_torch_s_seed_and_transformers_defaults(pair: Pair):
    _, ours, processor = pair
    given = inputs(processor, ALIKE)
    drawn: list[Any] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(ours.generate(**given, do_sample=True, num_return_sequences=4, max_new_tokens=16).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = ours.generate(**given, max_new_tokens=16)
    torch.manual_seed(0)
    assert ours.generate(**given, do_sample=True, top_k=1, max_new_tokens=16).tolist() == greedy.tolist()
    beams = ours.generate(**given, do_sample=True, num_beams=3, top_p=0.9, temperature=0.7, max_new_tokens=5)
    assert len(beams) == len(ALIKE)


def test_sampling_has_transformers_distribution(folders: dict[str, Path]):
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folders["opt"]).eval()
    ours = compat.Blip2ForConditionalGeneration.from_pretrained(folders["opt"])
    given = compat.Blip2Processor.from_pretrained(folders["opt"])(picture(2), "a", return_tensors="pt")
    torch.manual_seed(0)
    counts: list[torch.Tensor] = []
    for model in (theirs, ours):
        options = {
            "do_sample": True,
            "temperature": 1.3,
            "top_p": 0.9,
            "num_return_sequences": 2000,
            "max_new_tokens": 1,
        }
        counts.append(model.generate(**given, **options)[:, -1].bincount(minlength=300) / 2000)
    assert (counts[0] - counts[1]).abs().sum() < 0.3  # of 2000 draws each: 0.19 seen; 2 where nothing is alike


def test_several_images_in_one_prompt(folders: dict[str, Path]):
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folders["opt"]).eval()
    ours = compat.Blip2ForConditionalGeneration.from_pretrained(folders["opt"])
    processor = compat.Blip2Processor.from_pretrained(folders["opt"])
    one, two = (processor(picture(seed), "a cat", return_tensors="pt") for seed in (1, 2))
    ids = torch.cat([one["input_ids"], two["input_ids"]], dim=1)
    given = {"pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]]), "input_ids": ids}
    expected = theirs.generate(**given, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    assert ours.generate(**given, max_new_tokens=8).tolist() == expected.tolist()


@pytest.mark.parametrize("change", ["none", "one too few", "one image too many", "split over rows"])
def test_placeholders_that_do_not_match_the_images_are_an_error(pair: Pair, change: str):
    theirs, ours, processor = pair
    given = inputs(processor, ALIKE)
    slots = {"none": 4, "one too few": 1}.get(change, 0)
    given["input_ids"], given["attention_mask"] = given["input_ids"][:, slots:], given["attention_mask"][:, slots:]
    if change == "one image too many":
        given["pixel_values"] = torch.cat([given["pixel_values"], given["pixel_values"][:1]])
    if change == "split over rows":
        given["input_ids"][0, 0], given["input_ids"][1, 5] = 5, processor.tokenizer.image_token_id
    with pytest.raises(PromptError, match=r"image placeholders .* images need 4 each"):
        ours.generate(**given, max_new_tokens=3)
    if change != "one image too many" or not theirs.config.is_encoder_decoder:
        theirs.generate(**given, max_new_tokens=3)  # says something, of a picture that it did not see


def test_embeddings_stand_for_ids(pair: Pair):
    theirs, ours, processor = pair
    given = inputs(processor, ALIKE)
    ids = given.pop("input_ids")
    embeds = theirs.get_input_embeddings()(ids).detach()
    expected = theirs.generate(**given, inputs_embeds=embeds, max_new_tokens=7)
    assert ours.generate(**given, inputs_embeds=embeds, max_new_tokens=7).tolist() == expected.tolist()


def test_a_dictionary_where_asked_for(pair: Pair):
    theirs, ours, processor = pair
    given = inputs(processor, ALIKE)
    options = {"num_beams": 3, "max_new_tokens": 6, "return_dict_in_generate": True}
    found = ours.generate(**given, **options)
    expected = theirs.generate(**given, **options, output_scores=True)
    assert found.sequences.tolist() == expected.sequences.tolist() == found[0].tolist()
    # float32 sums of log-probabilities in another order
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty_alpha": 0.6}, "no 'penalty_alpha'"),
        ({"num_beam_groups": 2}, "no 'num_beam_groups'"),
        ({"output_scores": True}, "no 'output_scores'"),
        ({"do_sampel": False}, "no 'do_sampel'"),
        ({"max_length": 8}, "use max_new_tokens"),
        ({"num_return_sequences": 2}, "greedy decoding gives one caption"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_an_argument_that_is_not_there_is_named(folders: dict[str, Path], options: dict[str, Any], message: str):
    ours = compat.Blip2ForConditionalGeneration.from_pretrained(folders["opt"])
    given = compat.Blip2Processor.from_pretrained(folders["opt"])(picture(1), "a cat", return_tensors="pt")
    with pytest.raises(ConfigError, match=message):
        ours.generate(**given, **options)


def test_the_folder_s_generation_config_counts(folders: dict[str, Path], tmp_path: Path):
    place = tmp_path / "model"
    shutil.copytree(folders["opt"], place)
    (place / "generation_config.json").write_text('{"max_new_tokens": 5, "num_beams": 3, "eos_token_id": 202}')
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(place).eval()
    ours = compat.Blip2ForConditionalGeneration.from_pretrained(place)
    given = compat.Blip2Processor.from_pretrained(place)(picture(1), "a cat", return_tensors="pt")
    found = ours.generate(**given)
    assert found.tolist() == theirs.generate(**given, max_new_tokens=5, num_beams=3).tolist()
    assert found.shape != theirs.generate(**given).shape  # which asks the language model inside, and that knows nothing
    assert (
        ours.generate(**given, generation_config=compat.GenerationConfig(max_new_tokens=2)).shape[1]
        == found.shape[1] - 3
    )
    ours.generation_config.update(max_new_tokens=4)
    assert ours.generate(**given).shape[1] == found.shape[1] - 1


def test_an_older_model_s_queries_stand_before_the_words(folders: dict[str, Path], tmp_path: Path):
    place = tmp_path / "old"
    shutil.copytree(folders["opt"], place)
    values = json.loads((place / "config.json").read_text())
    token = values.pop("image_token_index")
    (place / "config.json").write_text(json.dumps(values))
    settings = json.loads((place / "processor_config.json").read_text())
    settings.pop("num_query_tokens")
    (place / "processor_config.json").write_text(json.dumps(settings))
    processor = compat.Blip2Processor.from_pretrained(place)
    given = processor(picture(3), "a cat", return_tensors="pt")
    assert token not in given["input_ids"]
    new = compat.Blip2ForConditionalGeneration.from_pretrained(folders["opt"])
    expected = new.generate(
        **compat.Blip2Processor.from_pretrained(folders["opt"])(picture(3), "a cat", return_tensors="pt")
    )
    old = compat.Blip2ForConditionalGeneration.from_pretrained(place)
    assert old.generate(**given)[0, -20:].tolist() == expected[0, -20:].tolist()
