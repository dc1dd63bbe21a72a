"""`Blip2`: the parts put together, and the verbs. No loop over tokens here; each verb starts from `ImageFeatures`.

Letters: N images, M texts, P patches, Q queries, D width, E image-text space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor

from blip2 import generate, image
from blip2.batching import BatchSize
from blip2.calibration import Calibration
from blip2.chat import Chat
from blip2.choosing import Choice, judged
from blip2.config import Blip2Config
from blip2.decoding import BEAMS, Decoding, Options
from blip2.encoding import encoded
from blip2.errors import ConfigError, PromptError
from blip2.heeding import each_image, heeded
from blip2.matching import match_all, probability
from blip2.model.bridge import Bridge
from blip2.one_or_many import Images, Shown, generation, grouped, is_list, pair, positive, present, sentence, unwrap
from blip2.packed import plain_weights
from blip2.protocols import ImageEncoder, LanguageModel
from blip2.reading import Asked
from blip2.results import Generation, ImageFeatures, Matches, Ranking
from blip2.text import Tokenizer, plain
from blip2.zero_shot import Classifier, How

TEXT_LENGTH = 35  # tokens of a text that is matched or embedded, as published
ENCODED = {"cpu": 16, "mps": 16, "cuda": 64}  # images in one pass of the encoder
WRITTEN = 16  # texts written together where a call does not say


@dataclass(frozen=True)
class Blip2:
    """A BLIP-2 model: a frozen image encoder, the trained bridge and, where it writes, a frozen language model.

    Attributes:
        tokenizer: the language model's; None without one.
        text_tokenizer: the Q-Former's; None where the bridge has no text side.
        dtype: of the frozen parts.
        identity: what distinguishes this model's features from another's, for indexes and caches.
        calibration: of matching probabilities; None leaves them as the head says.
    """

    config: Blip2Config
    encoder: ImageEncoder
    bridge: Bridge
    language: LanguageModel | None
    tokenizer: Tokenizer | None
    text_tokenizer: Tokenizer | None
    device: torch.device
    dtype: torch.dtype = torch.float32
    identity: str = ""
    calibration: Calibration | None = None

    # -- images ------------------------------------------------------------------------------------------------

    @property
    def transform(self) -> image.Transform:
        """From pictures to what the encoder takes."""
        return image.Transform(self.encoder.image_size, self.encoder.mean, self.encoder.std)

    @torch.inference_mode()
    def encode(self, images: Images, batch_size: int | None = None) -> ImageFeatures:
        """Encode images once, for any number of captions, questions, matches and searches.

        Files are read ahead by threads while the model is busy.

        Args:
            images: one image or a list: path, bytes, PIL image, numpy array, tensor; or features, given back as is.
            batch_size: images in one pass, halved where memory runs out. Where None the device's own, the same every
                time: an encoder is hardly faster in larger ones, and the last bits of a feature depend on it.
        Raises:
            ImageError: an image cannot be read; the message names it.
            ConfigError: no image, or a batch of none.
        """
        if isinstance(images, ImageFeatures):
            if not len(images):
                raise ConfigError("no image was given: the features are empty")
            return images
        items = cast("Sequence[image.Source]", images if is_list(images) else [images])
        if len(items) == 0:
            raise ConfigError("no image was given")
        size = BatchSize(ENCODED[self.device.type] if batch_size is None else batch_size, self.device)
        return ImageFeatures.concatenate(encoded(self.features, self.transform, items, size))

    def embed_images(self, images: Images) -> Tensor:
        """Images in the image-text space: float32[N, Q, E], unit length."""
        features = self.encode(images)
        if not features.vectors.shape[-1]:
            raise ConfigError("this model has no matching heads: it writes, but does not match or embed")
        return features.vectors

    @torch.inference_mode()
    def embed_texts(self, texts: str | Sequence[str], batch_size: int = 128) -> Tensor:
        """Texts in the image-text space: float32[M, E], unit length; the cosine with an image is its best query's."""
        rows = [texts] if isinstance(texts, str) else list(texts)
        ids = [self.text_ids(rows[i : i + batch_size]) for i in range(0, max(1, len(rows)), positive(batch_size))]
        return torch.cat([self.bridge.text_vectors(part) for part in ids])

    # -- text about images ---------------------------------------------------------------------------------------

    def caption(
        self,
        images: Shown,
        prompt: str | None = None,
        *,
        stream: bool = False,
        details: bool = False,
        best_of: int | None = None,
        by: Literal["itm", "itc"] = "itm",
        threshold: float | None = None,
        batch_size: int = WRITTEN,
        **options: Unpack[Options],
    ) -> Any:
        """Describe images.

        Args:
            images: one image or a list, or `ImageFeatures` (a list); a list within the list is several for one prompt.
            prompt: what the caption starts from; the model's own where None. `<image>` in it is where an image stands,
                once for each; without any, images stand before the text.
            stream: give an iterator of text pieces of one image, greedy or drawn.
            details: give `Generation`s instead of `str`s: tokens, log-probabilities, how well text and image match.
            best_of, by, threshold: write several and keep the best, see `choosing.Choice`.
            batch_size: images whose captions are written together.
            options: how the text is chosen, see `Decoding`; five beams by default, one for a stream, and what the
                model's own `config.captions` says.
        Returns:
            A text for one image, a list for a list; with `num_captions` above 1 a list of texts for each. None in place
            of a text that does not reach the threshold.
        """
        choice = Choice(best_of, by, threshold)
        words = self.config.prompts.caption if prompt is None else prompt
        single = not is_list(images)
        features, counts = grouped(self.encode, images)
        own = self.config.captions
        decoding = Decoding.of(
            choice.widened(options),
            num_beams=1 if stream else BEAMS,
            length_penalty=own.length_penalty,
            no_repeat_ngram=own.no_repeat_ngram,
        )
        if stream:
            return self._stream(features, words, decoding, details or choice.chooses, counts)
        found = self.write(features, [words] * len(counts), decoding, batch_size, counts)
        count = options.get("num_captions", 1)
        kept = choice.kept(judged(self, features, counts, found, choice, details), count)
        return unwrap(present(kept, details, count), single)

    def ask(
        self,
        images: Shown,
        questions: str | Sequence[str],
        *,
        choices: Sequence[str] | None = None,
        stream: bool = False,
        details: bool = False,
        **options: Unpack[Options],
    ) -> Any:
        """Answer questions about images.

        Args:
            images: one image and any questions, or as many images as questions, or many images and one question; a list
                within the list is several images for one question, with `<image>` where each stands in it.
            choices: give the one of these that is the likeliest answer.
            stream, details, options: as in `caption`; with choices, `details` gives a `Ranking`.
        Returns:
            An answer, or a list where images or questions are a list.
        Raises:
            PromptError: a question is empty, has another number of `<image>` than of images, or lists of different
                lengths are given.
        """
        single = isinstance(questions, str) and not is_list(images)
        asked = [questions] if isinstance(questions, str) else list(questions)
        features, counts = grouped(self.encode, images)
        features, counts, asked = pair(features, counts, asked)
        prompts = [self.config.prompts.question.format(sentence(question)) for question in asked]
        features = self.heeding(features, asked, counts)
        if choices is not None:
            if stream or options:
                named = "stream" if stream else next(iter(options))
                raise ConfigError(f"{named!r} does not go with choices: they are ranked, not written")
            ranked = self.rank(features, prompts, choices, counts)
            return unwrap(ranked if details else [ranking.best for ranking in ranked], single)
        if stream:
            return self._stream(features, prompts[0], Decoding.of(options, max_new_tokens=10), details, counts)
        decoding = Decoding.of(options, num_beams=BEAMS, max_new_tokens=10)
        found = self.write(features, prompts, decoding, counts=counts)
        return unwrap(present(found, details, decoding.num_captions), single)

    def chat(self, image: Images) -> Chat:
        """A conversation about one image, which is encoded once."""
        features = self.encode(image)
        if len(features) != 1:
            raise ConfigError(f"a chat is about one image, not {len(features)}")
        return Chat(self, features)

    @torch.inference_mode()
    def match(self, images: Images, texts: str | Sequence[str]) -> Matches:
        """How well each image and each text fit: probabilities float32[N, M] (ITM) and cosines float32[N, M] (ITC)."""
        features = self.encode(images)
        rows = [texts] if isinstance(texts, str) else list(texts)
        ids = self.text_ids(rows)  # (M, T)
        vectors = self.embed_images(features).to(self.device)
        itc = torch.einsum("nqe,me->nmq", vectors, self.bridge.text_vectors(ids)).amax(-1)
        logits = match_all(self.bridge, features.patches, ids)  # (N, M, 2)
        return Matches(probability(logits, self.calibration), itc, logits[..., 1] - logits[..., 0])

    def classify(self, images: Images, labels: Sequence[str], *, details: bool = False, **how: Unpack[How]) -> Any:
        """Which of the labels each image shows, without training: a label for one image, a list for a list.

        Args:
            details: give `Classification`s with the scores of all labels.
            how: `templates` and `by`, see `zero_shot.Classifier.of`, which keeps labels for more images.
        """
        found = Classifier.of(self, labels, **how).classify(images)
        return unwrap(found if details else [each.best for each in found], not is_list(images))

    @torch.inference_mode()
    def match_logits(self, features: ImageFeatures, ids: Tensor, pairs: Tensor) -> Tensor:
        """Matching head on chosen pairs.

        Args:
            ids: int64[M, T], Q-Former tokens.
            pairs: int64[K, 2], (image, text) indices.
        Returns:
            float32[K, 2], logits of (no match, match).
        """
        images, rows = pairs[:, 0].unique(return_inverse=True)
        patches = features.patches[images.to(features.patches.device)].to(self.device, self.bridge.dtype)
        sight = self.bridge.see(patches)
        return self.bridge.match(sight, rows.to(self.device), ids[pairs[:, 1].to(ids.device)])

    def save(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model in our own format, with a card (`README.md`); `blip2.load` reads it back.

        A language model of our own kind goes with it; frozen parts of others are named, with their weights' SHA-256.

        Args:
            dtype: that weights are stored in, their own where None.
        Raises:
            CheckpointError: it cannot be written, or has weights that the format does not hold (quantised ones).
        """
        from blip2.weights import save_model

        with plain_weights(self.encoder, self.bridge, self.language):
            save_model(self, Path(directory), dtype)

    # -- within ----------------------------------------------------------------------------------------------------

    def features(self, pixels: Tensor) -> ImageFeatures:
        """What `encode` gives, of pixels that are transformed already; with gradient to the bridge where it is on.

        Args:
            pixels: float[N, 3, S, S], normalised with the encoder's mean and std, S its image size; or uint8[N, S, S,
                3], squares that are not normalised yet.
        Raises:
            ImageError: of another size.
        """
        if pixels.device.type == "cpu" and self.device.type == "cuda":
            pixels = pixels.pin_memory()  # the copy goes on by itself while this thread prepares what follows
        pixels = pixels.to(self.device, non_blocking=True)
        if self.transform.fits(pixels):
            pixels = self.transform.normalised(pixels)
        patches = self.encoder(pixels.to(self.dtype)).to(self.bridge.dtype)  # (N, P, Dv)
        hidden = self.bridge.look(self.bridge.see(patches)).hidden  # (N, Q, D)
        vectors = self.bridge.image_vectors(hidden) if self.bridge.heads else hidden[..., :0].float()
        return ImageFeatures(patches, hidden, vectors)

    def text_ids(self, texts: Sequence[str]) -> Tensor:
        """Q-Former tokens of texts, int64[M, T], right-padded, for `match_logits`.

        Raises:
            ConfigError: this model has no text side.
            PromptError: a text is empty.
        """
        if self.text_tokenizer is None:
            raise ConfigError("this model has no text side: it writes, but does not match or embed")
        if not texts or not all(text.strip() for text in texts):
            raise PromptError("an empty text cannot be matched or embedded")
        read = [plain(text) for text in texts] if self.config.plain_texts else texts
        return self.text_tokenizer.batch(read, min(TEXT_LENGTH, self.config.qformer.positions)).to(self.device)

    @torch.inference_mode()
    def heeding(self, features: ImageFeatures, questions: Sequence[str], counts: Sequence[int]) -> ImageFeatures:
        """Features for prompts that ask: of a model that is `question_aware` their queries read the questions too.

        Args:
            features: of all prompts' images, in order; `counts` is how many each has.
        """
        if not self.config.question_aware:
            return features
        return heeded(self.bridge, features, self.text_ids(each_image(questions, counts)))

    def unread(self, text: str) -> int:
        """How many tokens of a text lie beyond those that are matched or embedded."""
        read = plain(text) if self.config.plain_texts else text
        tokens = [] if self.text_tokenizer is None else self.text_tokenizer.encode([read])[0]
        return max(0, len(tokens) - min(TEXT_LENGTH, self.config.qformer.positions))

    def writer(self) -> tuple[LanguageModel, Tokenizer]:
        """The language model and its tokenizer.

        Raises:
            ConfigError: this model has none.
        """
        if self.language is None or self.tokenizer is None:
            raise ConfigError("this model has no language model: it matches and embeds, but does not write")
        return self.language, self.tokenizer

    def _asked(self, features: ImageFeatures, prompts: Sequence[str], room: int, counts: Sequence[int]) -> Asked:
        """Prompts as the language model reads them, with room for so many new tokens."""
        language, tokenizer = self.writer()
        ids, layout = tokenizer.prompts(prompts), self.config.prompts.visual
        readings, project = features.readings, self.bridge.project
        asked = Asked(language, project, features.queries, readings, ids, tokenizer.bos, layout, counts, self.device)
        longest = max(asked.lengths, default=0) + room
        if longest > language.context:
            raise PromptError(
                f"images, prompt and answer need {longest} positions, the language model has {language.context}: "
                "shorten the prompt or lower max_new_tokens"
            )
        return asked

    @torch.inference_mode()
    def write(
        self,
        features: ImageFeatures,
        prompts: Sequence[str],
        decoding: Decoding,
        batch_size: int = WRITTEN,
        counts: Sequence[int] | None = None,
    ) -> list[list[Generation]]:
        """Texts after each prompt, in the words that the language model is given: what the verbs stand on.

        Args:
            features: of all prompts' images, in order.
            batch_size: how many prompts are written at a time; where one ends, another takes its place.
            counts: images of each prompt; one each where None.
        Returns:
            `decoding.num_captions` texts for each prompt, best first.
        Raises:
            PromptError: a prompt has no place for each of its images, or does not fit the language model's context.
        """
        language, tokenizer = self.writer()
        counts = [1] * len(prompts) if counts is None else counts
        asked = self._asked(features, prompts, decoding.max_new_tokens, counts)
        found = generate.answer(
            language, asked, decoding.method, decoding.limits, tokenizer.stop_ids, capacity=batch_size
        )
        return [[generation(tokens, tokenizer) for tokens in row] for row in found]

    def _stream(
        self, features: ImageFeatures, prompt: str, decoding: Decoding, details: bool, counts: Sequence[int]
    ) -> Iterator[str]:
        if details:
            raise ConfigError("a stream gives text as it comes: details and a choice are for whole texts")
        if len(counts) != 1:
            raise ConfigError(f"a stream is of one text, not of {len(counts)}")
        language, tokenizer = self.writer()
        with torch.inference_mode():
            asked = self._asked(features, [prompt], decoding.max_new_tokens, counts)
            steps = generate.follow(language, asked, decoding.method, decoding.limits, tokenizer.stop_ids)
        return generate.pieces((ids[0] for ids in steps if ids[0] is not None), tokenizer.decode)

    @torch.inference_mode()
    def rank(
        self,
        features: ImageFeatures,
        prompts: Sequence[str],
        choices: Sequence[str],
        counts: Sequence[int] | None = None,
    ) -> list[Ranking]:
        """Given answers after prompts, in the words that the language model is given.

        Args:
            counts: images of each prompt; one each where None.
        Raises:
            PromptError: fewer than two choices, or an empty one.
        """
        language, tokenizer = self.writer()
        ids = tokenizer.choices(choices)
        asked = self._asked(features, prompts, max(map(len, ids)), [1] * len(prompts) if counts is None else counts)
        embeds, lengths, past = asked.prefix()
        scores = generate.rank(language, embeds, lengths, ids, past)  # (N, C)
        return [Ranking(tuple(choices), tuple(row)) for row in scores.tolist()]
