"""LAVIS's BLIP-2 models: samples in a dict, pixels normalised already; everything is computed by `blip2.Blip2`.

Letters: B rows, S side of the image, Q queries, T tokens, D width, E image-text space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2.blip2 import Blip2
from blip2.compat.lavis.outputs import BlipOutput, BlipOutputFeatures
from blip2.decoding import Decoding
from blip2.errors import ConfigError, ImageError, PromptError
from blip2.model.t5 import T5
from blip2.results import ImageFeatures
from blip2.text import pad
from blip2.train.objectives import Batch, Stage1, Stage2

TEXT_LENGTH = 32  # tokens of a text that is matched or learned from
TOP_K = 50  # LAVIS leaves it to transformers, whose default this is

Samples = Mapping[str, Any]


class Blip2Base(nn.Module):
    """What all of them share.

    Attributes:
        core: the model with blip2's own verbs.
        prompt: what a text starts from where a sample has none.
    """

    core: Blip2

    def __init__(self, core: Blip2, prompt: str = "") -> None:
        super().__init__()
        self.core = core
        self.prompt = prompt
        self.visual_encoder = cast("nn.Module", core.encoder)
        self.bridge = core.bridge
        self.language_model = cast("nn.Module | None", core.language)
        if self.language_model is not None:
            self.language_model.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.core.device

    def train(self, mode: bool = True) -> Self:
        """Whether the Q-Former drops out; the frozen parts never do."""
        super().train(mode)
        for part in (self.visual_encoder, self.language_model):
            if part is not None:
                part.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `cuda` and the like stand on; the bridge keeps computing in float32."""
        super()._apply(fn, recurse)
        self.bridge.float()
        weight = next(self.visual_encoder.parameters())
        if weight.dtype == torch.float16 and isinstance(self.language_model, T5):
            self.language_model.half_safe()
        self.core = dataclasses.replace(self.core, device=weight.device, dtype=weight.dtype)
        return self

    def features(self, samples: Samples) -> ImageFeatures:
        """`samples["image"]`, float[B, 3, S, S], encoded: accepted by all verbs of `core`.

        Raises:
            ConfigError: there is none.
            ImageError: it is no batch of pixels, or of another size.
        """
        pixels = _sample(samples, "image")
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not pixels.is_floating_point():
            raise ImageError(
                f"samples['image'] is {_described(pixels)}, not float[B, 3, S, S]: stack what vis_processors['eval'] "
                "gives, one image with .unsqueeze(0)"
            )
        return self.core.features(pixels)


