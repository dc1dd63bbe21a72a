"""LAVIS's names for its BLIP-2 models: `models` and `processors`, imported as there."""
