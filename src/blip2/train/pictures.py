"""A source's samples and their images, as the recipe wants them: cached features, class prototypes or pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from blip2 import image
from blip2.config import Blip2Config, PartConfig, VisionConfig
from blip2.data import sources
from blip2.data.sources import Prototype, Sample
from blip2.errors import ConfigError
from blip2.protocols import ImageEncoder
from blip2.train.data import Batches, Images, Mixture, Texts
from blip2.train.distributed import World
from blip2.train.features import FeatureCache, PrototypeFeatures
from blip2.train.log import now_and_then, say
from blip2.train.pixels import Pixels
from blip2.train.recipe import Recipe
from blip2.train.sections import Source

_ENDLESS = 1 << 30  # views of a picture that is cropped anew each time it comes


@dataclass(frozen=True)
class Data:
    """One source: its samples and their images."""

    samples: Sequence[Sample]
    images: Images


def read_data(
    source: Source,
    recipe: Recipe,
    config: Blip2Config,
    encoder: ImageEncoder,
    digest: Callable[[PartConfig], str],
    limit: int | None = None,
) -> Data:
    """A source's samples and their images: cached features, class prototypes or pixels.

    Args:
        encoder: frozen, in its place and precision, or the one that is trained.
        digest: SHA-256 of a named part's weights.
        limit: for held-out data: no more samples than this, evenly taken, and each picture plain.
    Raises:
        DataError: the source cannot be read.
    """
    templates = source.templates or sources.TEMPLATES
    samples = sources.read(
        source.path,
        source.format,
        split=source.split,
        questions=source.questions,
        images=source.images,
        templates=templates,
    )
    if limit is not None and len(samples) > limit:
        samples = [samples[number * len(samples) // limit] for number in range(limit)]
    if all(isinstance(sample.image, Prototype) for sample in samples):
        return Data(samples, _prototypes(encoder, samples).patches)
    settings = encoder.image_size, encoder.mean, encoder.std
    transform, augment = image.Transform(*settings), image.RandomView(*settings)
    features = recipe.features
    if features.cache is None:
        return Data(samples, Pixels(samples, transform, augment))
    views = 1 if limit is not None else features.views
    stored = FeatureCache(
        features.cache,
        encoder,
        _identity(config.vision, encoder, digest),
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


def _identity(vision: PartConfig | VisionConfig, encoder: ImageEncoder, digest: Callable[[PartConfig], str]) -> str:
    """What tells an encoder's features from another's: the name of a part and its weights, or of a ViT all of it."""
    if isinstance(vision, PartConfig):
        return f"{vision.name} {digest(vision)}"
    found = hashlib.sha256(repr(vision).encode())
    for name, tensor in cast("nn.Module", encoder).state_dict().items():
        found.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def _prototypes(encoder: Any, samples: list[Sample]) -> PrototypeFeatures:
    """What the encoder's classifier holds classes to look like."""
    if not hasattr(encoder, "prototypes"):
        raise ConfigError("data of format `classes` need an image encoder with a classifier, which this one has not")
    return PrototypeFeatures(encoder.prototypes, encoder.classes, samples)


def make_batches(recipe: Recipe, data: Sequence[Data], texts: Texts, rows: int, world: World) -> Batches:
    """This rank's part of every `rows` rows."""
    mixture = Mixture(
        [(each.samples, source.weight) for each, source in zip(data, recipe.data, strict=True)],
        recipe.seed,
        questions=recipe.questions if recipe.stage == 2 else 0.0,
        texts=recipe.texts,
        views=_views(recipe),
    )
    return Batches(
        mixture,
        [each.images for each in data],
        texts,
        rows,
        lm_share=recipe.lm_share,
        reward_share=recipe.reward.share if recipe.reward else 0.0,
        reward_captions=recipe.reward.captions if recipe.reward else 1,
        rank=world.rank,
        world=world.size,
    )


def _views(recipe: Recipe) -> int:
    """How many views of a picture there are; the first is plain."""
    if recipe.features.cache is not None:
        return recipe.features.views
    return _ENDLESS if recipe.features.augment else 1
