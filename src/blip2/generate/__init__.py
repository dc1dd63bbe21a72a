"""Token sequences from any `protocols.LanguageModel`: generated, streamed, or ranked."""

from blip2.generate.engine import generate
from blip2.generate.methods import Beam, BeamSample, Greedy, Limits, Method, Sample, Tokens
from blip2.generate.rank import rank
from blip2.generate.stream import pieces, stream

__all__ = [
    "Beam",
    "BeamSample",
    "Greedy",
    "Limits",
    "Method",
    "Sample",
    "Tokens",
    "generate",
    "pieces",
    "rank",
    "stream",
]
