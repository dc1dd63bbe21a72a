"""Token sequences from any `protocols.LanguageModel`: generated, streamed, or ranked."""

from blip2.generate.batch import Prompts
from blip2.generate.engine import answer, generate
from blip2.generate.methods import Beam, BeamSample, Greedy, Limits, Method, Sample, Tokens
from blip2.generate.rank import rank
from blip2.generate.stream import follow, pieces, stream

__all__ = [
    "Beam",
    "BeamSample",
    "Greedy",
    "Limits",
    "Method",
    "Prompts",
    "Sample",
    "Tokens",
    "answer",
    "follow",
    "generate",
    "pieces",
    "rank",
    "stream",
]