class Blip2Writer(Blip2Base):
    """LAVIS's `Blip2OPT` and `Blip2T5`: captions, answers, and the loss of stage 2."""

    @torch.no_grad()
    def generate(
        self,
        samples: Samples,
        use_nucleus_sampling: bool = False,
        num_beams: int = 5,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1,
    ) -> list[str]:
        """Texts about images.

        Args:
            samples: `image`, float[B, 3, S, S]; `prompt`, a text for all or a list of B, the model's own where missing.
            use_nucleus_sampling: draw tokens, by `top_p` and `temperature`, which nothing else reads; with several
                beams the beams are drawn, as LAVIS's newest version does.
            max_length, min_length: tokens that are written; T5's count the one that it starts from for the least.
        Returns:
            B * num_captions texts, those of one image together, best first.
        Raises:
            ConfigError: a value is out of range, or more captions than beams.
            PromptError: another number of prompts than of images, or image and prompt fill the model's context.
        """
        features = self.features(samples)
        prompts = _texts(samples.get("prompt", self.prompt), len(features), "prompt", spread=True)
        decoding = Decoding(
            num_beams=num_beams,
            do_sample=use_nucleus_sampling,
            temperature=temperature,
            top_k=TOP_K,
            top_p=top_p,
            max_new_tokens=max_length,
            min_new_tokens=self._least(min_length),
            repetition_penalty=repetition_penalty,
            length_penalty=length_penalty,
            num_captions=num_captions,
        )
        return [found.text for row in self.core.write(features, prompts, decoding) for found in row]

    @torch.no_grad()
    def predict_answers(
        self,
        samples: Samples,
        num_beams: int = 5,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,  # noqa: ARG002 (callers give it; all candidates are ranked, none is cut)
        answer_list: Sequence[str] | None = None,
        prompt: str = "",
        length_penalty: float | None = None,
    ) -> list[str]:
        """Answers to one question an image.

        Args:
            samples: `image`, float[B, 3, S, S]; `text_input`, a text or B of them.
            inference_method: `generate`, or `rank` to take the likeliest of `answer_list`, which LAVIS has for BLIP
                only.
            prompt: a template, `{}` is the question; the question as it is where empty.
            length_penalty: below 0 favours short answers; 0 for OPT and -1 for T5 where None, as in LAVIS.
        Raises:
            ConfigError: an unknown method, or nothing to rank.
            PromptError: another number of questions than of images.
        """
        features = self.features(samples)
        questions = _texts(_sample(samples, "text_input"), len(features), "text_input")
        prompts = [prompt.format(question) if prompt else question for question in questions]
        if samples.get("apply_lemmatizer"):
            raise ConfigError("samples['apply_lemmatizer']: blip2 has no lemmatizer, apply one to the answers")
        if inference_method == "rank":
            if answer_list is None:
                raise ConfigError("inference_method 'rank' chooses from answer_list: give it")
            return [ranking.best for ranking in self.core.rank(features, prompts, answer_list)]
        if inference_method != "generate":
            raise ConfigError(f"inference_method {inference_method!r}: there are 'generate' and 'rank'")
        if length_penalty is None:
            length_penalty = -1.0 if self._t5 else 0.0
        least = self._least(min_len)
        decoding = Decoding(num_beams, max_new_tokens=max_len, min_new_tokens=least, length_penalty=length_penalty)
        return [row[0].text for row in self.core.write(features, prompts, decoding)]

    def forward(self, samples: Samples) -> dict[str, Tensor]:
        """The loss of stage 2, with gradient to the Q-Former and the projection.

        Args:
            samples: `image`; `text_input`, B texts: what OPT writes, from the model's prompt on, or what T5 reads;
                `text_output`, B texts, what T5 writes.
        Returns:
            `loss`: the mean over the tokens that are written, OPT's first one of a text among them as in LAVIS.
        """
        language, tokenizer = self.core.writer()
        patches = self._patches(samples)
        read = tokenizer.encode(_texts(_sample(samples, "text_input"), len(patches), "text_input"))
        if self._t5:
            written = tokenizer.encode(_texts(_sample(samples, "text_output"), len(patches), "text_output"))
            stop = tokenizer.stop_ids[0]
            prompts = [[*row[: TEXT_LENGTH - 1], stop] for row in read]
            targets = [[*row[: TEXT_LENGTH - 1], stop] for row in written]
        else:
            begin = [] if tokenizer.bos is None else [tokenizer.bos]
            told = len(begin) + len(tokenizer.encode([self.prompt])[0]) if self.prompt else 0
            rows = [[*begin, *row, tokenizer.stop_ids[0]][:TEXT_LENGTH] for row in read]
            prompts, targets = [row[:told] for row in rows], [row[told:] for row in rows]
        count = torch.arange(len(patches), device=self.device)
        batch = Batch(patches, count, count[:, None][:, :0], count, tuple(map(tuple, prompts)), pad(targets, -100))
        return {"loss": Stage2(self.bridge, language, bos=None)(batch.to(self.device), seed=0)["lm"]}

    @torch.no_grad()
    def _patches(self, samples: Samples) -> Tensor:
        return self.features(samples).patches

    @property
    def _t5(self) -> bool:
        return isinstance(self.language_model, T5)

    def _least(self, length: int) -> int:
        """New tokens of a least length: a decoder's start token counts as one where LAVIS compares."""
        return max(0, length - 1) if self._t5 else length


