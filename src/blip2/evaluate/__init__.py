"""Retrieval, captions and answers, measured by the field's protocols, with 95% bootstrap intervals over images."""

from blip2.evaluate.answering import Accuracy, answers, normalise
from blip2.evaluate.captioning import captions
from blip2.evaluate.estimate import Estimate
from blip2.evaluate.ranking import Recall, belonging, ranks, rerank, retrieval
from blip2.evaluate.run import evaluate_answers, evaluate_captions, evaluate_retrieval, texts_of

__all__ = [
    "Accuracy",
    "Estimate",
    "Recall",
    "answers",
    "belonging",
    "captions",
    "evaluate_answers",
    "evaluate_captions",
    "evaluate_retrieval",
    "normalise",
    "ranks",
    "rerank",
    "retrieval",
    "texts_of",
]
