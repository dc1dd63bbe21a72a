"""A training run as data: one YAML file, every key checked, nothing left over.

A key that the recipe does not have is an error that names the nearest one it has. What a recipe leaves out comes from
its preset: `paper` follows the paper, `reference` the public code where the two differ (`PRESETS` lists how).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from blip2.errors import ConfigError
from blip2.train.sections import Features, LoRA, Losses, Reward, Section, Sources, Validate, Vision

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "betas": (0.9, 0.98),
        "schedule": "step",
        "warmup_from": 0.0,
        "gather_gradient": True,
        "decay_temperature": False,
    },
    "reference": {
        "betas": (0.9, 0.999),
        "schedule": "epoch",
        "warmup_from": 1e-6,
        "gather_gradient": False,
        "decay_temperature": True,
    },
}
WARMUP = {("paper", 1): 2000, ("paper", 2): 2000, ("reference", 1): 5000, ("reference", 2): 2000}
MIN_LR = {("paper", 1): 0.0, ("paper", 2): 0.5, ("reference", 1): 0.1, ("reference", 2): 0.1}  # of `lr`
WARMUP_SHARE = 10  # a short run warms up over a tenth of its steps at most

_ELSEWHERE = {  # what other trainers call our keys
    "learning_rate": "lr",
    "max_lr": "lr",
    "init_lr": "lr",
    "epochs": "steps",
    "max_steps": "steps",
    "iterations": "steps",
    "batch": "batch_size",
    "grad_accum": "accumulate",
    "gradient_accumulation_steps": "accumulate",
    "warmup_steps": "warmup",
    "wd": "weight_decay",
    "max_grad_norm": "clip",
    "output_dir": "output",
    "out": "output",
    "checkpoint": "start",
    "pretrained": "start",
    "dtype": "precision",
    "num_workers": "workers",
}


def _features(value: Any) -> Any:
    return {} if value == "online" else value


class Recipe(Section):
    """A whole run.

    Attributes:
        stage: 1 (contrast, matching, image-grounded text) or 2 (the language model writes).
        output: folder of the run: its log, checkpoints, report and, at the end, the model.
        data: what is learned from: a path, or sources with their weights.
        steps: updates of the weights.
        preset: where defaults come from: the `paper`, or its public code where that differs (`reference`).
        model: a name of `config.PRESETS`, or a mapping: `preset` and what differs from it; without a preset, or left
            out, what differs from the model of `start`.
        start: what this run goes on from: the folder of an earlier run or of a model, our own or as transformers
            writes it; OWNER/NAME of one on the hub; `mini` is the model that comes with the package.
        seed: of every random draw; the same seed gives the same run.
        batch_size: pairs of one update, over all ranks and accumulated parts.
        accumulate: parts that a batch is computed in, each with its own contrast and gradient; they add up.
        lr, min_lr, warmup, warmup_from, schedule, epoch_steps: linear from `warmup_from` to `lr` in `warmup` steps,
            then a cosine to `min_lr`, updated each `step`, or each `epoch` of `epoch_steps` (all of the data once where
            left out).
        betas, weight_decay: of AdamW.
        clip: largest norm of the gradient; None for no limit, as published.
        decay_temperature: whether weight decay pulls at the contrastive temperature too.
        lr_scale: factors on the learning rate by pattern of parameter name, `*` as in file names; the first that fits.
        train: patterns of the parameters that are trained; those of the image encoder are called `vision.*`, of the
            language model's adapter `language.*`.
        vision: training of the image encoder.
        lora: low-rank changes of the language model in stage 2; it stays as it is where None.
        start_share: how much of the weights that `start` brought comes back into those that are validated and saved, by
            pattern as `lr_scale`: what was learned before fades less (WiSE-FT, Wortsman et al. 2022). A language
            projection that begins anew wants 0.
        ema: decay of a running average of the weights, which is then what is validated and saved; None for none.
        precision: of the forward pass: `auto` takes 16 bits where the device computes them itself; weights stay
            float32.
        device: `auto`, `cpu`, `cuda`; under `torchrun` each process takes its own.
        features: of the frozen image encoder: `{cache: FOLDER}` computes them once, `online` anew each time.
        workers: threads that read ahead.
        text_length: most tokens of a text, cut on the right.
        vocabulary: the words that a softmax runs over: `used` in the training texts, or `all`.
        smoothing: label smoothing of ITC and ITG.
        likeness: share of ITC's target that goes to texts of other pictures, by how alike the text encoder finds them
            that the Q-Former starts from, in place of ITC's `smoothing`: pictures then lie near names that were never
            trained on. Not of the paper, where it is 0. For one that makes sentence vectors, such as mini's MiniLM.
        losses: weights of stage 1's losses.
        itm_share, itg_share: share of the rows that ITM and ITG learn from; 1 as published. Each rank takes the first
            of its own rows, so unless both are 1 several ranks learn from other pairs than one process would.
        itm_hardness: how much likelier ITM draws a similar wrong partner: 1 as published, 0 draws evenly. A small
            model that learns from few pairs starts better in between.
        patch_dropout: share of each picture's patches that a step does not see, so that few pictures are not learned
            by heart.
        gather_gradient: ITC's gradient crosses ranks.
        texts: how many captions and questions of each picture stage 2 learns from at once; the picture is read once
            for all of them, which costs far less than as many pictures.
        questions: share of the texts of stage 2 that are question and answer, where the data have both.
        prefix_lm: a caption is cut at random, the language model reads the first words and writes the rest: the
            paper's way with encoder-decoders, and what happens to these where the key is left out.
        keep: weight at which the stage-1 losses go on in stage 2; 0 as in the paper.
        lm_share: share of the rows that the language model learns from: the first of each rank's part of a step,
            rounded up. The others are read for `keep` alone, whose contrast wants many pictures and costs little.
        reward: captions that the model itself writes are judged too, in stage 2; None as in the paper.
        validate: held-out data, looked at while training.
        save_every, log_every: steps from one checkpoint, and from one line of the log, to the next.
        resume: go on where the output folder stands; False starts it over.
    """

    stage: Literal[1, 2]
    output: Path
    data: Sources
    steps: int = Field(ge=1)
    preset: Literal["paper", "reference"] = "paper"
    model: str | dict[str, Any] | None = None
    start: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    batch_size: int = Field(default=128, ge=2)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    min_lr: float = Field(ge=0)
    warmup: int = Field(ge=0)
    warmup_from: float = Field(ge=0)
    schedule: Literal["step", "epoch"]
    epoch_steps: int | None = Field(default=None, ge=1)
    betas: tuple[float, float]
    weight_decay: float = Field(default=0.05, ge=0)
    decay_temperature: bool
    clip: float | None = Field(default=None, gt=0)
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    train: tuple[str, ...] = ("*",)
    vision: Vision = Vision()
    lora: LoRA | None = None
    start_share: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    ema: float | None = Field(default=None, gt=0, lt=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    features: Annotated[Features, BeforeValidator(_features)] = Features()
    workers: int = Field(default=2, ge=0)
    text_length: int = Field(default=32, ge=3)
    vocabulary: Literal["used", "all"] = "all"
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    likeness: float = Field(default=0.0, ge=0, lt=1)
    losses: Losses = Losses()
    itm_share: float = Field(default=1.0, gt=0, le=1)
    itg_share: float = Field(default=1.0, gt=0, le=1)
    itm_hardness: float = Field(default=1.0, ge=0, le=1)
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    gather_gradient: bool
    texts: int = Field(default=1, ge=1)
    questions: float = Field(default=0.0, ge=0, le=1)
    prefix_lm: bool | None = None
    keep: float = Field(default=0.0, ge=0)
    lm_share: float = Field(default=1.0, gt=0, le=1)
    reward: Reward | None = None
    validate_: Validate | None = Field(default=None, alias="validate")
    save_every: int = Field(default=500, ge=1)
    log_every: int = Field(default=10, ge=1)
    resume: bool = True

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        """What the recipe leaves out, from its preset; unknown presets and stages are the fields' to refuse."""
        if not isinstance(values, Mapping):
            return values
        name, stage = values.get("preset", "paper"), values.get("stage")
        filled = {**PRESETS.get(str(name), PRESETS["paper"]), **values}
        kind = (str(name) if name in PRESETS else "paper", 2 if stage == 2 else 1)
        if isinstance(values.get("steps"), int):
            filled.setdefault("warmup", min(WARMUP[kind], values["steps"] // WARMUP_SHARE))
        filled.setdefault("warmup", WARMUP[kind])
        try:
            filled.setdefault("min_lr", MIN_LR[kind] * float(values.get("lr", 1e-4)))
        except (TypeError, ValueError):  # `lr` is no number, which is its field's to say
            filled.setdefault("min_lr", 0.0)
        return filled

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for key, bound, limit in (("min_lr", "lr", self.lr), ("warmup", "steps", self.steps)):
            if getattr(self, key) > limit:
                raise ValueError(f"{key}: {getattr(self, key)} is more than {bound}, {limit}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: batch_size {self.batch_size} does not divide by {self.accumulate}")
        if self.prefix_lm and self.vocabulary == "used":
            raise ValueError("vocabulary: with prefix_lm it must be all, since the words of a cut caption vary")
        if self.stage == 1 and not any((self.losses.itc, self.losses.itm, self.losses.itg)):
            raise ValueError("losses: all are 0, and stage 1 learns from nothing else")
        if self.vision.train and self.features.cache is not None:
            raise ValueError(
                "features.cache: the image encoder is trained, so that its features change with every step; leave the "
                "cache out, or vision.train"
            )
        if self.lora is not None and self.stage == 1:
            raise ValueError("lora: stage 1 has no language model; train it in stage 2")
        if self.reward is not None and self.stage == 1:
            raise ValueError("reward: stage 1 has no language model that could write; it is for stage 2")
        if self.lm_share < 1 and (self.stage == 1 or not self.keep):
            raise ValueError("lm_share: rows that the language model does not learn from are for `keep` in stage 2")
        if self.start_share and self.start is None:
            raise ValueError("start_share: there is no `start` whose weights could come back; leave it out")
        if self.model is None and self.start is None:
            raise ValueError("model: is missing; name a preset, or an earlier run as `start`")
        return self

    def values(self) -> dict[str, Any]:
        """Every key as plain data, for files and comparison; `Recipe` reads it back equal."""
        return self.model_dump(mode="json", by_alias=True)

    def learning_rate(self, step: int, epoch_steps: int) -> float:
        """The rate of the update that makes step `step` (from 0) into the next.

        Args:
            epoch_steps: steps that one epoch takes, read where `schedule` is `epoch`.
        Source: BLIP-2, section 3.4; the `epoch` schedule warms up in epoch 0 only, as the public code does.
        """
        if self.schedule == "epoch" and step >= epoch_steps:
            done = (step // epoch_steps) / -(-self.steps // epoch_steps)
        elif self.schedule == "epoch" or step < self.warmup:
            ramp = min(1.0, (step + 1) / max(self.warmup, 1))
            return self.warmup_from + (self.lr - self.warmup_from) * ramp
        else:
            done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * done)) / 2


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file.

    Args:
        overrides: `key=value`, dots between the keys of sections (`features.views=4`, `data.0.weight=0.5`); a value is
            read as YAML.
    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown or its value is of the wrong kind.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a recipe is a list of `key: value` lines")
    for override in overrides:
        _override(values, override)
    return parse(values, str(path))


def parse(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """A recipe from plain data; `source` names it in errors.

    Raises:
        ConfigError: as for `read`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(_explain(error))}") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys, with both values, in which a run cannot go on under another recipe: `lr: 0.0001, now 0.0002`."""
    free = {"output", "device", "workers", "save_every", "log_every", "resume"}  # they change no number of the run
    keys = sorted((old.keys() | new.keys()) - free)
    return [f"{key}: {old.get(key)}, now {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"{override!r} is no override: write key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is not YAML; quote it") from None
    *sections, last = path.split(".")
    place: Any = values
    for key in sections:
        if isinstance(place, dict) and key == "model" and isinstance(place.get(key), str):
            place[key] = {"preset": place[key]}
        try:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        except (ValueError, IndexError, AttributeError):
            raise ConfigError(f"{override!r}: the recipe has no {key!r} there") from None
    try:
        place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, TypeError):
        raise ConfigError(f"{override!r}: the recipe has no {last!r} there") from None


def _explain(error: ValidationError) -> Iterator[str]:
    """One line for each thing that is wrong, with the key in it."""
    for problem in error.errors():
        location = problem["loc"]
        key = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            yield f"unknown key {key!r}{nearest(str(location[-1]), _known(location))}"
        elif problem["type"] == "missing":
            yield f"{key!r} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            yield f"{key}: {message}, not {problem['input']!r}" if location else message


def _known(location: Sequence[int | str]) -> list[str]:
    """The keys of the section that a location lies in."""
    section: type[Section] = Recipe
    for part in location[:-1]:
        field = next((f for name, f in section.model_fields.items() if part in (name, f.alias)), None)
        inner = _sections(field.annotation) if field else ()
        section = next(iter(inner), section)
    return [field.alias or name for name, field in section.model_fields.items()]


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def nearest(key: str, known: Iterable[str]) -> str:
    """` (did you mean 'KEY'?)`, or nothing where none is close."""
    known = list(known)
    close = [_ELSEWHERE[key]] if _ELSEWHERE.get(key) in known else difflib.get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
