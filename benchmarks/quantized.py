"""int8, fp8 and int4 weights at full size: how far the logits go with outliers, and Flan-T5-XXL in 24 GB.

    python -m benchmarks.quantized outliers [--threads N]
    python -m benchmarks.quantized answer FOLDER [--preset pretrain_flant5xxl] [--quantize int8] [--threads N]

`outliers`: one layer of OPT-2.7b's widths after another (made-up weights), fed with activations of which a few channels
are 40 to 60 times the rest; the error of what the head makes of it, against float32: of these weights as they are here,
of the same weights multiplied in float32 ("weight-only"), and of 8-bit activations, one scale a row, beside them. fp8
is made plain on a CPU; "multiplied" is what a GPU does with it.
2 GB of memory, a minute.

`answer`: writes the geometry's shards (25 GB) into FOLDER where they are not there yet, loads them coarse and answers a
question about a picture, one token after another. Memory is what no file backs, and the most that was resident at all.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import geometry
from benchmarks.loading import AnonymousMemory
from blip2.config import OPT_2_7B, PRESETS
from blip2.loading import load
from blip2.model.opt import OPT
from blip2.quantize import SCHEMES, check_scheme, quantize_layers
from blip2.quantize.fp8 import Fp8Linear, by_fp8
from blip2.quantize.linear import QuantLinear

LAYERS, VOCABULARY = 2, 4096
OUTLIERS = {11: 60.0, 512: 40.0, 1033: 50.0, 2047: 45.0}  # channels, and how many times the rest
CHANGES = ("int8", "int8 weight-only", "int8 weights and activations", "fp8", "fp8 multiplied in two halves",
           "fp8 multiplied in one half", "int4", "int4 weight-only")  # fmt: skip
CPU = torch.device("cpu")


class Dynamic(nn.Module):
    """int8 weights and int8 activations, one scale a row: what outliers break."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return F.linear((x / step).round() * step, self.weight, self.bias)


def model() -> OPT:
    """A few layers of OPT-2.7b's widths, whose norms give outliers in the same channels, as real ones do."""
    torch.manual_seed(0)
    config = type(OPT_2_7B)(layers=LAYERS, vocab_size=VOCABULARY)
    made = OPT(config)
    for name, parameter in made.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=geometry.STD)
        elif name.endswith("norm.weight") and name != "norm.weight":
            for channel, times in OUTLIERS.items():
                parameter[channel] = times
    return made


def with_layers(made: OPT, change: str) -> OPT:
    """The same model with its linear layers changed: coarse, made plain again, or with coarse activations."""
    scheme = check_scheme(change.split()[0], CPU)
    assert scheme is not None
    quantize_layers(made, scheme, CPU)
    if change in SCHEMES:
        return made
    for name, layer in list(made.named_modules()):
        if isinstance(layer, Fp8Linear):
            one = change.endswith("one half")
            layer.product = functools.partial(by_fp8, weight=layer.weight, scale=layer.scale, one=one)
            continue
        if isinstance(layer, QuantLinear):
            weight = torch.cat(list(layer.plain(torch.float32)))
            assert layer.bias is not None
            if change.endswith("weight-only"):
                plain = nn.Linear(weight.shape[1], weight.shape[0])
                plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
                made.set_submodule(name, plain)
            else:
                made.set_submodule(name, Dynamic(weight, layer.bias))
    return made


@torch.inference_mode()
def outliers() -> None:
    """Print the table."""
    prefix = torch.randn(2, 45, OPT_2_7B.width, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([45, 33])

    def logits(of: OPT) -> Tensor:
        first, cache = of.prefill(prefix, lengths)
        return torch.cat([first, of.step(first.argmax(-1), cache)])

    with torch.inference_mode(False), torch.no_grad():
        exact = model()
    expected = logits(exact)
    for change in CHANGES:
        with torch.inference_mode(False), torch.no_grad():
            changed = with_layers(model(), change)
        found = logits(changed)
        error = float((found - expected).norm() / expected.norm())
        apart = (F.log_softmax(expected, -1) - F.log_softmax(found, -1)) * expected.softmax(-1)
        kl = float(apart.sum(-1).mean())
        print(f"{change}: error {error:.4f}, KL {kl:.2e}", flush=True)


def answer(folder: Path, preset: str, quantize: str) -> None:
    """Load and answer; print seconds and memory."""
    geometry.write(PRESETS[preset], folder)
    memory, start = AnonymousMemory(), time.perf_counter()
    loaded = load(folder, device="cpu", dtype="bfloat16", quantize=quantize)
    seconds = time.perf_counter() - start
    peak = memory.stop()
    parts = [part for part in (loaded.encoder, loaded.bridge, loaded.language) if isinstance(part, nn.Module)]
    size = sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    print(f"{preset}, {quantize}: weights {size / 1e9:.2f} GB, loaded in {seconds:.0f} s, anonymous memory at most")
    print(f"  {peak / 1e9:.2f} GB: {peak / size:.2f} of the weights", flush=True)
    memory, start = AnonymousMemory(), time.perf_counter()
    features = loaded.encode(geometry.picture())
    seen = time.perf_counter() - start
    found = loaded.ask(features, "w11 w12 w13 ?", num_beams=1, max_new_tokens=10, min_new_tokens=10, details=True)[0]
    seconds = time.perf_counter() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"  picture seen in {seen:.1f} s, answer of {len(found.ids)} tokens after {seconds:.1f} s: {found.text!r}")
    print(f"  {memory.stop() / 1e9:.2f} GB more while answering; at most {most / 1e9:.2f} GB resident, with file pages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("outliers", "answer"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--preset", default="pretrain_flant5xxl")
    parser.add_argument("--quantize", choices=SCHEMES, default="int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "outliers":
        outliers()
    elif given.folder is None:
        parser.error("answer needs a FOLDER")
    else:
        answer(given.folder, given.preset, given.quantize)


if __name__ == "__main__":
    main()
