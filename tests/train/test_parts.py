"""From a recipe to what the loop is handed: what is refused at the start, and how the frozen parts are held."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from blip2 import weights
from blip2.adapters.transformers_lm import TransformersLM
from blip2.errors import ConfigError
from blip2.train import parts as assembly
from blip2.train.distributed import World
from blip2.train.parts import Job, Parts
from blip2.train.recipe import parse
from blip2.train.start import model_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw_shapes(tmp_path_factory.mktemp("shapes"), 16, seed=0)


def assemble(data: Any, parts: Parts | None = None, **changes: Any) -> Job:
    recipe = parse(tiny.recipe(data, Path("out"), **changes))
    return assembly.assemble(recipe, parts or tiny.parts(), World(), CPU, torch.float32)


@pytest.mark.parametrize("stage", [{"stage": 1}, {"stage": 2, "keep": 0.1}], ids=str)
def test_texts_longer_than_the_qformer_has_positions_are_refused_at_the_start(shapes: Path, stage: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"text_length: 17 is more than .* positions, 16"):
        assemble(shapes, text_length=17, **stage)
    assemble(shapes, text_length=16, **stage)


def test_texts_that_the_qformer_does_not_read_may_be_longer(shapes: Path):
    assemble(shapes, stage=2, text_length=17)


def test_rows_beyond_the_language_model_s_share_are_for_what_is_kept(shapes: Path):
    """The language model's loss is that of its rows alone, the contrast's that of all."""
    jobs = [assemble(shapes, stage=2, keep=0.5, batch_size=8, lm_share=share) for share in (0.5, 1.0)]
    some, whole = (job.batches(0) for job in jobs)
    assert some.owners.max() == 3
    assert torch.equal(some.images, whole.images)
    few = dataclasses.replace(whole, images=whole.images[:4], image_ids=whole.image_ids[:4], ids=whole.ids[:4])
    few = dataclasses.replace(
        few, owners=some.owners, prompts=some.prompts, targets=some.targets, questions=some.questions
    )
    objective = jobs[0].objective.eval()
    found, all_kept, all_written = (objective(batch, 7) for batch in (some, whole, few))
    torch.testing.assert_close(found["itc"], all_kept["itc"])
    torch.testing.assert_close(found["lm"], all_written["lm"])
    assert found["lm"] != all_kept["lm"]
    assert found["itc"] != all_written["itc"]


def test_karpathys_file_and_the_folder_of_its_pictures_train(shapes: Path, tmp_path: Path):
    names = sorted(path.name for path in shapes.parent.glob("*.png"))[:4]
    sentence = [{"raw": "a red circle"}]
    entries = [{"filename": name, "split": "train", "imgid": n, "sentences": sentence} for n, name in enumerate(names)]
    file = tmp_path / "dataset_flickr30k.json"
    file.write_text(json.dumps({"images": entries, "dataset": "flickr30k"}))
    source = {"path": str(file), "format": "karpathy", "split": "train", "images": str(shapes.parent)}
    batch = assemble([source], batch_size=4).batches(0)
    assert batch.images.shape[0] == len(batch.ids) == 4


@pytest.mark.parametrize("classes_first", [True, False])
def test_the_encoder_is_in_its_place_before_anything_asks_it(shapes: Path, tmp_path: Path, classes_first: bool):
    calls: list[str] = []

    class Watched(tiny.TinyEncoder):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("to")
            return super().to(*args, **kwargs)

        def prototypes(self, classes: Sequence[int], draws: Sequence[int]) -> Tensor:
            calls.append("prototypes")
            return super().prototypes(classes, draws)

        def forward(self, pixels: Tensor) -> Tensor:
            calls.append("forward")
            return super().forward(pixels)

    names = tmp_path / "colours.jsonl"
    names.write_text("".join(json.dumps({"class": n, "names": [c]}) + "\n" for n, c in enumerate(tiny.COLOURS)))
    data = [{"path": str(names), "format": "classes"}, {"path": str(shapes)}]
    encoder = Watched()
    job = assemble(
        data if classes_first else data[::-1],
        dataclasses.replace(tiny.parts(), encoder=lambda: encoder),
        features={"cache": str(tmp_path / "features")},
    )
    job.batches(0)
    assert calls.index("to") == 0
    assert calls.count("to") == 1
    assert {"prototypes", "forward"} <= set(calls)


@pytest.mark.parametrize(
    ("encoder_decoder", "prefix_lm", "cuts"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_captions_are_cut_for_an_encoder_decoder_unless_the_recipe_says_otherwise(
    encoder_decoder: bool, prefix_lm: bool | None, cuts: bool
):
    recipe = parse(tiny.recipe(Path("data"), Path("out"), stage=2, prefix_lm=prefix_lm))
    assert assembly.make_texts(recipe, model_config(recipe), with_language(encoder_decoder)).prefix_lm is cuts


def test_cut_captions_have_no_used_words_to_choose_among(shapes: Path):
    with pytest.raises(ConfigError, match="write vocabulary=all, or prefix_lm=false"):
        assemble(shapes, with_language(True), stage=2, vocabulary="used")
    assemble(shapes, with_language(True), stage=2, vocabulary="used", prefix_lm=False)


def test_a_model_remembers_the_words_that_it_was_trained_to_write(shapes: Path, tmp_path: Path):
    job = assemble(shapes, stage=2, vocabulary="used")
    job.save(tmp_path / "used")
    words = weights.load(tmp_path / "used").vocabulary
    assert words is not None
    assert {tiny.WORDS[word] for word in words} >= {"[SEP]", "red", "circle"}
    assert {tiny.WORDS[word] for word in words}.isdisjoint({"[PAD]", "[UNK]"})

    assemble(shapes, stage=2).save(tmp_path / "all")
    assert weights.load(tmp_path / "all").vocabulary is None


def test_a_transformers_model_says_which_kind_it_is():
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    encoder_decoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    )
    decoder = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    assert TransformersLM(encoder_decoder).encoder_decoder
    assert not TransformersLM(decoder).encoder_decoder


def with_language(encoder_decoder: bool) -> Parts:
    language = tiny.TinyLanguage()
    language.encoder_decoder = encoder_decoder  # type: ignore[assignment]
    return dataclasses.replace(tiny.parts(), language=lambda: (language, tiny.tokenizer()))


def test_a_transformer_computes_in_half_precision_where_the_run_does_and_convolutions_on_a_cpu_do_not():
    attention = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(32, 32))
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Linear(4, 4))
    for encoder, expected in ((attention, torch.bfloat16), (convolutions, torch.float32)):
        frozen = assembly.frozen_encoder(encoder, CPU, torch.bfloat16)
        assert {(p.dtype, p.requires_grad) for p in frozen.parameters()} == {(expected, False)}
    assert next(assembly.frozen_encoder(attention, CPU, torch.float32).parameters()).dtype == torch.float32
