"""What a loaded model multiplies with on this machine: chosen when it is loaded, and told to whoever asks.

`packed` and `quantize` ask the device what it has; here is when they do, and what came of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from blip2.device import computes, fit_threads
from blip2.model.language import Language
from blip2.packed import pack_layers, reads_packed
from blip2.products import multiplies_half, multiplies_whole_numbers, packing, reads_int8
from blip2.quantize import quantize_head
from blip2.quantize.fp8 import Fp8Linear, multiplies_fp8
from blip2.quantize.int4 import reads_int4, reads_tiles
from blip2.quantize.int8 import Int8Linear
from blip2.quantize.linear import QuantLinear

if TYPE_CHECKING:
    from blip2.blip2 import Blip2
    from blip2.weights.placement import Memory

CPU = torch.device("cpu")
PLAINLY, HALVES = "made plain piece by piece", "activations in two halves of 8 bits"


def tuned(model: Blip2, memory: Memory) -> Blip2:
    """The same model with a coarse head where its blocks are, and its weights laid out for the device's products.

    Args:
        memory: as it was loaded; what was given a place, on disk perhaps, stays as it is.
    """
    if memory.quantize in ("int8", "fp8", "int4") and isinstance(model.language, nn.Module):
        for part in model.language.modules():
            if isinstance(part, Language):
                quantize_head(part, model.device)
    if isinstance(model.encoder, nn.Module):
        for part in model.encoder.modules():
            if isinstance(part, Fp8Linear) or (isinstance(part, Int8Linear) and model.device.type == "cpu"):
                part.one_half = True  # its rows are many, and no word hangs on one of them
    if model.device.type == "cpu":
        fit_threads()
    if model.device.type == "cpu" and memory.device_map is None:
        pack_layers(model.encoder, model.bridge, model.language)
    if model.device.type == "cuda":
        for module in (model.encoder, model.language):
            for part in module.modules() if isinstance(module, nn.Module) else ():
                if isinstance(part, QuantLinear):
                    part.pack()
    return model


def chosen() -> dict[str, str]:
    """What this CPU multiplies the weights of each precision with, in words."""
    kind = packing()
    whole = f"packed by {kind.name}, " if kind else ""
    few = "weight-only kernel for few rows, " if reads_int8() else ""
    block = reads_int4()
    return {
        "float32": "packed by oneDNN" if reads_packed(torch.float32) else "as stored",
        "bfloat16": _half(),
        "half": "fbgemm, float32 activations" if multiplies_half() else PLAINLY,
        "int8": whole + HALVES if multiplies_whole_numbers("cpu") else few + PLAINLY,
        "fp8": PLAINLY,
        "int4": f"weight-only kernel, blocks of {block}" if block else PLAINLY,
    }


def chosen_on_cuda() -> dict[str, str]:
    """What a CUDA device multiplies coarse weights with, in words; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    return {
        "int8": HALVES if multiplies_whole_numbers("cuda") else PLAINLY,
        "fp8": HALVES if multiplies_fp8("cuda") else PLAINLY,
        "int4": "weight-only kernel, in tiles" if reads_tiles("cuda") else PLAINLY,
    }


def _half() -> str:
    if not computes(torch.bfloat16, CPU):
        return "emulated: float32 is faster here"
    return "packed by oneDNN" if reads_packed(torch.bfloat16) else "as stored"
