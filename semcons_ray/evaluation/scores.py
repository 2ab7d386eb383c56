"""Overlap of answers with reference texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure in [0, 1] (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

    It compares the longest common subsequence of lower-cased words with the lengths of both texts, by the rouge-score
    library without stemming. Words are runs of letters a-z and digits: a text without any scores 0.
    """
    return float(_scorer().score(reference, prediction)["rougeL"].fmeasure)


def mean_rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of `rouge_l` over pairs; NaN where there are none.

    Raises:
        ValueError: The two sequences differ in length.
    """
    scores = [rouge_l(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores) if scores else float("nan")


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
