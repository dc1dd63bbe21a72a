"""`blip2 search`: the pictures of a folder, found by words or by another picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blip2.cli.console import TASK, listing, note, open_model, progress, result_json
from blip2.cli.options import Batch, Device, Dtype, Json, Model, Quantize
from blip2.errors import ImageError, PromptError

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A folder of images, searched to the bottom.", show_default=False)
]
Query = Annotated[str | None, typer.Argument(metavar="TEXT", help="What to look for, in quotes.", show_default=False)]
ByImage = Annotated[Path | None, typer.Option("--image", "-i", help="Look for what is like this.", show_default=False)]


def search(
    folder: Folder,
    text: Query = None,
    *,
    image: ByImage = None,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="How many to show.")] = 10,
    rerank: Annotated[int, typer.Option(min=0, help="So many of the best are judged once more, by matching.")] = 0,
    cache: Annotated[bool, typer.Option(help="Remember the folder's vectors for the next search.")] = True,
    json: Json = False,
    model: Model = "mini",
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Find pictures in a folder.

    By words, or by another picture. Prints path and cosine, best first, and with `--rerank` the probability that
    picture and text match. The first search of a folder encodes its images; later ones encode only what is new or
    changed.

    ```
    blip2 search holiday/ "a dog on a beach"
    blip2 search holiday/ "a red car" --top 3 --rerank 20
    blip2 search holiday/ --image photo.jpg
    ```
    """
    if (text is None) == (image is None):
        raise PromptError("say what to look for: either a text in quotes, or --image FILE")
    if not folder.is_dir():
        raise ImageError(f"{folder}: is no folder; search takes one folder, with all below it")
    from blip2 import search as index_of

    opened = open_model(model, device, dtype, quantize)
    with progress("images", None) as bars:
        index = index_of.folder_index(
            opened,
            folder,
            cache=cache,
            batch_size=batch_size,
            progress=lambda done, total: bars.update(TASK, completed=done, total=total),
        )
    for failure in index.failed:
        note(f"error: {failure.error}")
    root = folder.resolve()
    hits = index.search(text if text is not None else image, top, rerank=rerank)
    rows = [(str(folder / hit.path.relative_to(root)), hit.score, hit.itm) for hit in hits]
    if json:
        for path, score, itm in rows:
            result_json({"image": path, "score": score, **({} if itm is None else {"itm": itm})})
    else:
        cells = [(path, f"{score:.3f}", *([] if itm is None else [f"{itm:.3f}"])) for path, score, itm in rows]
        columns = ("image", "cosine", *(["match"] if rerank else []))
        listing(columns, cells, right=columns[1:])
    if index.failed:
        raise typer.Exit(1)
