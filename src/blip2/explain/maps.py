"""Numbers of each patch: how much it is looked at (attention), and how much it speaks for something (evidence).

Attention is what the Q-Former's softmax gives, whatever comes of it. Evidence is Grad-CAM on it: a weight times the
gradient of a score with respect to that weight, where that is positive.

Letters: Q queries, P patches, W words, T text positions, A heads, L layers that cross to the image.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from blip2.errors import ConfigError, PromptError
from blip2.explain.words import spans_of_ids, spans_of_text, without_each
from blip2.model import prefix
from blip2.model.qformer import QFormer, Sight, Watch
from blip2.one_or_many import sentence
from blip2.packed import plain_weights
from blip2.protocols import Placed, Places
from blip2.results import Generation, ImageFeatures

if TYPE_CHECKING:
    from blip2 import image
    from blip2.blip2 import Blip2

    Picture = image.Source | ImageFeatures


@dataclass(frozen=True)
class Word:
    """What one word has to do with the picture.

    Attributes:
        text: as it stands in the text.
        score: matched, by how much the log-odds of the match fall when the word is hidden; written, its
            log-probability.
        evidence: float32[P], what spoke for the match because of this word, or for writing it. None is negative.
        attention: float32[P], where a matched word looks through the queries, sum 1; None where it is not matched,
            or no word comes after the chosen layers.
    """

    text: str
    score: float
    evidence: Tensor
    attention: Tensor | None


@dataclass(frozen=True)
class Explanation:
    """What a model looked at in one picture.

    Attributes:
        kind: whether the queries looked alone, or a text was matched or written.
        text: that was matched or written; empty where the queries alone look.
        layers: of the Q-Former, numbered from 0, whose mean the maps are.
        places: where the patches lie.
        attention: float32[Q, P], where each query looks, sum 1.
        probability: matched, that text and picture match (ITM); written, of the whole text.
        evidence: float32[P], what spoke for the match or the text; None is negative. Empty without a text.
        words: of the text, in order.
        unread: tokens at the text's end that the model does not read.
    """

    kind: Literal["queries", "matched", "written"]
    text: str
    layers: tuple[int, ...]
    places: Places
    attention: Tensor
    probability: float | None = None
    evidence: Tensor | None = None
    words: tuple[Word, ...] = ()
    unread: int = 0


@torch.inference_mode(False)  # whatever the caller said: what is made here has gradients
def queries(model: Blip2, picture: Picture, layer: int | None = None) -> Explanation:
    """Where each query looks, no text beside it: what captions, answers and vectors are made of. Of any model.

    Args:
        picture: one image, or features of one.
        layer: of the Q-Former, numbered from 0; the mean over those that cross to the image where None.
    Raises:
        ConfigError: no such layer crosses to the image; the features are of several images or of another model; the
            encoder does not say where its patches lie.
        ImageError: the image cannot be read.
    """
    features, places, layers = _asked(model, picture, layer)
    watch = Watch()
    with torch.no_grad():
        _read(model, _seen(model, features), None, watch)
    return Explanation("queries", "", layers, places, _looked(watch, model, layers)[0])


@torch.inference_mode(False)
def match(model: Blip2, picture: Picture, text: str, layer: int | None = None) -> Explanation:
    """What spoke for the match of picture and text (ITM), and for each word's part in it.

    A word never looks at the picture itself. Its attention is composed: where it looks among the queries, times where
    those looked just before. Its evidence is that for the match, less what is left of it when the word is hidden.

    Args:
        picture, layer: as of `queries`.
    Raises:
        PromptError: the text is empty.
        ConfigError: as of `queries`, or the model has no matching heads.
        ImageError: the image cannot be read.
    Source: Selvaraju et al. 2017, equations 1 and 2, with a weight of its own for each patch; Li et al. 2021, figure 4.
    """
    if model.bridge.heads is None:
        raise ConfigError(
            "this model has no matching heads, so no text can be held against a picture: leave the text out to see "
            "where its queries look, or explain what it writes"
        )
    ids, words = spans_of_text(model, text)  # (T,)
    features, places, layers = _asked(model, picture, layer)
    rows = without_each(ids, words, model.config.qformer.pad_id)  # (1 + W, T)
    count, watch = model.config.qformer.queries, Watch()
    with _gradients(model.bridge):
        sight = _seen(model, features)
        images = torch.zeros(len(rows), dtype=torch.int64, device=ids.device)
        joined = QFormer.join(model.bridge.qformer, sight, rows, images, watch=watch)  # uncompiled, as in `_read`
        logits = model.bridge.heads.itm_head(joined[:, :count]).float().mean(1)  # (1 + W, 2)
        odds = logits[:, 1] - logits[:, 0]  # log-odds: the probability hangs on nothing else
        weights = _chosen(watch, model, layers)
        parts = _contributions(weights, odds.sum())
    attention = _through_queries(watch, model, layers)
    found = [
        Word(
            word.text,
            (odds[0] - odds[1 + number]).item(),
            _evidence([part[:1] - part[1 + number, None] for part in parts])[0],
            None if attention is None else _share(attention[list(word.at)].sum(0)),
        )
        for number, word in enumerate(words)
    ]
    return Explanation(
        "matched",
        text,
        layers,
        places,
        _looked(watch, model, layers)[0],
        odds[0].sigmoid().item(),
        _evidence([part[:1] for part in parts])[0],
        tuple(found),
        model.unread(text),
    )


def caption(model: Blip2, picture: Picture, prompt: str | None = None, layer: int | None = None) -> Explanation:
    """Write a caption, then see what in the picture made each of its words likelier.

    Args:
        picture, layer: as of `queries`.
        prompt: as of `Blip2.caption`.
    Raises:
        PromptError: the model writes nothing about this picture, or the prompt does not fit it.
        ConfigError: as of `queries`, or the model has no language model.
        ImageError: the image cannot be read.
    """
    features, places, layers = _asked(model, picture, layer)
    (found,) = model.caption(features, prompt, details=True)
    words = model.config.prompts.caption if prompt is None else prompt
    return _written(model, features, words, found, places, layers)


def answer(model: Blip2, picture: Picture, question: str, layer: int | None = None) -> Explanation:
    """Answer a question, then see what in the picture made each word of the answer likelier.

    Args:
        picture, layer: as of `queries`.
    Raises:
        PromptError: the question is empty, or the model answers nothing.
        ConfigError: as of `caption`.
        ImageError: the image cannot be read.
    """
    features, places, layers = _asked(model, picture, layer)
    (found,) = model.ask(features, question, details=True)
    words = model.config.prompts.question.format(sentence(question))
    heeded = model.text_ids([question]) if model.config.question_aware else None
    return _written(model, features, words, found, places, layers, heeded)


# -- within ------------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def _written(
    model: Blip2,
    features: ImageFeatures,
    prompt: str,
    found: Generation,
    places: Places,
    layers: tuple[int, ...],
    heeded: Tensor | None = None,
) -> Explanation:
    """What made the words of a text likelier that stands after a prompt: one backward pass a word.

    Args:
        heeded: int64[1, T], the question, where the queries read it beside the image.
    """
    language, tokenizer = model.writer()
    words = spans_of_ids(tokenizer, found.ids)
    if not words:
        raise PromptError("the model wrote nothing about this picture: there are no words to explain")
    watch = Watch()
    with _gradients(model.bridge, language):
        visual = model.bridge.project(_read(model, _seen(model, features), heeded, watch))  # (1, Q, D)
        built = prefix.build(language, visual, tokenizer.prompts([prompt]), tokenizer.bos, model.config.prompts.visual)
        targets = torch.tensor([found.ids], device=model.device)
        log_probs = language.log_probs(*built, targets)[0]  # (T,)
        weights = _chosen(watch, model, layers)
        scores = [log_probs[list(word.at)].sum() for word in words]
        parts = [_contributions(weights, score) for score in scores]  # W times L of (1, A, Q, P)
    whole = [torch.stack(of_layer).sum(0) for of_layer in zip(*parts, strict=True)]
    found_words = [
        Word(word.text, score.item(), _evidence(part)[0], None)
        for word, score, part in zip(words, scores, parts, strict=True)
    ]
    return Explanation(
        "written",
        found.text,
        layers,
        places,
        _looked(watch, model, layers)[0],
        torch.stack(scores).sum().exp().item(),
        _evidence(whole)[0],
        tuple(found_words),
    )


def _asked(model: Blip2, picture: Picture, layer: int | None) -> tuple[ImageFeatures, Places, tuple[int, ...]]:
    """One image's features, where its patches lie, and the layers that are meant."""
    every = model.config.qformer.cross_attention_every
    crossing = tuple(range(0, model.config.qformer.layers, every))
    if layer is not None and layer not in crossing:
        known = ", ".join(map(str, crossing))
        raise ConfigError(f"layer {layer} does not look at the image: those of this model that do are {known}")
    if not isinstance(model.encoder, Placed):
        kind = type(model.encoder).__name__
        raise ConfigError(f"{kind} does not say where its patches lie: give it the method of protocols.Placed")
    features = model.encode(picture)
    if len(features) != 1:
        raise ConfigError(f"one image is explained at a time, not {len(features)}")
    count, width = features.patches.shape[1:]
    if width != model.encoder.width:
        raise ConfigError(f"these features are {width} wide, this model's {model.encoder.width}: encode the image anew")
    places = model.encoder.places(features.patches[0])
    if places.count != count:
        raise ConfigError(f"these features have {count} patches, this model's {places.count}: encode the image anew")
    return features, places, crossing if layer is None else (layer,)


