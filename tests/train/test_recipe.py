"""Recipes: what they take, what they refuse and how they say so, and the learning rate that they describe."""

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from blip2.cli.train import find_recipe
from blip2.config import PRESETS
from blip2.errors import ConfigError
from blip2.train.loop import train
from blip2.train.recipe import Recipe, differences, parse, read
from blip2.train.start import model_config

EXAMPLES = Path(__file__).parents[2] / "examples" / "mini"
SHORT = {"stage": 1, "output": "runs/one", "model": "mini", "data": "photos.csv", "steps": 1000}
TEN_LINES = """\
stage: 1
output: {output}
model: {model}
data: {data}
steps: 3
batch_size: 8
lr: 1e-4
text_length: 16
"""


def test_a_folder_of_images_and_a_csv_of_captions_train_with_ten_lines(tmp_path: Path):
    data = tiny.draw_shapes(tmp_path / "pictures", 16, seed=0)
    text = TEN_LINES.format(output=tmp_path / "run", model=tiny.model(), data=data)
    assert len(text.splitlines()) <= 10
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    report = train(read(file, ["device=cpu"]), tiny.parts())
    assert report.steps == 3
    assert (tmp_path / "run" / "model" / "bridge.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmupp": 10}, "unknown key 'warmupp' (did you mean 'warmup'?)"),
        ({"learning_rate": 1}, "unknown key 'learning_rate' (did you mean 'lr'?)"),
        ({"features": {"veiws": 4}}, "unknown key 'features.veiws' (did you mean 'views'?)"),
        ({"data": [{"path": "a.csv", "wieght": 1}]}, "unknown key 'data.0.wieght' (did you mean 'weight'?)"),
        ({"validate": {"data": "a.csv", "evry": 5}}, "unknown key 'validate.evry' (did you mean 'every'?)"),
        ({"zzz": 1}, "unknown key 'zzz'"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"stage": 3}, "stage: Input should be 1 or 2, not 3"),
        ({"batch_size": 10, "accumulate": 4}, "accumulate: batch_size 10 does not divide by 4"),
        ({"min_lr": 1.0}, "min_lr: 1.0 is more than lr"),
        ({"warmup": 2000}, "warmup: 2000 is more than steps"),
        ({"data": []}, "data: "),
        ({"prefix_lm": True, "vocabulary": "used"}, "vocabulary: with prefix_lm"),
        ({"model": None}, "model: is missing"),
        ({"lr_scale": {"*": -1}}, "lr_scale.*: Input should be greater than 0"),
        ({"stage": 1, "keep": 1.0, "lm_share": 0.5}, "lm_share: rows that the language model does not learn from"),
        ({"stage": 1, "reward": {}}, "reward: stage 1 has no language model"),
        ({"stage": 2, "reward": {"samples": 1}}, "reward.samples: Input should be greater than or equal to 2"),
        ({"stage": 2, "lm_share": 0.5}, "lm_share: rows that the language model does not learn from"),
    ],
)
def test_a_wrong_key_or_value_is_an_error_that_names_it(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError) as error:
        parse(SHORT | changes, "mine.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("mine.yaml: ")


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match="'data' is missing"):
        parse({key: value for key, value in SHORT.items() if key != "data"})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("minni", "no preset 'minni' (did you mean 'mini'?)"),
        ({"preset": "mini", "qformr": {}}, "unknown key 'qformr' (did you mean 'qformer'?)"),
        (
            {"preset": "mini", "qformer": {"querys": 16}},
            "model.qformer: unknown key 'querys' (did you mean 'queries'?)",
        ),
        ({"preset": "mini", "qformer": {"queries": "x"}}, "qformer.queries"),
    ],
)
def test_a_wrong_model_is_an_error_that_names_it(model: object, message: str):
    with pytest.raises(ConfigError) as error:
        model_config(parse(SHORT | {"model": model}))
    assert message in str(error.value)


def test_a_model_is_a_preset_and_its_differences():
    config = model_config(parse(SHORT | {"model": {"preset": "mini", "qformer": {"queries": 16}}}))
    assert config.qformer.queries == 16
    assert config.vision == PRESETS["mini"].vision
    other = model_config(parse(SHORT | {"model": {"preset": "mini", "vision": {"image_size": 64, "layers": 2}}}))
    assert other.vision != config.vision


