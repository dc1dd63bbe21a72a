"""What a piece of work cannot do without: operations of its matrix products, and weights that are read at least once.

Counted from a configuration alone, so that no kernel changes it; attention itself is counted in the image encoder,
where it is 3 %, and left out elsewhere, where it is less. A limit is what the machine's measured rates make of that.

Letters: B rows, P patches, Q queries, T text positions, D width, M width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from blip2.bench.machine import PRECISIONS, Rates
from blip2.config import (
    Blip2Config,
    GemmaConfig,
    OPTConfig,
    PartConfig,
    QFormerConfig,
    T5Config,
    VisionConfig,
)

# Parts of others, counted once: multiply-additions of one picture, weights, and patches that come out.
ENCODERS = {
    "efficientnet-lite2": (0.86e9, 6_063_024, 31),
    "efficientnet-lite2-levels": (0.92e9, 6_063_024, 56),
}
UNKNOWN = (0.0, 0, 0)  # of an encoder that was not counted, whose part of the work is left out
DECODERS = {"gemma-3-270m": GemmaConfig()}


@dataclass(frozen=True)
class Work:
    """One pass over some weights.

    Attributes:
        operations: a multiplication and an addition are two.
        weights: how many are read, once, whatever the number of rows.
    """

    operations: float
    weights: float

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.weights + other.weights)

    def seconds(self, rates: Rates, precision: str) -> float:
        """The least that the pass can take: its arithmetic or its reading, whichever is longer."""
        reading = self.weights * PRECISIONS[precision] / rates.bandwidth
        return max(self.operations / rates.peak(precision), reading)


def _pass(weights: float, rows: float) -> Work:
    return Work(2 * weights * rows, weights)


def see(config: Blip2Config, images: int) -> Work | None:
    """The image encoder on some images; None where its size is not known."""
    vision = config.vision
    if isinstance(vision, PartConfig):
        if vision.name not in ENCODERS:
            return None
        products, weights, _ = ENCODERS[vision.name]
        return Work(2 * products * images, weights)
    blocks = vision.layers * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
    attention = 4 * vision.layers * vision.tokens**2 * vision.width  # scores, and values by them
    patches = 3 * vision.patch_size**2 * vision.width
    return _pass(blocks + patches, vision.tokens * images) + Work(attention * images, 0)


def look(config: Blip2Config, images: int) -> Work:
    """The Q-Former's queries on some images, and the projection to the language model."""
    qformer = config.qformer
    work = cross(config, images) + _pass(_queries(qformer), qformer.queries * images)
    if config.language is not None:
        work += _pass(qformer.width * config.language.width, qformer.queries * images)
    return work


def cross(config: Blip2Config, images: int) -> Work:
    """Keys and values of some images for the cross-attention."""
    qformer = config.qformer
    if isinstance(config.vision, VisionConfig):
        patches = config.vision.tokens
    else:
        patches = ENCODERS.get(config.vision.name, UNKNOWN)[2]
    return _pass(_crossing(qformer) * 2 * qformer.encoder_width * qformer.width, patches * images)


def join(config: Blip2Config, pairs: int, length: float) -> Work:
    """The matching head on pairs of an image that was seen and a text of so many tokens."""
    qformer = config.qformer
    own = qformer.layers * (4 * qformer.width**2 + 2 * qformer.width * qformer.mlp_width)
    return _pass(_queries(qformer), qformer.queries * pairs) + _pass(own, length * pairs)


def read_text(config: Blip2Config, texts: int, length: float) -> Work:
    """The Q-Former on texts alone."""
    qformer = config.qformer
    return _pass(qformer.layers * (4 * qformer.width**2 + 2 * qformer.width * qformer.mlp_width), length * texts)


def _queries(qformer: QFormerConfig) -> float:
    """Weights that a query passes: self-attention and feed-forward, query and output of the cross-attention."""
    own = qformer.layers * (4 * qformer.width**2 + 2 * qformer.width * qformer.mlp_width)
    return own + _crossing(qformer) * 2 * qformer.width**2


def _crossing(qformer: QFormerConfig) -> int:
    return len(range(0, qformer.layers, qformer.cross_attention_every))


Language = OPTConfig | T5Config | GemmaConfig


def language(config: Blip2Config) -> Language | None:
    """Sizes of the language model, where they are known."""
    if isinstance(config.language, PartConfig):
        return DECODERS.get(config.language.name)
    return config.language


def prefill(model: Language, positions: int, rows: int, written: int | None = None) -> Work:
    """Reading prompts of so many positions in all, up to the first logits of each row."""
    work = _pass(model.layers * _layer(model), positions) + head(model, rows, written)
    if isinstance(model, T5Config):  # keys and values for the decoder, whose first step is read with it
        inner = model.heads * model.head_width
        return work + _pass(2 * model.layers * model.width * inner, positions) + _pass(_decoder(model), rows)
    return work


def step(model: Language, rows: int, written: int | None = None) -> Work:
    """One more token for each row."""
    own = _decoder(model) if isinstance(model, T5Config) else model.layers * _layer(model)
    return _pass(own, rows) + head(model, rows, written)


def head(model: Language, rows: int, written: int | None = None) -> Work:
    """Logits of the tokens that may be written, all where None."""
    return _pass((written or model.vocab_size) * model.width, rows)


def _layer(model: Language) -> float:
    """Weights of a layer that every position passes: of T5, of the encoder."""
    if isinstance(model, OPTConfig):
        return 4 * model.width**2 + 2 * model.width * model.mlp_width
    inner = model.heads * model.head_width
    others = 2 * model.key_heads * model.head_width if isinstance(model, GemmaConfig) else 2 * inner
    return model.width * (2 * inner + others) + 3 * model.width * model.mlp_width


def _decoder(model: T5Config) -> float:
    """Weights of T5's decoder that a token passes: query and output of its cross-attention with them."""
    inner = model.heads * model.head_width
    return model.layers * (6 * model.width * inner + 3 * model.width * model.mlp_width)


@dataclass(frozen=True)
class Passes:
    """A piece of work as the passes that follow each other: each has its own limit, none waits in another's shade."""

    passes: tuple[Work, ...]

    @property
    def total(self) -> Work:
        """All of it."""
        return sum(self.passes, Work(0, 0))

    def seconds(self, rates: Rates, precision: str) -> float:
        """The physical limit."""
        return sum(work.seconds(rates, precision) for work in self.passes)


def writing(config: Blip2Config, *, images: int, texts: int, prompt: int, tokens: int, beams: int) -> Passes | None:
    """Images seen once, prompts read once each, then a token a step for every beam.

    Args:
        prompt: tokens of a prompt beside the visual prefix, which the texts of one image share where it stands first.
    Returns:
        None where a part's size is not known.
    """
    model, seen, written = language(config), see(config, images), config.vocabulary
    if model is None or seen is None:
        return None
    shared = config.qformer.queries * (texts if isinstance(model, T5Config) else images)
    read = prefill(model, shared + prompt * texts, texts, written)
    steps = [step(model, texts * beams, written)] * (tokens - 1)
    return Passes((seen, look(config, images), read, *steps))


def matching(config: Blip2Config, *, images: int, texts: int, length: float) -> Passes | None:
    """Every image against every text: each encoded once, then the pairs."""
    seen = see(config, images)
    if seen is None:
        return None
    read = read_text(config, texts, length)
    return Passes((seen, look(config, images), read, join(config, images * texts, length)))
