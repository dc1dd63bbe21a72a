"""From a recipe to the values that the loop is handed: bridge, objective, batches, validation, and how to save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from blip2 import image, weights
from blip2.config import Blip2Config, LanguageConfig, PartConfig, VisionConfig
from blip2.data import sources
from blip2.data.sources import Prototype, Sample
from blip2.errors import ConfigError
from blip2.model.bridge import Bridge
from blip2.protocols import ImageEncoder, LanguageModel
from blip2.text import Tokenizer, plain
from blip2.train.data import Batches, Images, Mixture, Pixels, Texts
from blip2.train.distributed import World
from blip2.train.features import FeatureCache, PrototypeFeatures
from blip2.train.log import now_and_then, say
from blip2.train.objectives import LOSSES, Batch, Stage1, Stage2
from blip2.train.recipe import Recipe, Source
from blip2.train.start import begin_projection, model_config, start_bridge
from blip2.train.validation import Validation

if TYPE_CHECKING:
    from blip2.adapters import TextPart

_Part = TypeVar("_Part")
_ENDLESS = 1 << 30  # views of a picture that is cropped anew each time it comes


@dataclass(frozen=True)
class Parts:
    """The frozen parts, each made when it is first asked for.

    Attributes:
        encoder: the image encoder.
        text: what the Q-Former starts from: tokenizer, word embeddings and weights.
        language: the language model and its tokenizer.
        digest: SHA-256 of a named part's weights.
    """

    encoder: Callable[[], ImageEncoder]
    text: Callable[[], TextPart]
    language: Callable[[], tuple[LanguageModel, Tokenizer]]
    digest: Callable[[PartConfig], str]


def named_parts(config: Blip2Config) -> Parts:
    """The parts that a configuration names, from the packages or files that hold them."""
    from blip2 import adapters

    return Parts(
        encoder=cache(lambda: adapters.image_encoder(_named(config.vision, "vision"))),
        text=cache(lambda: adapters.text_part(_named(config.text, "text"))),
        language=cache(lambda: _language(_named(config.language, "language"))),
        digest=cache(adapters.sha256),
    )


@dataclass(frozen=True)
class Job:
    """What a run trains, reads and leaves behind.

    Attributes:
        objective: a batch and a seed in, named losses out; holds the bridge.
        batches: number of a part of a step, counted over the whole run, to this rank's rows of it.
        epoch_steps: steps in which the data come round once.
        validate: metrics of the weights as they are and one score, higher is better; None without held-out data.
        save: writes the model into a directory.
    """

    bridge: Bridge
    objective: nn.Module
    batches: Callable[[int], Batch]
    epoch_steps: int
    validate: Callable[[], tuple[dict[str, float], float]] | None
    save: Callable[[Path], None]


@dataclass(frozen=True)
class Data:
    """One source: its samples and their images."""

    samples: Sequence[Sample]
    images: Images


def assemble(recipe: Recipe, parts: Parts | None, world: World, device: torch.device, half: torch.dtype) -> Job:
    """The values that a recipe describes.

    Args:
        parts: those that the model names where None.
        half: the type that frozen parts have.
    Raises:
        ConfigError: keys that do not go together.
        DataError: data that cannot be read.
        CheckpointError: weights to start from that do not fit.
    """
    config = model_config(recipe)
    if recipe.stage == 2 and config.language is None:
        raise ConfigError("stage 2 needs a language model; name one under model.language")
    if _reads_texts(recipe) and not config.heads:
        raise ConfigError("model.heads: false, and the losses of stage 1 are computed by them; leave it out, or keep=0")
    if (_reads_texts(recipe) or config.question_aware) and recipe.text_length > config.qformer.positions:
        raise ConfigError(
            f"text_length: {recipe.text_length} is more than the Q-Former's text has positions, "
            f"{config.qformer.positions}; lower it, or raise model.qformer.positions"
        )
    rows = recipe.batch_size // recipe.accumulate  # of one part of a step
    if rows % world.size:
        raise ConfigError(f"batch_size: parts of {rows} rows cannot be shared by {world.size} ranks")
    given = parts or named_parts(config)
    parts = dataclasses.replace(given, encoder=cache(lambda: frozen_encoder(given.encoder(), device, half)))
    texts = make_texts(recipe, config, parts)
    data = [read_data(source, recipe, config, parts) for source in recipe.data]
    bridge = start_bridge(recipe, config, parts.text).to(device)
    mixture = Mixture(
        [(each.samples, source.weight) for each, source in zip(data, recipe.data, strict=True)],
        recipe.seed,
        questions=recipe.questions if recipe.stage == 2 else 0.0,
        texts=recipe.texts,
        views=_views(recipe),
    )
    batches = Batches(mixture, [each.images for each in data], texts, rows, rank=world.rank, world=world.size)
    objective = partial(_objective, recipe, parts, bridge, texts, world, device, half)
    validate = None
    if recipe.validate_ is not None:
        held_out = [
            read_data(source, recipe, config, parts, limit=recipe.validate_.limit) for source in recipe.validate_.data
        ]
        validate = Validation(
            bridge, objective([*data, *held_out]), held_out, texts, rows, world, device, questions=mixture.questions
        )
    trained = objective(data)
    vocabulary = trained.vocabulary if isinstance(trained, Stage2) else None
    return Job(
        bridge=bridge,
        objective=trained,
        batches=batches.__getitem__,
        epoch_steps=recipe.epoch_steps or max(1, sum(len(each.samples) for each in data) // recipe.batch_size),
        validate=validate,
        save=lambda place: weights.save(place, _as_trained(config, parts), bridge, vocabulary=vocabulary),
    )


def make_texts(recipe: Recipe, config: Blip2Config, parts: Parts) -> Texts:
    """How captions and questions become ids: for the Q-Former in stage 1, for the language model in stage 2.

    Raises:
        ConfigError: captions are to be cut, and the softmax runs over the words of whole ones.
    """
    language, tokenizer = parts.language() if recipe.stage == 2 else (None, None)
    prefix_lm = recipe.prefix_lm
    if prefix_lm is None:
        prefix_lm = getattr(language, "encoder_decoder", False)
    if prefix_lm and recipe.vocabulary == "used":
        raise ConfigError(
            "vocabulary: this language model is an encoder-decoder, whose captions are cut at random, so that their "
            "words vary; write vocabulary=all, or prefix_lm=false"
        )
    return Texts(
        qformer=parts.text().tokenizer if _reads_texts(recipe) else None,
        language=tokenizer,
        questions=parts.text().tokenizer if config.question_aware and recipe.stage == 2 else None,
        prompts=config.prompts,
        prefix_lm=prefix_lm,
        max_length=recipe.text_length,
    )


def _reads_texts(recipe: Recipe) -> bool:
    """Whether the Q-Former reads captions."""
    return recipe.stage == 1 or recipe.keep > 0


def read_data(
    source: Source,
    recipe: Recipe,
    config: Blip2Config,
    parts: Parts,
    limit: int | None = None,
) -> Data:
    """A source's samples and their images: cached features, class prototypes or pixels.

    Args:
        limit: for held-out data: no more samples than this, evenly taken, and each picture plain.
    Raises:
        DataError: the source cannot be read.
    """
    templates = source.templates or sources.TEMPLATES
    samples = sources.read(
        source.path, source.format, split=source.split, questions=source.questions, templates=templates
    )
    if limit is not None and len(samples) > limit:
        samples = [samples[number * len(samples) // limit] for number in range(limit)]
    encoder = parts.encoder()
    if all(isinstance(sample.image, Prototype) for sample in samples):
        return Data(samples, _prototypes(encoder, samples).patches)
    settings = encoder.image_size, encoder.mean, encoder.std
    transform, augment = image.Transform(*settings), image.RandomView(*settings)
    features = recipe.features
    if features.cache is None:
        return Data(samples, Pixels(samples, transform, augment))
    part = _named(config.vision, "vision")
    views = 1 if limit is not None else features.views
    stored = FeatureCache(
        features.cache,
        encoder,
        f"{part.name} {parts.digest(part)}",
        transform,
        samples,
        views=views,
        augment=augment if views > 1 else None,
        unreadable=features.unreadable,
        progress=now_and_then(f"{source.path}: pictures encoded"),
    )
    if stored.dropped:
        say(f"{source.path}: {len(stored.dropped)} pictures cannot be opened and are left out: {stored.dropped[:3]}")
    return Data(stored.samples, stored.patches)


def _objective(
    recipe: Recipe,
    parts: Parts,
    bridge: Bridge,
    texts: Texts,
    world: World,
    device: torch.device,
    half: torch.dtype,
    data: Sequence[Data],
) -> nn.Module:
    """What is minimised; the softmax runs over the words of the data where the recipe says so."""
    encoder = parts.encoder() if recipe.features.cache is None else None
    scale = 1.0 if recipe.stage == 1 else recipe.keep
    captions = [plain(caption) for each in data for sample in each.samples for caption in sample.captions]
    first = None
    if texts.qformer is not None:
        first = Stage1(
            bridge,
            encoder,
            weights={name: scale * getattr(recipe.losses, name) for name in LOSSES},
            smoothing=recipe.smoothing,
            gather_gradient=recipe.gather_gradient,
            itm_share=recipe.itm_share,
            itg_share=recipe.itg_share,
            itm_hardness=recipe.itm_hardness,
            patch_dropout=recipe.patch_dropout,
            vocabulary=_used(texts.qformer.encode(captions, texts.max_length)) if recipe.vocabulary == "used" else None,
            world=world,
        )
    if recipe.stage == 1:
        assert first is not None  # stage 1 always reads texts
        return first.to(device)
    language, tokenizer = parts.language()
    language = _frozen(language, device, half)
    begin_projection(bridge, language)
    vocabulary = None
    if recipe.vocabulary == "used":
        pairs = [(texts.prompts.caption, caption) for caption in captions]
        for sample in (sample for each in data for sample in each.samples):
            pairs += [(texts.prompts.question.format(question), answer) for question, answer in sample.questions]
        vocabulary = _used([*texts.tokenize(pairs)[1].tolist(), tokenizer.stop_ids])  # an end is learned against others
    stage2 = Stage2(
        bridge,
        language,
        encoder,
        bos=tokenizer.bos,
        world=world,
        keep=first,
        vocabulary=vocabulary,
        patch_dropout=recipe.patch_dropout,
    )
    return stage2.to(device)


def _used(rows: Sequence[Sequence[int]]) -> Tensor:
    """The ids that occur, sorted; -100 is padding."""
    return torch.tensor(sorted({token for row in rows for token in row} - {-100}))


def frozen_encoder(encoder: ImageEncoder, device: torch.device, half: torch.dtype) -> ImageEncoder:
    """The encoder on its device; in half precision unless it is one of convolutions on a CPU, which gains nothing."""
    exact = device.type == "cpu" and isinstance(encoder, nn.Module) and not _mostly_linear(encoder)
    return _frozen(encoder, device, torch.float32 if exact else half)


def _mostly_linear(module: nn.Module) -> bool:
    linear = sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
    return 2 * linear > sum(parameter.numel() for parameter in module.parameters())


def _frozen(part: _Part, device: torch.device, half: torch.dtype) -> _Part:
    """A part that does not train, on its device and in its precision."""
    if isinstance(part, nn.Module):
        part.requires_grad_(False).eval().to(device, half)
    return part


def _prototypes(encoder: Any, samples: list[Sample]) -> PrototypeFeatures:
    """What the encoder's classifier holds classes to look like."""
    if not hasattr(encoder, "prototypes"):
        raise ConfigError("data of format `classes` need an image encoder with a classifier, which this one has not")
    return PrototypeFeatures(encoder.prototypes, encoder.classes, samples)


def _language(part: PartConfig) -> tuple[LanguageModel, Tokenizer]:
    from blip2 import adapters

    language, tokenizer = adapters.language_model(part)
    return cast("LanguageModel", language), tokenizer  # a protocol cannot say that `step` takes what `prefill` gave


def _named(part: PartConfig | VisionConfig | LanguageConfig | None, key: str) -> PartConfig:
    if isinstance(part, PartConfig):
        return part
    raise ConfigError(f"model: training needs a frozen part by name as `{key}`, not {part}")


def _views(recipe: Recipe) -> int:
    """How many views of a picture there are; the first is plain."""
    if recipe.features.cache is not None:
        return recipe.features.views
    return _ENDLESS if recipe.features.augment else 1


def _as_trained(config: Blip2Config, parts: Parts) -> Blip2Config:
    """The configuration with the SHA-256 of each part that somebody else made, and texts read as in training."""
    changes = {
        key: dataclasses.replace(part, sha256=parts.digest(part))
        for key in ("vision", "text", "language")
        if isinstance(part := getattr(config, key), PartConfig)
    }
    return config.replace(plain_texts=True, **changes)
