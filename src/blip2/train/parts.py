"""From a recipe to the values that the loop is handed: bridge, objective, batches, validation, and how to save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from blip2.adapters.narrowed import Narrowed
from blip2.config import Blip2Config, LanguageConfig, PartConfig, VisionConfig
from blip2.data.sources import Sample
from blip2.errors import ConfigError
from blip2.model.bridge import Bridge
from blip2.model.t5 import T5
from blip2.model.vision import VisionTransformer
from blip2.protocols import ImageEncoder, LanguageModel
from blip2.text import Tokenizer, plain
from blip2.train.data import Texts
from blip2.train.distributed import World
from blip2.train.likeness import Likeness
from blip2.train.lora import inject
from blip2.train.objectives import LOSSES, Batch, Stage1, Stage2
from blip2.train.pictures import Data, make_batches, read_data
from blip2.train.recipe import Recipe
from blip2.train.reward import self_critical
from blip2.train.saving import Outcome
from blip2.train.sections import Reward
from blip2.train.start import (
    Start,
    begin_projection,
    check_encoder,
    earlier_words,
    find_start,
    model_config,
    open_start,
    start_bridge,
)
from blip2.train.trained import Trained
from blip2.train.validation import Validation
from blip2.weights.skeleton import skeleton

if TYPE_CHECKING:
    from blip2.adapters import TextPart
    from blip2.blip2 import Blip2

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Parts:
    """The frozen parts, each made when it is first asked for.

    Attributes:
        encoder: the image encoder.
        text: what the Q-Former starts from: tokenizer, word embeddings and weights.
        language: the language model and its tokenizer.
        digest: SHA-256 of a named part's files.
    """

    encoder: Callable[[], ImageEncoder]
    text: Callable[[], TextPart]
    language: Callable[[], tuple[LanguageModel, Tokenizer]]
    digest: Callable[[PartConfig], str]


def named_parts(config: Blip2Config, model: Blip2 | None = None) -> Parts:
    """The parts that a configuration names, from the packages or files that hold them.

    Args:
        model: what training starts from, where it was loaded whole: parts of our own kind are its.
    """
    from blip2 import adapters

    return Parts(
        encoder=cache(lambda: _vision(config, model)),
        text=cache(lambda: _text(config, model)),
        language=cache(lambda: _language(config, model)),
        digest=cache(adapters.sha256),
    )


def settled(parts: Parts, recipe: Recipe, device: torch.device, half: torch.dtype, *, exact: bool) -> Parts:
    """The same, frozen and in half precision on their device; the image encoder exact and open where it is trained.

    Args:
        exact: keep the image encoder in float32.
    Raises:
        ConfigError: the image encoder is to be trained, and is none of ours.
    """

    def encoder() -> ImageEncoder:
        made = parts.encoder()
        if not recipe.vision.train:
            return frozen_encoder(made, device, torch.float32 if exact else half)
        if not isinstance(made, VisionTransformer):
            raise ConfigError(
                f"vision.train: {type(made).__name__} is another's and stays frozen; only a ViT of our own is trained, "
                "that of a published model for one"
            )
        made.recompute = recipe.vision.recompute
        return made.to(device, torch.float32).requires_grad_(True)

    def language() -> tuple[LanguageModel, Tokenizer]:
        made, tokenizer = parts.language()
        return _frozen(made, device, half), tokenizer

    return Parts(cache(encoder), parts.text, cache(language), parts.digest)


@dataclass(frozen=True)
class Job:
    """What a run trains, reads and leaves behind.

    Attributes:
        trained: every parameter that changes, by the name that recipes and checkpoints know it under.
        objective: a batch and a seed in, named losses out; holds the bridge.
        batches: number of a part of a step, counted over the whole run, to this rank's rows of it.
        epoch_steps: steps in which the data come round once.
        validate: metrics of the weights as they are and one score, higher is better; None without held-out data.
        save: writes the model into a directory.
    """

    trained: nn.Module
    objective: nn.Module
    batches: Callable[[int], Batch]
    epoch_steps: int
    validate: Callable[[], tuple[dict[str, float], float]] | None
    save: Callable[[Path], None]


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
    config, start = model_config(recipe), find_start(recipe)
    check_model(recipe, config, start)
    rows = recipe.batch_size // recipe.accumulate  # of one part of a step
    if rows % world.size:
        raise ConfigError(f"batch_size: parts of {rows} rows cannot be shared by {world.size} ranks")
    exact = recipe.vision.train or (start is not None and start.holds_vision)  # the image encoder, which is saved
    model = None
    if parts is None and start is not None and start.whole:
        model = open_start(start, config, torch.float32 if exact else half)
    parts = settled(parts or named_parts(config, model), recipe, device, half, exact=exact)
    if start is not None:
        check_encoder(start, config, parts.digest)
    texts = make_texts(recipe, config, parts)
    data = [read_data(source, recipe, config, parts.encoder(), parts.digest) for source in recipe.data]
    bridge = start_bridge(config, start, model, parts.text).to(device)
    batches = make_batches(recipe, data, texts, rows, world)
    lora = None if recipe.lora is None else inject(parts.language()[0], recipe.lora)
    written = earlier_words(start)
    likeness = Likeness(config.qformer, parts.text().weights, recipe.likeness) if recipe.likeness else None
    objective = partial(_objective, recipe, parts, bridge, texts, written, likeness, world, device)
    validate = None
    if recipe.validate_ is not None:
        held_out = [
            read_data(source, recipe, config, parts.encoder(), parts.digest, recipe.validate_.limit)
            for source in recipe.validate_.data
        ]
        validate = Validation(
            bridge,
            objective([*data, *held_out]),
            held_out,
            texts,
            rows,
            world,
            device,
            questions=batches.mixture.questions,
        )
    minimised = objective(data, recipe.reward)
    vision = cast("nn.Module", parts.encoder()) if recipe.vision.train else None
    kept = parts.encoder() if start is not None and start.holds_vision else None  # comes along with the start's files
    vocabulary = minimised.vocabulary if isinstance(minimised, Stage2) else written
    saved = vision or cast("nn.Module | None", kept)
    return Job(
        trained=Trained(bridge, vision, lora.layers() if lora else None),
        objective=minimised,
        batches=batches.__getitem__,
        epoch_steps=recipe.epoch_steps or max(1, sum(len(each.samples) for each in data) // recipe.batch_size),
        validate=validate,
        save=Outcome(config, start, parts.digest, bridge, saved, lora, vocabulary),
    )


def check_model(recipe: Recipe, config: Blip2Config, start: Start | None) -> None:
    """Refuse a recipe that the model cannot follow, before anything large is read.

    Raises:
        ConfigError: the message names the key.
    """
    with skeleton():
        Bridge(config)  # refuses what does not go together
    if recipe.stage == 2 and config.language is None:
        raise ConfigError("stage 2 needs a language model; name one under model.language")
    if _reads_texts(recipe) and not config.heads:
        raise ConfigError("model.heads: false, and the losses of stage 1 are computed by them; leave it out, or keep=0")
    if _reads_texts(recipe) and recipe.losses.itg and not config.word_head:
        raise ConfigError(
            "losses.itg: this model has no word head; write losses.itg=0, or model.word_head=true to begin a new one"
        )
    if (_reads_texts(recipe) or config.question_aware) and recipe.text_length > config.qformer.positions:
        raise ConfigError(
            f"text_length: {recipe.text_length} is more than the Q-Former's text has positions, "
            f"{config.qformer.positions}; lower it, or raise model.qformer.positions"
        )
    if recipe.likeness and config.text is None:
        raise ConfigError("likeness: this model's Q-Former starts from no text encoder that could tell; leave it out")
    if recipe.lora is not None and start is not None and start.config.adapter:
        raise ConfigError(
            f"lora: the language model of {start.directory} has an adapter already; write its model whole with "
            "`blip2.load(...).save(...)` and start from that, or leave `lora` out"
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


def _objective(
    recipe: Recipe,
    parts: Parts,
    bridge: Bridge,
    texts: Texts,
    written: Tensor | None,
    likeness: Likeness | None,
    world: World,
    device: torch.device,
    data: Sequence[Data],
    reward: Reward | None = None,
) -> nn.Module:
    """What is minimised; the softmax runs over the words of the data where the recipe says so.

    Args:
        written: int64[K], the tokens that the model writes already.
        likeness: one for training and validation, as it holds a text encoder.
        reward: None for validation, which draws nothing.
    """
    encoder = parts.encoder() if recipe.features.cache is None else None
    scale = 1.0 if recipe.stage == 1 else recipe.keep
    samples = [sample for each in data for sample in each.samples]
    captions = [plain(caption) for sample in samples for caption in sample.captions]
    first = None
    if texts.qformer is not None:
        first = Stage1(
            bridge,
            encoder,
            weights={name: scale * getattr(recipe.losses, name) for name in LOSSES},
            smoothing=recipe.smoothing,
            likeness=likeness,
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
    begin_projection(bridge, language)
    stage2 = Stage2(
        bridge,
        language,
        encoder,
        bos=tokenizer.bos,
        world=world,
        keep=first,
        reward=None if reward is None else self_critical(reward, texts, samples, world),
        vocabulary=_to_write(texts, samples, tokenizer, written) if recipe.vocabulary == "used" else None,
        patch_dropout=recipe.patch_dropout,
    )
    return stage2.to(device)


def _to_write(texts: Texts, samples: Sequence[Sample], tokenizer: Tokenizer, written: Tensor | None) -> Tensor:
    """int64[K], sorted: the tokens of captions and answers, of what was written before, and of an end."""
    pairs = [(texts.prompts.caption, plain(caption)) for sample in samples for caption in sample.captions]
    for sample in samples:
        pairs += [(texts.prompts.question.format(question), answer) for question, answer in sample.questions]
    earlier = [] if written is None else [written.tolist()]
    return _used([*texts.tokenize(pairs)[1].tolist(), tokenizer.stop_ids, *earlier])  # an end is learned against others


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
        if isinstance(part, T5) and half is torch.float16:
            part.half_safe()
    return part


def _vision(config: Blip2Config, model: Blip2 | None) -> ImageEncoder:
    from blip2 import adapters
    from blip2.weights.assemble import sized

    if isinstance(config.vision, VisionConfig) and model is not None:
        return sized(model, config.vision.image_size)
    return cast("ImageEncoder", adapters.image_encoder(_named(config.vision, "vision")))


def _text(config: Blip2Config, model: Blip2 | None) -> TextPart:
    from blip2 import adapters

    if config.text is None and model is not None and model.text_tokenizer is not None:
        return adapters.TextPart(torch.empty(0, 0), model.text_tokenizer, {})
    return adapters.text_part(_named(config.text, "text"))


def _language(config: Blip2Config, model: Blip2 | None) -> tuple[LanguageModel, Tokenizer]:
    from blip2 import adapters

    if model is not None and config.language == model.config.language:  # its adapter, if any, is merged
        language, tokenizer = model.writer()
        return language.language if isinstance(language, Narrowed) else language, tokenizer
    made, tokenizer = adapters.language_model(_named(config.language, "language"))
    return cast("LanguageModel", made), tokenizer  # a protocol cannot say that `step` takes what `prefill` gave


def _named(part: PartConfig | VisionConfig | LanguageConfig | None, key: str) -> PartConfig:
    if isinstance(part, PartConfig):
        return part
    what = "none" if part is None else type(part).__name__.removesuffix("Config")
    raise ConfigError(
        f"model.{key}: {what}, whose weights are nowhere: name a frozen part, or give a `start` that brings them"
    )
