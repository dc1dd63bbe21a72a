"""LoRA on the language model: it begins as nothing, is all of the model that learns, and is merged to be used."""

import copy
import json
import sys
from pathlib import Path

import fine
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import blip2
from blip2.adapters.transformers_lm import TransformersLM
from blip2.errors import CheckpointError, ConfigError, MissingExtraError
from blip2.train.lora import inject
from blip2.train.sections import LoRA
from blip2.weights import adapter, load
from blip2.weights.convert import convert
from blip2.weights.verify import verify

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # W x + s B (A x) against (W + s B A) x, in float32
LORA = {"lora": {"rank": 3, "alpha": 6}}


@pytest.fixture(scope="module")
def trained(data: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose adapter has learned something."""
    return fine.run(data, start, tmp_path_factory.mktemp("trained") / "run", steps=10, lr=1e-2, **LORA).model


def prefix(model: blip2.Blip2) -> tuple[torch.Tensor, ...]:
    """Something to go on from, and targets."""
    draw = torch.Generator().manual_seed(3)
    targets = torch.randint(4, 60, (2, 3), generator=draw)
    return torch.randn(2, 5, model.language.width, generator=draw), torch.tensor([5, 4]), targets


def test_it_begins_as_nothing_at_all(start: Path):
    model = fine.load(start)
    given = prefix(model)
    with torch.no_grad():  # with gradients attention is spelt out, and sums run in another order
        before = model.language.log_probs(*given)
        made = inject(model.language, LoRA(rank=2))
        torch.testing.assert_close(model.language.log_probs(*given), before, rtol=0, atol=0)
    open_ones = {name for name, parameter in model.language.named_parameters() if parameter.requires_grad}
    assert open_ones == {f"{name}.default.weight" for name in made.layers()}
    assert {parameter.dtype for part in made.layers().values() for parameter in part.parameters()} == {torch.float32}
    assert not any("head" in name for name in made.changed)


def test_training_changes_the_bridge_and_the_adapter_and_nothing_of_the_base(start: Path, trained: Path):
    base, model = fine.load(start), fine.load(trained)
    assert {path.name for path in trained.iterdir()} == {"README.md", "adapter", "bridge.safetensors", "config.json"}
    assert fine.changed(fine.weights(base.encoder), fine.weights(model.encoder)) == set()
    changed = fine.changed(fine.weights(base.language), fine.weights(model.language))
    layers = load(trained).config.adapter
    assert len(changed) == layers > 0
    assert all(name.endswith(".weight") and "norm" not in name and "words" not in name for name in changed)
    state = load_file(trained / "adapter" / adapter.WEIGHTS)
    assert len(state) == 2 * layers
    assert all(tensor.any() for tensor in state.values()), "every matrix has learned"


def test_merged_it_computes_what_it_computed_beside_the_weights_and_what_peft_makes_of_it(start: Path, trained: Path):
    merged, base = fine.load(trained), fine.load(start)
    given = prefix(merged)
    theirs = peft.PeftModel.from_pretrained(base.language, trained / "adapter")
    assert type(theirs) is peft.PeftModel
    torch.testing.assert_close(merged.language.log_probs(*given), base.language.log_probs(*given), **CLOSE)
    folded = theirs.merge_and_unload().state_dict()
    for name, weight in merged.language.state_dict().items():
        torch.testing.assert_close(folded[name], weight, **CLOSE)
    assert type(merged.language) is type(fine.load(start).language), "it decodes as fast as ever"


def test_it_learns_more_than_the_bridge_alone(data: Path, start: Path, tmp_path: Path):
    settings = {"steps": 20, "lr": 1e-2}
    alone = fine.run(data, start, tmp_path / "alone", train=["language_projection.*"], **settings)
    both = fine.run(data, start, tmp_path / "both", train=["language_projection.*", "language.*"], **settings, **LORA)
    assert both.last["lm"] < alone.last["lm"]
    assert both.first["lm"] < alone.first["lm"] + 0.1


def test_a_run_that_goes_on_from_it_takes_the_adapter_along_and_a_second_one_is_refused(
    data: Path, trained: Path, tmp_path: Path
):
    still = {"steps": 1, "lr": 1e-30, "clip": None}
    report = fine.run(data, trained, tmp_path / "next", **still)
    assert load(report.model).config.adapter == load(trained).config.adapter
    for found, expected in zip(fine.said(fine.load(report.model)), fine.said(fine.load(trained)), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match=r"lora: the language model of .* has an adapter already"):
        fine.run(data, trained, tmp_path / "second", **LORA)
    fine.load(trained).save(tmp_path / "whole")
    assert load(tmp_path / "whole").config.adapter == 0
    assert fine.said(fine.load(tmp_path / "whole")) == fine.said(fine.load(trained))
    assert fine.run(data, tmp_path / "whole", tmp_path / "second", **LORA).steps == 2


def test_it_is_exported_merged_and_transformers_computes_the_same(trained: Path, tmp_path: Path):
    convert(trained, tmp_path / "theirs", "transformers")
    ours, again = fine.load(trained), fine.load(tmp_path / "theirs")
    assert fine.changed(fine.weights(ours.language), fine.weights(again.language)) == set()
    for found, expected in zip(fine.said(again), fine.said(ours), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    lines = verify(str(tmp_path / "theirs"), prompts=("", "w9"))
    assert [line.what for line in lines if not line.equal] == []


def test_coarse_weights_are_made_of_what_was_merged(trained: Path):
    coarse = blip2.load(trained, device="cpu", dtype="float32", quantize="int8")
    exact = fine.load(trained)
    given = prefix(exact)
    with torch.inference_mode():
        near = coarse.language.log_probs(*given) - exact.language.log_probs(*given)
    assert near.abs().max() < 0.3, "int8 of weights of this size"


def test_a_damaged_or_foreign_adapter_is_named(trained: Path, tmp_path: Path):
    model = fine.load(trained)
    config = json.loads((trained / "adapter" / adapter.CONFIG).read_text())
    state = load_file(trained / "adapter" / adapter.WEIGHTS)
    name = next(iter(state)).removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
    count = len(state) // 2
    cases = [
        ({"use_dora": True}, {}, "use_dora is True: only plain LoRA"),
        ({"bias": "all"}, {}, "bias is 'all'"),
        ({"rank_pattern": {"a": 2}}, {}, "rank_pattern"),
        ({"r": 0}, {}, "r is 0"),
        ({"lora_alpha": "much"}, {}, "lora_alpha is 'much'"),
        ({"peft_type": "IA3"}, {}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, {}, "init_lora_weights is 'pissa'"),
        ({}, {f"{name}.lora_A.weight": None}, "no whole adapter"),
        ({}, {f"{name}.lora_A.weight": torch.zeros(3, 7)}, r"times \[3, 7\] is not"),
        ({}, {"base_model.model.words.lora_A.weight": torch.zeros(1, 1)}, "no whole adapter"),
    ]
    for number, (keys, tensors, message) in enumerate(cases):
        folder = tmp_path / str(number) / "adapter"
        folder.mkdir(parents=True)
        (folder / adapter.CONFIG).write_text(json.dumps(config | keys))
        kept = {key: tensor for key, tensor in (state | tensors).items() if tensor is not None}
        save_file(kept, folder / adapter.WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            adapter.merge(model.language, folder.parent, count)
    with pytest.raises(CheckpointError, match=rf"changes {count} layers, the model's configuration says 1"):
        adapter.merge(model.language, trained, 1)
    with pytest.raises(CheckpointError, match="adapter_config"):
        adapter.merge(model.language, tmp_path / "nowhere", count)


def test_targets_that_fit_nothing_stage_one_and_a_missing_peft_are_refused(
    data: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=r"lora\.targets: '\*\.q_proj' fits no linear layer; they are called like"):
        fine.run(data, start, tmp_path / "run", lora={"targets": ["*.q_proj"]})
    with pytest.raises(ConfigError, match="lora: stage 1 has no language model"):
        fine.run(data, start, tmp_path / "run", stage=1, **LORA)
    only = fine.load(start)
    made = inject(only.language, LoRA(targets=("*.qkv",)))
    assert made.changed
    assert all(name.endswith(".qkv") for name in made.changed)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r'pip install "blip2\[peft\]"'):
        fine.run(data, start, tmp_path / "run", **LORA)


def test_a_model_of_transformers_takes_an_adapter_under_its_own_names(tmp_path: Path):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=61, num_key_value_heads=2, **small)
    theirs = transformers.LlamaForCausalLM(config).eval()
    before = copy.deepcopy(theirs)
    language = TransformersLM(theirs)
    made = inject(language, LoRA(rank=2, targets=("*.q_proj", "*.down_proj")))
    assert made.changed == ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
    with torch.no_grad():
        for layer in made.layers().values():
            layer.default.weight.normal_()
    made.save(tmp_path / adapter.FOLDER)
    draw = torch.Generator().manual_seed(3)
    given = torch.randn(2, 5, 16, generator=draw), torch.tensor([5, 4]), torch.randint(4, 60, (2, 3), generator=draw)
    expected = language.log_probs(*given)
    merged = TransformersLM(copy.deepcopy(before))
    adapter.merge(merged, tmp_path, 2)
    torch.testing.assert_close(merged.log_probs(*given), expected, **CLOSE)
    loaded = TransformersLM(peft.PeftModel.from_pretrained(before, tmp_path / adapter.FOLDER).merge_and_unload())
    torch.testing.assert_close(loaded.log_probs(*given), expected, **CLOSE)
