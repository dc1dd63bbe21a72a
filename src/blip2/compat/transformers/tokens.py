"""The tokenizer beside a model, with what a processor needs: framing, padding, truncation, decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from blip2.compat.transformers.features import BatchFeature
from blip2.errors import ConfigError, PromptError
from blip2.files import replacing
from blip2.weights import vocabulary
from blip2.weights.transformers import read_json

if TYPE_CHECKING:
    import tokenizers

IMAGE_TOKEN = "<image>"
CONFIG = "tokenizer_config.json"
ENDLESS = 10**9  # a longest text of so many tokens is none
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


class Tokenizer:
    """Texts to ids and back.

    Args:
        rust: the tokenizer itself.
        values: what `tokenizer_config.json` holds, the special tokens among it.
        frame: ids before and after every text, where the tokenizer's own template says nothing of them.
        pad: id that fills rows, where no token is named for it.
    Attributes:
        padding_side: `right` or `left`.
    """

    def __init__(
        self,
        rust: tokenizers.Tokenizer,
        values: dict[str, Any],
        frame: tuple[list[int], list[int]] = ([], []),
        pad: int = 0,
    ) -> None:
        self.rust, self.values = rust, values
        self.rust.add_special_tokens([IMAGE_TOKEN])  # as transformers: an id past the others where it has none yet
        self.before, self.after = _template(rust) or frame
        self.padding_side: str = values.get("padding_side", "right")
        self._pad = pad

    @classmethod
    def read(cls, directory: Path) -> Tokenizer:
        """From the directory of a processor or a model.

        Raises:
            CheckpointError: there is no tokenizer, or it is damaged.
        """
        values: dict[str, Any] = {}
        for name in ("special_tokens_map.json", CONFIG):
            if (directory / name).is_file():
                values |= read_json(directory / name)
        model = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
        text: dict[str, Any] = model.get("text_config") or {}
        t5 = text.get("model_type") == "t5"
        begin, end, pad = (_one(text.get(f"{role}_token_id")) for role in ("bos", "eos", "pad"))
        found = vocabulary.read(directory, bos=None, pad=0, stop_ids=())
        frame = ([], [1 if end is None else end]) if t5 else ([2 if begin is None else begin], [])
        if "text_config" not in model or "Blip2ForImageTextRetrieval" in (model.get("architectures") or ()):
            frame = ([], [])
        return cls(found.rust, values, frame, pad=(0 if t5 else 1) if pad is None else pad)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`."""
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        with replacing(place / "tokenizer.json") as partial:
            self.rust.save(str(partial))
        with replacing(place / CONFIG) as partial:
            partial.write_text(json.dumps({**self.values, "padding_side": self.padding_side}, indent=2) + "\n")

    def __len__(self) -> int:
        return self.rust.get_vocab_size()

    def __getattr__(self, name: str) -> Any:
        """`pad_token`, `eos_token_id`, ...: the special tokens by their roles."""
        role = name.removesuffix("_id")
        if role not in ROLES:
            raise AttributeError(f"this tokenizer has no {name!r}")
        token = self.values.get(role)
        word = token.get("content") if isinstance(token, dict) else token
        if name == role:
            return word
        found = None if word is None else self.rust.token_to_id(str(word))
        return self._pad if name == "pad_token_id" and found is None else found

    @property
    def image_token_id(self) -> int:
        """Of the placeholder that a query of the Q-Former takes the place of."""
        return cast("int", self.rust.token_to_id(IMAGE_TOKEN))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or of each."""
        if isinstance(tokens, str):
            return self.rust.token_to_id(tokens)
        return [self.rust.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The token of an id, or of each."""
        return self.rust.id_to_token(ids) if isinstance(ids, int) else [self.rust.id_to_token(int(i)) for i in ids]

    def rows(
        self, texts: Sequence[str], *, truncation: bool = False, max_length: int | None = None, special: bool = True
    ) -> list[list[int]]:
        """Ids of each text in its frame, cut on the right where asked for."""
        before, after = (self.before, self.after) if special else ([], [])
        if truncation and max_length is None and (longest := int(self.values.get("model_max_length") or 0)) < ENDLESS:
            max_length = longest or None
        room = max_length - len(before) - len(after) if truncation and max_length is not None else None
        if room is not None and room < 0:
            raise PromptError(f"max_length leaves a text {max_length} tokens, fewer than its special ones: raise it")
        encodings = self.rust.encode_batch(list(texts), add_special_tokens=False)
        return [[*before, *encoding.ids[:room], *after] for encoding in encodings]

    def padded(self, rows: Sequence[Sequence[int]], padding: Any, max_length: int | None) -> dict[str, list[list[int]]]:
        """`input_ids` and `attention_mask`, of one length where padding is asked for."""
        if padding not in (False, None, True, "longest", "max_length", "do_not_pad"):
            raise ConfigError(f"padding {padding!r} is none; use True, 'longest', 'max_length' or False")
        width = max((len(row) for row in rows), default=0) if padding in (True, "longest") else 0
        if padding == "max_length":
            if max_length is None:
                raise ConfigError("padding='max_length' needs max_length")
            width = max_length
        lacking = [max(0, width - len(row)) for row in rows]
        pad: int = self.pad_token_id
        left = self.padding_side == "left"
        ids = [[*[pad] * n, *row] if left else [*row, *[pad] * n] for row, n in zip(rows, lacking, strict=True)]
        ones = [[1] * len(row) for row in rows]
        mask = [[*[0] * n, *row] if left else [*row, *[0] * n] for row, n in zip(ones, lacking, strict=True)]
        return {"input_ids": ids, "attention_mask": mask}

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: Any = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Ids and mask of one text or many.

        Raises:
            PromptError: no text; or rows of different lengths are to be a tensor.
        """
        texts = texts_of(text)
        rows = self.rows(texts, truncation=truncation, max_length=max_length, special=add_special_tokens)
        found = self.padded(rows, padding, max_length)
        if isinstance(text, str) and return_tensors is None:
            return BatchFeature({name: values[0] for name, values in found.items()})
        return BatchFeature(found).tensors(return_tensors)

    def encode(self, text: str, **options: Any) -> Any:
        """The ids of one text."""
        return self(text, **options)["input_ids"]

    def decode(self, ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """The text of some ids; a list for several rows.

        Args:
            ids: a list or tensor of ids, or rows of them.
        """
        options.pop("clean_up_tokenization_spaces", None)  # done by no tokenizer of these models
        if options:
            raise ConfigError(f"decode: blip2 has no {next(iter(options))!r}; leave it out")
        plain: Any = ids.tolist() if isinstance(ids, Tensor) or hasattr(ids, "tolist") else ids
        rows: list[Any] = [plain] if isinstance(plain, int) else list(plain)
        plain = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
        if plain and not isinstance(plain[0], int):
            return [self.decode(row, skip_special_tokens) for row in plain]
        return self.rust.decode(list(plain), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, ids: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """The texts of rows of ids."""
        return [self.decode(row, skip_special_tokens, **options) for row in ids]


def texts_of(text: str | Sequence[str]) -> list[str]:
    """One text or many, as a list.

    Raises:
        PromptError: none, or something that is no text.
    """
    texts: list[Any] = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(each, str) for each in texts):
        raise PromptError("text: give a string, or a list of strings")
    return texts


def _one(ids: Any) -> int | None:
    """A special token's id, the first where there are several."""
    found = ids[0] if isinstance(ids, list) and ids else ids
    return found if isinstance(found, int) else None


def _template(rust: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """What the tokenizer itself puts before and after a text; None where it puts nothing."""
    found = rust.encode("a", add_special_tokens=True)
    own = [place for place, special in enumerate(found.special_tokens_mask) if not special]
    if len(own) == len(found.ids) or not own:
        return None
    return found.ids[: own[0]], found.ids[own[-1] + 1 :]
