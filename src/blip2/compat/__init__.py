"""The names that people already type for transformers, LAVIS and PaddleNLP: thin faces over blip2's own parts.

Nothing in the package imports this.
"""
