"""`load`: a model by its name, on a device, in a precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from blip2.device import pick_device, pick_dtype
from blip2.errors import ConfigError
from blip2.quantize import check_scheme

if TYPE_CHECKING:
    from blip2.blip2 import Blip2
    from blip2.weights.placement import Memory


def load(
    name: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    compile: bool = False,
    device_map: Literal["auto"] | Mapping[str, str | int] | None = None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    parts: Mapping[str, str | Path] | None = None,
    calibration: str | Path | bool = True,
) -> Blip2:
    """A model, ready for its verbs.

    Args:
        name: nothing for `mini`, which comes with the package; the directory of a model that blip2 or transformers
            saved; OWNER/NAME of one on the Hugging Face hub, which is downloaded once; or LAVIS's `.pth`.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, ...
        dtype: of the frozen parts: `auto` (bfloat16 on CUDA, float32 on a CPU), `float32`, `bfloat16` or `float16`.
            The bridge computes in float32, on CUDA in bfloat16 where the frozen parts do.
        quantize: `int8` or `int4` weights for the linear layers in the frozen parts' blocks, made on their way from the
            file; activations keep `dtype`. `half` is for CPUs that do not compute in 16 bits, `fp8` for new GPUs.
        compile: compile the image encoder and the Q-Former at their first call (`torch.compile`, half a minute or more
            for each of two sizes of batch), which pays over thousands of images only; not with `device_map`.
        device_map: `auto` spreads the frozen parts' blocks over `device`, the other CUDA devices and the CPU's memory,
            by what is free, and keeps the rest on disk. Or places by name, the longest that fits: {"vision": "cuda:0",
            "language.layers": 1, "language.layers.31": "disk"}; blocks are called vision.blocks.N, language.layers.N
            (OPT), language.encoder.N and language.decoder.N (T5). What lies in the CPU's memory or on disk is
            brought to `device` when it runs. None puts all on `device`.
        revision, token, offline: of a model on the hub: a branch, tag or commit; a user's token; whether to take what
            the cache has and ask nobody.
        parts: of a LAVIS file, which holds what was trained only: where its `vision`, `language` and `text` are; those
            left out are looked for beside it (`eva_vit_g.pth`, `opt-2.7b/`, `bert-base-uncased/`, ...).
        calibration: of matching probabilities. True takes the `calibration.json` of the model where there is one, False
            leaves them as the head says; or a file that `blip2 calibrate` wrote for this model.
    Raises:
        CheckpointError: no such model, or it is damaged.
        ConfigError: an argument has a value that there is not, or that does not go with the others.
        MissingExtraError: its frozen parts are not installed.
    """
    from blip2.compiling import compile_sight
    from blip2.kernels import tuned
    from blip2.weights import calibrated
    from blip2.weights.placement import Memory, check_map

    place = pick_device(device)
    half = pick_dtype(dtype, place)
    if compile and device_map is not None:
        raise ConfigError("compile: not with device_map, whose blocks move while they run; leave out one of the two")
    memory = Memory(check_scheme(quantize, place), check_map(device_map))
    model = tuned(_read(name, place, half, memory, parts, revision, token, offline, calibration is True), memory)
    if not isinstance(calibration, bool):
        model = dataclasses.replace(model, calibration=calibrated.read(Path(calibration), model.identity))
    if place.type == "cuda" and half is torch.bfloat16:  # float16's range is too small for its norms
        model.bridge.to(half)
    if compile:
        compile_sight(model)
    return model


def _read(
    name: str | Path | None,
    place: torch.device,
    half: torch.dtype,
    memory: Memory,
    parts: Mapping[str, str | Path] | None,
    revision: str | None,
    token: str | None,
    offline: bool,
    calibration: bool,
) -> Blip2:
    """A model as its files hold it."""
    from blip2.weights import calibrated, lavis
    from blip2.weights.assemble import assemble

    if str(name).endswith(lavis.SUFFIX):
        where = Path(str(name))
        model = lavis.load(where, place, half, memory, parts=parts)
    else:
        if parts:
            raise ConfigError(f"{name}: `parts` are those of a LAVIS file (.pth); other models name or hold theirs")
        where = _directory(name, revision, token, offline)
        model = assemble(where, place, half, memory)
    if not calibration:
        return model
    return dataclasses.replace(model, calibration=calibrated.beside(where, model.identity))


def _directory(name: str | Path | None, revision: str | None, token: str | None, offline: bool) -> Path:
    """Where a model lies; one on the hub is downloaded."""
    from blip2.weights import hub
    from blip2.weights.assemble import model_directory

    if name is not None and hub.is_name(str(name)):
        return hub.download(str(name), revision=revision, token=token, offline=offline)
    if revision or token:
        raise ConfigError(f"{name}: `revision` and `token` are for models on the hub, OWNER/NAME")
    return model_directory(name)
