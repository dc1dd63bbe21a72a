"""The sections of a recipe: what stands below its keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from blip2.data.sources import Format


class Section(BaseModel):
    """A part of a recipe: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Source(Section):
    """One data set.

    Attributes:
        path: a file, a folder, or a pattern such as `train-*.tar`.
        format: `auto` tells them apart. `webdataset` is shards, `coco` its JSON, `karpathy` that of his splits, `table`
            a CSV or JSON lines with the columns image and caption, `folder` one with a .txt beside each picture,
            `classes` names of the encoder's classes.
        split: `train`, `val` or `test`, where the format has such; of a COCO folder such as `train2017`.
        questions: JSON lines of id and questions, which join the pictures of these ids: the key in a shard, the column
            `id` of a table or else the picture's name, the path without suffix in a folder.
        images: folder of the pictures that a .json names, where it does not lie in it.
        templates: sentences in which class names stand, `{}` in their place.
        weight: its share of every batch, relative to the other sources.
    """

    path: str
    format: Format = "auto"
    split: str | None = None
    questions: str | None = None
    images: str | None = None
    templates: tuple[str, ...] | None = None
    weight: float = Field(default=1.0, gt=0)


def _sources(value: Any) -> Any:
    """`data: photos.csv` and `data: {path: photos.csv}` are lists of one."""
    items = [value] if isinstance(value, str | Mapping) else value
    return [{"path": item} if isinstance(item, str) else item for item in items] if isinstance(items, list) else value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources), Field(min_length=1)]


class Features(Section):
    """Features of the frozen encoder.

    Attributes:
        cache: folder in which they are kept, computed once; None encodes every batch anew.
        views: how many differently cropped views of a picture the cache holds.
        augment: random resized crops and flips where pictures are encoded anew; False sees every picture whole.
        unreadable: `error` stops at a picture that cannot be opened, `drop` leaves it out.
    """

    cache: Path | None = None
    views: int = Field(default=1, ge=1)
    augment: bool = True
    unreadable: Literal["error", "drop"] = "error"


class Validate(Section):
    """Held-out data, looked at while training.

    Attributes:
        data: as `data`.
        every: steps from one validation to the next; the last step is always validated.
        limit: at most this many pictures.
        select: which weights become the model at the end: those of the best validation, or the last.
    """

    data: Sources
    every: int = Field(default=500, ge=1)
    limit: int = Field(default=1000, ge=2)
    select: Literal["best", "last"] = "best"


class Losses(Section):
    """Weights of the stage-1 losses; one of weight 0 is not computed.

    Attributes:
        itc, itm, itg: contrast, matching and image-grounded text generation, of equal weight in the paper.
        diversity: not of the paper, where it is 0: keeps the queries from all saying the same about an image.
    """

    itc: float = Field(default=1.0, ge=0)
    itm: float = Field(default=1.0, ge=0)
    itg: float = Field(default=1.0, ge=0)
    diversity: float = Field(default=0.0, ge=0)


class Reward(Section):
    """Self-critical training (Rennie et al. 2017), not of the paper: CIDEr-D judges captions that the model draws.

    Those of a picture that are nearer to people's than its others become likelier. For the end of a training; every
    picture needs a caption, and several are better.

    Attributes:
        weight: beside the loss on people's own captions and answers; rewards are scaled by their spread before.
        share: share of the rows that it writes captions of: the first of each rank's part of a step, rounded up.
        samples: captions drawn of each picture.
        captions: pictures that people wrote fewer of are not judged: where names stand beside captions, 2 keeps a
            model that writes captions from answering with names.
    """

    weight: float = Field(default=1.0, gt=0)
    share: float = Field(default=1.0, gt=0, le=1)
    samples: int = Field(default=5, ge=2)
    captions: int = Field(default=1, ge=1)


class Vision(Section):
    """Training of the image encoder, which must be a ViT of our own, come from `start`.

    Attributes:
        train: whether it is trained; frozen as in pre-training where not.
        layer_decay: factor on the learning rate from each block to the one below it; 1 for the same rate everywhere.
        recompute: compute each block once more in the backward pass instead of keeping what it computed: a quarter
            slower or so, in a fraction of the memory.
    """

    train: bool = False
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    recompute: bool = False


class LoRA(Section):
    """Low-rank changes of the language model's linear layers, made by PEFT.

    Attributes:
        rank: of the matrices beside a layer.
        alpha: the changes are scaled by alpha / rank.
        targets: patterns of the names of linear layers, `*` as in file names; the head is never changed.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    targets: tuple[str, ...] = Field(default=("*",), min_length=1)
