"""`blip2 search`: pictures found by words or by another picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2.cli.console import listing, result_json
from blip2.cli.index import Cache, OwnModel, Place, opened_index, report_failures, shown_path
from blip2.cli.options import Batch, Device, Dtype, Json, Quantize, check_out, check_texts
from blip2.errors import ImageError, MissingExtraError, PromptError
from blip2.files import replacing

if TYPE_CHECKING:
    from blip2.search import Hit

Query = Annotated[str | None, typer.Argument(metavar="TEXT", help="What to look for, in quotes.", show_default=False)]
ByImage = Annotated[Path | None, typer.Option("--image", "-i", help="Look for what is like this.", show_default=False)]
Where = Annotated[
    list[str] | None,
    typer.Option(help='A condition, such as "date >= 2021-06"; all must hold.', show_default=False),
]
Table = Annotated[
    Path | None,
    typer.Option(help="CSV, JSON Lines or Parquet with a column `path`, for conditions.", show_default=False),
]


def search(
    place: Place,
    text: Query = None,
    *,
    image: ByImage = None,
    weight: Annotated[float, typer.Option(min=0, max=1, help="Of the text, where there is an image too.")] = 0.5,
    top: Annotated[int, typer.Option("--top", "-k", min=1, help="How many to show.")] = 10,
    rerank: Annotated[int, typer.Option(min=0, help="So many of the best are judged once more, by matching.")] = 0,
    where: Where = None,
    table: Table = None,
    html: Annotated[Path | None, typer.Option(help="Write a page of what was found.", show_default=False)] = None,
    cache: Cache = True,
    json: Json = False,
    model: OwnModel = None,
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Find pictures in an index or a folder.

    By words, by another picture, or by both. Prints path and similarity, best first, and with `--rerank` the
    probability that picture and text match. A folder is searched as it is now: the first search encodes its images,
    later ones only what is new or changed; an index is searched as it was made.

    Conditions compare `path`, `date` (of the last change), `size` or a column of `--table` with a value, by
    `= != < <= > >=`, or by the pattern signs `~ !~`.

    ```
    blip2 search holiday/ "a dog on a beach"
    blip2 search holiday.index "a red car" --top 3 --rerank 20 --html found.html
    blip2 search holiday.index --image photo.jpg --where 'path ~ "2021/*"'
    blip2 search holiday.index "at night" --image photo.jpg --table photos.csv --where "year >= 2020"
    ```
    """
    _check(text, image, html, where or [])
    made = opened_index(
        place, model=model, cache=cache, batch_size=batch_size, device=device, dtype=dtype, quantize=quantize
    )
    hits = made.search(
        text, top, image=image, weight=weight, rerank=rerank, where=where or [], table=table
    )  # fmt: skip
    rows = [(shown_path(place, hit.path), hit.score, hit.itm) for hit in hits]
    if json:
        for path, score, itm in rows:
            result_json({"image": path, "score": score, **({} if itm is None else {"itm": itm})})
    else:
        cells = [(path, f"{score:.3f}", *([] if itm is None else [f"{itm:.3f}"])) for path, score, itm in rows]
        columns = ("image", "cosine", *(["match"] if rerank else []))
        listing(columns, cells, right=columns[1:])
    if html:
        _write_page(html, " + ".join(str(part) for part in (text, image) if part is not None), place, hits, len(made))
    report_failures(made)


def _check(text: str | None, image: Path | None, html: Path | None, where: Sequence[str]) -> None:
    """What is wrong is said before a model is loaded."""
    from blip2.image import open as open_image
    from blip2.search.where import parse

    if text is None and image is None:
        raise PromptError("say what to look for: a text in quotes, --image FILE, or both")
    if text is not None:
        check_texts("the text to look for", text)
    if html:
        check_out(html)
    for condition in where:
        parse(condition)
    if image is not None:
        open_image(image)


def _write_page(file: Path, title: str, place: Path, hits: Sequence[Hit], count: int) -> None:
    from blip2 import image, page

    figures: list[page.Figure] = []
    for hit in hits:
        try:
            picture = image.open(hit.path)
        except (ImageError, MissingExtraError):  # it has gone since, and stays in the list without a picture
            picture = None
        value = f"{hit.score:.3f}" + ("" if hit.itm is None else f" · match {hit.itm:.3f}")
        figures.append(page.Figure(picture, value, shown_path(place, hit.path), page.file_link(hit.path)))
    content = page.document(title, f"{len(hits)} of {count} images, best first", figures)
    with replacing(file) as partial:
        partial.write_text(content, encoding="utf-8")
