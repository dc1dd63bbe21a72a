"""Where a checkpoint is, how it is named, and how it comes in and out."""

from blip2.weights.load import load
from blip2.weights.save import save, save_model

__all__ = ["load", "save", "save_model"]
