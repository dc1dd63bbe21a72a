"""PaddleNLP's names for BLIP-2: see `transformers`."""