def test_overrides_reach_into_sections_and_are_checked_likewise(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("stage: 1\noutput: out\nmodel: mini\ndata: [{path: a.csv}, {path: b.csv}]\nsteps: 10\n")
    recipe = read(file, ["features.views=4", "data.1.weight=0.5", "lr=3e-4", "model.qformer.queries=8", "resume=false"])
    assert (recipe.features.views, recipe.data[1].weight, recipe.lr, recipe.resume) == (4, 0.5, 3e-4, False)
    assert model_config(recipe).qformer.queries == 8
    for wrong in ("features.veiws=4", "data.7.weight=1", "lr", "steps.more=1", "data.x=1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0].split(".")[-1]):
            read(file, [wrong])


@pytest.mark.parametrize("text", ["stage: [", "just words", "- a\n- b"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        read(tmp_path / "none.yaml")


def test_presets_differ_where_the_paper_and_the_public_code_do():
    paper, reference = (parse(SHORT | {"steps": 100_000, "preset": name}) for name in ("paper", "reference"))
    assert (paper.betas, reference.betas) == ((0.9, 0.98), (0.9, 0.999))
    assert (paper.warmup, reference.warmup) == (2000, 5000)
    assert (paper.gather_gradient, reference.gather_gradient) == (True, False)
    assert (paper.decay_temperature, reference.decay_temperature) == (False, True)
    assert (paper.schedule, reference.schedule) == ("step", "epoch")
    assert (paper.min_lr, reference.min_lr) == (0.0, pytest.approx(1e-5))
    assert parse(SHORT | {"stage": 2}).min_lr == pytest.approx(5e-5)
    assert parse(SHORT | {"preset": "reference", "betas": [0.9, 0.95]}).betas == (0.9, 0.95)


@given(
    steps=st.integers(2, 5000),
    share=st.floats(0, 1),
    preset=st.sampled_from(["paper", "reference"]),
    epoch=st.integers(1, 500),
    stage=st.sampled_from([1, 2]),
)
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(steps: int, share: float, preset: str, epoch: int, stage: int):
    warmup = int(share * steps)
    recipe = parse(SHORT | {"steps": steps, "warmup": warmup, "preset": preset, "stage": stage})
    rates = [recipe.learning_rate(step, epoch) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(a <= b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))
    assert min(recipe.min_lr, recipe.warmup_from) <= min(rates)
    assert max(rates) <= recipe.lr * (1 + 1e-9)
    if preset == "paper" and 0 < warmup < steps:
        assert rates[warmup - 1] == pytest.approx(recipe.lr)


def test_the_reference_schedule_warms_up_in_the_first_epoch_only_and_then_goes_by_epochs():
    recipe = parse(SHORT | {"preset": "reference", "steps": 1000, "warmup": 500, "lr": 1e-3, "min_lr": 0.0})
    rates = [recipe.learning_rate(step, 100) for step in range(1000)]
    assert rates[99] == pytest.approx(1e-6 + (1e-3 - 1e-6) * 100 / 500)  # cut short
    assert rates[100] == pytest.approx(1e-3 * (1 + 0.9510565) / 2)  # and a jump, as in the public code
    assert len(set(rates[100:200])) == 1


def test_a_recipe_is_read_back_equal_from_its_values():
    recipe = parse(SHORT | {"validate": {"data": "v.csv"}, "lr_scale": {"qformer.*": 0.5}, "features": "online"})
    assert parse(recipe.values()) == recipe
    assert differences(recipe.values(), recipe.values()) == []


def test_only_keys_that_change_no_number_may_change_between_sittings():
    old = parse(SHORT).values()
    assert differences(old, parse(SHORT | {"workers": 7, "log_every": 3, "output": "moved"}).values()) == []
    assert differences(old, parse(SHORT | {"lr": 2e-4, "min_lr": 0}).values()) == ["lr: 0.0001, now 0.0002"]


@pytest.mark.parametrize("file", sorted(find_recipe("own-stage1").parent.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_in_the_package_is_valid(file: Path):
    recipe = read(file)
    assert find_recipe(file.stem) == file
    assert isinstance(recipe, Recipe)
    assert recipe.start or model_config(recipe)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("finetune-*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_that_fine_tune_mini_are_valid_and_say_what_differs_from_it(file: Path):
    recipe = read(file)
    assert 10 <= len(file.read_text().splitlines()) <= 23
    config, mini = model_config(recipe), model_config(read(file, ["model=null"]))
    assert config.replace(question_aware=mini.question_aware, prompts=mini.prompts, qformer=mini.qformer) == mini
