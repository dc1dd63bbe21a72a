"""A language model, or an image encoder, in a local directory that transformers can load.

The directory is not trusted: no code of its own is run and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, PositiveFloat, ValidationError

from blip2.adapters.parts import require
from blip2.adapters.transformers_lm import TransformersLM
from blip2.adapters.transformers_vision import TransformersVision, image_side
from blip2.config import describe
from blip2.errors import CheckpointError
from blip2.text import Tokenizer

PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second of models that read texts too
PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and deviation where pixels are not normalised
LARGEST_SIDE = 2048  # pixels of a square that is believed


def load(directory: Path) -> tuple[TransformersLM, Tokenizer]:
    """Model and tokenizer.

    Args:
        directory: with config.json, safetensors and tokenizer.json; decoder-only or encoder-decoder. The weights keep
            the type that they are stored in.
    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: a file or tensor is missing or damaged, or the model needs code of its own. Tensors beyond
            the language model's, such as a vision tower's, are left out.
    """
    transformers, config = _open(directory, "a language model of transformers")
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model, lacking = _read(transformers, directory, kind, config, "auto")
    _refuse(directory, lacking)
    return TransformersLM(model), _tokenizer(directory, model.generation_config)


def load_encoder(directory: Path) -> TransformersVision:
    """An image encoder, in float32.

    Args:
        directory: with config.json, safetensors and what its image processor saved; a model of images and texts, such
            as CLIP, gives its image side.
    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: as `load`, or the image processor's file is missing or of a kind that is not known here.
        ConfigError: it is no image encoder.
    """
    transformers, config = _open(directory, "an image encoder of transformers")
    pixels = _processor(directory)
    model, lacking = _read(transformers, directory, transformers.AutoModel, config, torch.float32)
    side = "" if image_side(model) is model else "vision_model."
    unused = (f"{side}pooler.", f"{side}head.")  # of one vector for the whole picture, which a bridge does not read
    _refuse(directory, [name for name in lacking if name.startswith(side) and not name.startswith(unused)])
    size = pixels.side or getattr(image_side(model).config, "image_size", None)
    if not isinstance(size, int):
        raise CheckpointError(f"{directory}: neither its image processor nor config.json says how large pictures are")
    mean, std = (pixels.image_mean, pixels.image_std) if pixels.do_normalize else PLAIN
    return TransformersVision(model, size, mean, std)


def weights(directory: Path) -> list[Path]:
    """The files that a part is known by: its weights, and what its image processor saved, if it has one.

    Raises:
        CheckpointError: there are no weights.
    """
    if files := sorted(directory.glob("*.safetensors")):
        processors = [directory / name for name in PROCESSORS if (directory / name).is_file()]
        return files + processors[:1]
    raise CheckpointError(f"{directory}: no *.safetensors here; save the model with save_pretrained first")


def _tokenizer(directory: Path, ids: Any) -> Tokenizer:
    """tokenizer.json with the special ids of the model's generation settings."""
    if ids.eos_token_id is None:
        raise CheckpointError(f"{directory}: neither config.json nor generation_config.json has an eos_token_id")
    stops: list[int] = ids.eos_token_id if isinstance(ids.eos_token_id, list) else [ids.eos_token_id]
    fill = stops[0] if ids.pad_token_id is None else ids.pad_token_id
    return Tokenizer.from_file(directory / "tokenizer.json", bos=ids.bos_token_id, pad=fill, stop_ids=tuple(stops))


class _Processor(BaseModel):
    """What an image processor of transformers does to a picture, as far as it matters here."""

    image_mean: tuple[float, float, float] = PLAIN[0]
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = PLAIN[1]
    do_center_crop: bool = True
    do_flip_channel_order: bool = False
    do_normalize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    size: dict[str, int | None] | int | None = None
    crop_size: dict[str, int | None] | int | None = None

    @property
    def side(self) -> int | None:
        """Of the square that pictures are cut to, or resized to where they are not cut."""
        for size in (self.crop_size if self.do_center_crop else None, self.size):
            found = (size.get("height") or size.get("shortest_edge")) if isinstance(size, dict) else size
            if found is not None and 0 < found <= LARGEST_SIDE:
                return found
        return None


def _processor(directory: Path) -> _Processor:
    """How the encoder wants its pixels."""
    place = next((directory / name for name in PROCESSORS if (directory / name).is_file()), directory / PROCESSORS[0])
    try:
        values = json.loads(place.read_bytes())
        values = values.get("image_processor", values)
        found = _Processor.model_validate({key: value for key, value in values.items() if value is not None})
    except OSError as error:
        raise CheckpointError(
            f"{place}: cannot be read ({error.strerror}); save the image processor beside the model, which says how "
            "pixels are normalised"
        ) from None
    except ValidationError as error:
        raise CheckpointError(f"{place}: {describe(error)}") from None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}: is no image processor's: {error}") from None
    if found.do_flip_channel_order or not found.do_rescale:
        raise CheckpointError(f"{place}: pixels in the order BGR, or not scaled to 0..1, are not known here")
    if not math.isclose(found.rescale_factor, 1 / 255, rel_tol=1e-3):
        raise CheckpointError(f"{place}: rescale_factor {found.rescale_factor} is not 1/255; normalise by mean and std")
    for size in (found.size, found.crop_size):
        if isinstance(size, dict) and size.get("height") != size.get("width"):
            raise CheckpointError(f"{place}: {size} is no square, and pictures are cut to squares here")
    return found


def _open(directory: Path, feature: str) -> tuple[Any, Any]:
    """transformers, and the configuration of the model in a directory."""
    weights(directory)
    transformers = require("transformers", feature)
    try:
        return transformers, transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises what the file made it stumble over
        raise CheckpointError(f"{directory}: transformers cannot load it: {error}") from error


def _read(transformers: Any, directory: Path, kind: Any, config: Any, dtype: object) -> tuple[Any, list[str]]:
    """The model, and the names of its tensors that are missing or have another shape."""
    try:
        with _without_bar(transformers.utils.logging):
            model, report = kind.from_pretrained(
                directory,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused by name
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # as above
        raise CheckpointError(f"{directory}: transformers cannot load it: {error}") from error
    return model, sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])


def _refuse(directory: Path, lacking: list[str]) -> None:
    if lacking:
        raise CheckpointError(f"{directory}: tensors are missing or have another shape: {', '.join(lacking)}")


@contextmanager
def _without_bar(logging: Any) -> Generator[None]:
    """transformers draws a bar for each load, a second of it or less; the setting is global and goes back."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
