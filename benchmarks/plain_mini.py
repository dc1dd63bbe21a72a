"""`mini` as one would drive its parts with transformers alone: `generate`, one picture at a time.

The image encoder and the Q-Former have no class there, so they are ours, a picture at a time; the language model is
transformers' Gemma 3 with the same weights, the same five beams, and the same words by a logits processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import blip2
from benchmarks import measure
from benchmarks.measure import emit
from blip2 import image
from blip2.adapters.narrowed import Narrowed
from blip2.blip2 import Blip2
from blip2.decoding import BEAMS, Decoding
from blip2.model import prefix
from blip2.model.gemma import Gemma
from blip2.weights.maps import transformers as maps
from blip2.weights.rules import for_layers, to_theirs

TIMED_PHOTOS = 30


class Words:
    """A logits processor: only some tokens may be written, and probability is shared among these, as ours is."""

    def __init__(self, vocabulary: Tensor, size: int) -> None:
        self.vocabulary = vocabulary
        self.barred = torch.full((size,), float("-inf")).index_fill_(0, vocabulary, 0.0)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        del ids
        return scores + self.barred - scores[:, self.vocabulary].logsumexp(-1, keepdim=True)


def gemma(ours: Gemma) -> Any:
    """transformers' model of our weights."""
    config = ours.config
    kinds: Any = transformers
    made = kinds.Gemma3TextConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.key_heads,
        head_dim=config.head_width, query_pre_attn_scalar=config.query_scale, sliding_window=config.window,
        max_position_embeddings=config.context,
    )  # fmt: skip
    with torch.device("meta"):
        model = kinds.Gemma3ForCausalLM(made)
    rules = for_layers(maps.gemma(config), range(config.layers))
    model.load_state_dict(to_theirs(rules, ours.state_dict(), "mini"), assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its frequencies are computed, not loaded
    model.model.embed_tokens.embed_scale = torch.tensor(config.width**0.5)
    return model.eval()


def caption(model: Blip2, theirs: Any, words: Words, photo: Path) -> str:
    """A picture's caption, as `generate` writes it."""
    language, tokenizer = model.writer()
    features = model.encode(image.open(photo))
    visual = model.bridge.project(features.queries)
    prompts = tokenizer.prompts([model.config.prompts.caption])
    embeds, _ = prefix.build(language, visual, prompts, tokenizer.bos, model.config.prompts.visual)
    own, limits = model.config.captions, Decoding()
    processors: list[Any] = [words]
    if own.no_repeat_ngram:  # after the words, whose shares it leaves as they are
        processors.append(transformers.NoRepeatNGramLogitsProcessor(own.no_repeat_ngram))
    found = theirs.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), num_beams=BEAMS,
        max_new_tokens=limits.max_new_tokens, length_penalty=own.length_penalty,
        do_sample=False, eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad,
        logits_processor=transformers.LogitsProcessorList(processors),
    )  # fmt: skip
    ids = [token for token in found[0].tolist() if token not in {*tokenizer.stop_ids, tokenizer.pad}]
    return tokenizer.decode(ids).strip()


@torch.inference_mode()
def main() -> None:
    job = measure.job()
    model = blip2.load(device="cpu", dtype=job.precision)
    assert isinstance(model.language, Narrowed)
    assert isinstance(model.language.language, Gemma)
    theirs = gemma(model.language.language)
    words = Words(model.language.vocabulary, model.language.vocab_size)
    photos = [Path(name) for name in job.photos]
    some = photos[:TIMED_PHOTOS]
    for photo in photos[:2]:
        caption(model, theirs, words, photo)  # to warm up
    texts: list[str] = []
    seconds = measure.timed_once(lambda: texts.extend(caption(model, theirs, words, photo) for photo in some))
    emit("mini", seconds=seconds, texts=texts, parts=len(some), whole=len(photos))


if __name__ == "__main__":
    main()