class Blip2Qformer(Blip2Base):
    """LAVIS's `blip2` and `blip2_feature_extractor`: features, and the losses of stage 1."""

    @torch.no_grad()
    def extract_features(self, samples: Samples, mode: str = "multimodal") -> BlipOutputFeatures:
        """Features of images, of texts, or of images beside texts.

        Args:
            samples: `image`, float[B, 3, S, S]; `text_input`, a text or a list. What the mode does not need may be
                missing.
            mode: `image`, `text` or `multimodal`.
        Returns:
            the fields of that mode; the others are None.
        Raises:
            ConfigError: an unknown mode, or a sample is missing.
            PromptError: a text is longer than the Q-Former's positions, or another number of texts than of images.
        """
        if mode == "image":
            features = self.features(samples)
            return BlipOutputFeatures(image_embeds=features.queries, image_embeds_proj=features.vectors)
        if mode == "text":
            hidden = self.bridge.qformer.read(self._ids(samples, None, None))  # (B, T, D)
            assert self.bridge.heads is not None
            return BlipOutputFeatures(
                text_embeds=hidden, text_embeds_proj=F.normalize(self.bridge.heads.text_proj(hidden), dim=-1)
            )
        if mode == "multimodal":
            features = self.features(samples)
            ids = self._ids(samples, len(features), None)
            joint = self.bridge.qformer.join(self.bridge.see(features.patches), ids)  # (B, Q + T, D)
            return BlipOutputFeatures(multimodal_embeds=joint[:, : features.queries.shape[1]])
        raise ConfigError(f"mode {mode!r}: there are 'image', 'text' and 'multimodal'")

    def forward(self, samples: Samples) -> BlipOutput:
        """The losses of stage 1, with gradient to the bridge.

        Args:
            samples: `image`; `text_input`, B texts; `image_id`, int64[B], equal where the image is the same, all
                different where missing.
        Raises:
            ConfigError: the checkpoint came from transformers' format, which keeps no word head (ITG).
        """
        with torch.no_grad():
            patches = self.features(samples).patches
        ids = self._ids(samples, len(patches), TEXT_LENGTH)
        images = samples.get("image_id", torch.arange(len(patches)))
        batch = Batch(patches, torch.as_tensor(images), ids).to(self.device)
        losses = Stage1(self.bridge)(batch, seed=int(torch.randint(2**62, ())))
        return BlipOutput(sum(losses.values(), torch.zeros(())), losses["itc"], losses["itm"], losses["itg"])

    def generate(self, *_: object, **__: object) -> list[str]:
        """Not here.

        Raises:
            ConfigError: always: captions come from blip2_opt and blip2_t5.
        """
        raise ConfigError("this model has no language model, it matches and embeds: blip2_opt and blip2_t5 write")

    def _ids(self, samples: Samples, images: int | None, longest: int | None) -> Tensor:
        """Tokens int64[B, T] of `text_input`, right-padded, cut to `longest`."""
        tokenizer, most = self.core.text_tokenizer, self.core.config.qformer.positions
        assert tokenizer is not None
        ids = tokenizer.batch(_texts(_sample(samples, "text_input"), images, "text_input"), longest)
        if ids.shape[1] > most:
            raise PromptError(f"samples['text_input']: {ids.shape[1]} tokens, the Q-Former has {most} positions")
        return ids.to(self.device)


class Blip2ITM(Blip2Qformer):
    """LAVIS's `blip2_image_text_matching`."""

    def forward(self, samples: Samples, match_head: str = "itm") -> Tensor:  # type: ignore[override]
        """How well each image and its text fit.

        Args:
            samples: `image`, float[B, 3, S, S]; `text_input`, a text or B of them, of any lengths.
        Returns:
            `itm`: float32[B, 2], logits of (no match, match); `itc`: float32[B, 1], the best query's cosine.
        Raises:
            ConfigError: an unknown head, or a sample is missing.
            PromptError: another number of texts than of images.
        """
        if match_head not in ("itm", "itc"):
            raise ConfigError(f"match_head {match_head!r}: there are 'itm' and 'itc'")
        features = self.features(samples)
        ids = self._ids(samples, len(features), TEXT_LENGTH)
        if match_head == "itm":
            return self.bridge.match(self.bridge.see(features.patches), torch.arange(len(ids), device=ids.device), ids)
        cosines = torch.einsum("bqe,be->bq", features.vectors, self.bridge.text_vectors(ids))
        return cosines.amax(1, keepdim=True)


def _sample(samples: Samples, key: str) -> Any:
    if samples.get(key) is None:
        raise ConfigError(f"samples has no {key!r}, which this needs; it has {', '.join(samples) or 'nothing'}")
    return samples[key]


def _texts(given: Any, rows: int | None, key: str, *, spread: bool = False) -> list[str]:
    """A text or a list of them as a list, one for each image; one for all where it may be spread."""
    if isinstance(given, str):
        return [given] * rows if spread and rows is not None else _texts([given], rows, key)
    if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in cast("Sequence[Any]", given)):
        raise PromptError(f"samples[{key!r}] is a {type(given).__name__}, not a text or a list of texts")
    texts = list(cast("Sequence[str]", given))
    if not texts or (rows is not None and len(texts) != rows):
        raise PromptError(f"samples[{key!r}] holds {len(texts)} texts for {rows} images: give one for each")
    return texts


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"a {type(value).__name__}"
