"""`blip2 embed`: vectors of images, in a file."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blip2.cli.console import note, of_readable, open_model
from blip2.cli.options import Batch, Device, Dtype, Model, Paths, Quantize, check_out
from blip2.errors import ConfigError
from blip2.files import replacing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from blip2 import bulk

FORMATS = (".npz", ".safetensors")


def embed(
    paths: Paths,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="A .npz or a .safetensors file.", show_default=False)],
    model: Model = "mini",
    batch_size: Batch = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
) -> None:
    """Write the vectors of images to a file.

    The file holds `vectors` in the image-text space, float32[N, Q, E] of unit length, and the N paths: as the array
    `paths` in a .npz, as JSON in the metadata of a .safetensors. The cosine of an image and a text is the largest
    over the image's Q vectors. Images that cannot be read are named on stderr and left out, and the exit code is 1.
    Ctrl-C writes what is done.

    ```
    blip2 embed holiday/ --out holiday.npz
    blip2 embed a.jpg b.jpg --out two.safetensors
    ```
    """
    from blip2 import image
    from blip2.batching import BatchSize

    if out.suffix not in FORMATS:
        raise ConfigError(f"{out}: write to a file that ends in {' or '.join(FORMATS)}")
    check_out(out)
    files = image.find_images(paths)
    opened = open_model(model, device, dtype, quantize)
    done: list[str] = []
    failed: list[bulk.Failure] = []
    vectors: list[NDArray[np.float32]] = []
    try:
        size = BatchSize(batch_size, opened.device)
        with closing(of_readable(opened.embed_images, files, opened.transform, size, failed)) as stream:
            for path, row in stream:
                vectors.append(row.cpu().numpy())
                done.append(str(path))
    finally:
        if done:
            _write(out, done, vectors)
            note(f"{out}: {len(done)} of {len(files)} images")
    if failed:
        raise typer.Exit(1)


def _write(out: Path, names: list[str], rows: list[NDArray[np.float32]]) -> None:
    """All or nothing: the old file stays until the new one is whole."""
    import numpy as np
    from safetensors.numpy import save

    vectors = np.stack(rows)
    with replacing(out) as partial:
        if out.suffix == ".npz":
            with partial.open("wb") as file:
                np.savez(file, vectors=vectors, paths=np.array(names))
        else:
            partial.write_bytes(save({"vectors": vectors}, {"paths": json.dumps(names, ensure_ascii=False)}))