def _seen(model: Blip2, features: ImageFeatures) -> Sight:
    """The image as the cross-attention reads it, where a gradient to the attention begins."""
    with torch.no_grad():
        sight = model.bridge.see(features.patches.clone().to(model.device, model.bridge.dtype))
    return Sight(tuple(key.requires_grad_() for key in sight.keys), sight.values)


def _read(model: Blip2, sight: Sight, heeded: Tensor | None, watch: Watch) -> Tensor:
    """What the queries carry on to the language model, float[1, Q, D].

    By the class's own methods: compiled ones, which are the module's, would lose the weights' gradient.
    """
    qformer = model.bridge.qformer
    if heeded is None:
        return QFormer.look(qformer, sight, watch).hidden
    return QFormer.join(qformer, sight, heeded, wanted=model.config.qformer.queries, watch=watch)


@contextmanager
def _gradients(*parts: object) -> Generator[None]:
    """Gradients, and packed layers plain meanwhile."""
    with torch.enable_grad(), plain_weights(*parts):
        yield


def _chosen(watch: Watch, model: Blip2, layers: Sequence[int]) -> list[Tensor]:
    """Weights of the queries on the patches in some layers, L of float[B, A, Q, P]."""
    return [watch.across[layer // model.config.qformer.cross_attention_every] for layer in layers]


def _contributions(weights: list[Tensor], score: Tensor) -> list[Tensor]:
    """Each weight times the score's gradient with respect to it: L of float32[B, A, Q, P]."""
    slopes = torch.autograd.grad(score, weights, retain_graph=True)
    return [(weight * slope).detach().float() for weight, slope in zip(weights, slopes, strict=True)]


def _evidence(parts: Sequence[Tensor]) -> Tensor:
    """What is positive of contributions, L of float32[B, A, Q, P], over heads, queries and layers: float32[B, P]."""
    return torch.stack([part.clamp(min=0).mean(1).sum(1) for part in parts]).mean(0).cpu()


def _looked(watch: Watch, model: Blip2, layers: Sequence[int]) -> Tensor:
    """Where each query looks, over heads and layers: float32[B, Q, P]."""
    return torch.stack([part.detach().float().mean(1) for part in _chosen(watch, model, layers)]).mean(0).cpu()


def _through_queries(watch: Watch, model: Blip2, layers: Sequence[int]) -> Tensor | None:
    """Where the first text's positions look through the queries, float32[T, P]; None where no layer comes after.

    What the queries read in one layer, a word can read of them in the next.
    """
    count, found = model.config.qformer.queries, list[Tensor]()
    for layer, across in zip(layers, _chosen(watch, model, layers), strict=True):
        if layer + 1 < len(watch.within):
            among = watch.within[layer + 1][0].detach().float().mean(0)[count:, :count]  # (T, Q)
            found.append(_share(among) @ across[0].detach().float().mean(0))  # (T, P)
    return torch.stack(found).mean(0).cpu() if found else None


def _share(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True)
