"""Scores of an answer against its reference, each from 0 to 1, of which 1 is best."""

from __future__ import annotations

import math
import re
import string
from decimal import Decimal
from functools import cache
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(
    r"(?:(?<![\w).])([-+])[$€£]?)?"  # no sign where it stands between two words or numbers, as in 10-12
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]*\.?[0-9]+)"
    r"(e[-+]?[0-9]{1,3}(?![0-9]))?",
    re.IGNORECASE,
)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F-measure (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries").

    It compares the longest common subsequence of lower-cased words with the lengths of both texts, by the rouge-score
    library without stemming. Words are runs of letters a-z and digits: a text without any scores 0.
    """
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


def exact_match(answer: str, reference: str) -> float:
    """Whether both are the same text, normalised as by the evaluation script of SQuAD (Rajpurkar et al. 2016): in lower
    case, without punctuation, without the articles a, an and the, and with single spaces."""
    return float(_normalised(answer) == _normalised(reference))


def numeric_match(answer: str, reference: str) -> float:
    """Whether the last number of an answer equals the last of the reference, as is usual for GSM8K, whose references
    end in "#### 3"; NaN if the reference has no number.

    1,000 equals 1000, and 3.0 equals 3. The minus sign may be a hyphen or U+2212.
    """
    wanted = _last_number(reference)
    return math.nan if wanted is None else float(_last_number(answer) == wanted)


def chrf(answer: str, reference: str) -> float:
    """chrF2, an F-score of character n-grams up to 6 (Popović 2015), of one answer, by sacrebleu's defaults.

    sacrebleu gives it from 0 to 100.
    """
    return float(_chrf_scorer().sentence_score(answer, [reference]).score) / 100


def _normalised(text: str) -> str:
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    return Decimal("".join(found[-1]).replace(",", "")) if found else None


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()
