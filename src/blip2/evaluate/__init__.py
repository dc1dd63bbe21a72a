"""Retrieval, captions and answers, measured by the field's protocols, with 95% bootstrap intervals over images."""

from blip2.evaluate.answering import Accuracy, answers, normalise
from blip2.evaluate.captioning import captions
from blip2.evaluate.estimate import Estimate
from blip2.evaluate.questions import Question, of_samples
from blip2.evaluate.ranking import Recall, belonging, ranks, rerank, retrieval
from blip2.evaluate.run import evaluate_retrieval, rank_pictures, texts_of
from blip2.evaluate.writing import (
    Written,
    evaluate_answers,
    evaluate_captions,
    vqa_kind,
    write_answers,
    write_captions,
)

__all__ = [
    "Accuracy",
    "Estimate",
    "Question",
    "Recall",
    "Written",
    "answers",
    "belonging",
    "captions",
    "evaluate_answers",
    "evaluate_captions",
    "evaluate_retrieval",
    "normalise",
    "of_samples",
    "rank_pictures",
    "ranks",
    "rerank",
    "retrieval",
    "texts_of",
    "vqa_kind",
    "write_answers",
    "write_captions",
]
