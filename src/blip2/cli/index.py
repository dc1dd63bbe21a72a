"""`blip2 index`: the vectors of images, kept for searches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2.cli.console import TASK, note, open_model, progress, result_json
from blip2.cli.options import Batch, Device, Dtype, Json, Quantize
from blip2.errors import DataError, ImageError

if TYPE_CHECKING:
    from blip2.search import ImageIndex

Place = Annotated[
    Path,
    typer.Argument(
        metavar="INDEX", help="What `blip2 index` wrote, or a folder of images, searched to the bottom.",
        show_default=False,
    ),
]  # fmt: skip
OwnModel = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", show_default=False,
        help="As everywhere; an index knows its own, for a folder it is `mini`.",
    ),
]  # fmt: skip
Cache = Annotated[bool, typer.Option(help="Remember a folder's vectors for the next time.")]


def index(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="Images, folders or patterns; none: those of before.", show_default=False),
    ] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the index.", show_default=False)],
    patches: Annotated[
        bool | None,
        typer.Option(help="Keep what re-ranking needs, so that it opens no image. [default: no]", show_default=False),
    ] = None,
    json: Json = False,
    model: OwnModel = None,
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Make an index of images, or bring it up to date.

    Encodes what is new or changed, forgets what is gone, and adds these paths to those of before. It may be stopped at
    any moment, and goes on where it was. Images that cannot be read are named on stderr, and the exit code is 1.

    ```
    blip2 index holiday/ --out holiday.index
    blip2 search holiday.index "a dog on a beach"
    ```
    """
    from blip2 import image
    from blip2.search import ImageIndex
    from blip2.search.store import Store

    if out.is_file():
        raise DataError(f"{out}: is a file, and an index is a folder; give it another name")
    store = Store(out)
    name = model
    if name is None and store.exists:
        name = store.read(mend=True).model
    name = name or "mini"
    given = paths or []
    if given or not store.exists:
        image.find_images(given)  # what is not there is said before a model is loaded
    opened = open_model(name, device, dtype, quantize)
    with progress("images", None) as bars:
        made = ImageIndex.build(
            opened,
            given,
            out,
            patches=patches,
            name=str(Path(name).resolve()) if Path(name).exists() else name,
            batch_size=batch_size,
            progress=lambda done, total: bars.update(TASK, completed=done, total=total),
        )
    if json:
        result_json({"index": str(out), "images": len(made), "unreadable": len(made.failed)})
    else:
        note(f"{out}: {len(made)} images")
    report_failures(made)


def opened_index(
    place: Path,
    *,
    model: str | None,
    cache: bool,
    batch_size: int,
    device: str,
    dtype: str,
    quantize: str | None,
) -> ImageIndex:
    """The index at a place, with its model; that of a folder's images where the place is none.

    Raises:
        ImageError: the place is neither.
    """
    from blip2.search import ImageIndex, folder_index
    from blip2.search.store import Store

    store = Store(place)
    if store.exists:
        return ImageIndex.open(place, open_model(model or store.read().model or "mini", device, dtype, quantize))
    if not place.is_dir():
        raise ImageError(f"{place}: is neither an index nor a folder; name one, a folder with all below it")
    loaded = open_model(model or "mini", device, dtype, quantize)
    with progress("images", None) as bars:
        return folder_index(
            loaded,
            place,
            cache=cache,
            batch_size=batch_size,
            progress=lambda done, total: bars.update(TASK, completed=done, total=total),
        )


def shown_path(place: Path, path: Path) -> str:
    """An image's path as a person would type it: below the folder that was named, or from here."""
    root = place.resolve()
    if path.is_relative_to(root):
        return str(place / path.relative_to(root))
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def report_failures(made: ImageIndex) -> None:
    """Name the images that could not be read; the exit code is 1 if there are any."""
    for failure in made.failed:
        note(f"error: {failure.error}")
    if made.failed:
        raise typer.Exit(1)
