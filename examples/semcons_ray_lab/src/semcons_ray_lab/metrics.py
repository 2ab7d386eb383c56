"""A metric of one's own: how far answers are from the length of their references."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field


@dataclass(frozen=True)
class WordsOff:
    """Words that an answer has more or fewer than its reference, up to a limit.

    A metric is a function from an answer and its reference to a number, or a class with a method `score`, as here; the
    mean over the test questions is what a run reports, with intervals. `label` is its name in tables. A sweep looks for
    high values unless `lower_is_better` is set. Fields are its options, which evaluation.metric_options gives.

    Attributes:
        most: The limit, which keeps one endless answer from deciding the mean.
    """

    label: ClassVar[str] = "words off"
    lower_is_better: ClassVar[bool] = True

    most: Annotated[int, Field(ge=1)] = 20

    def score(self, answer: str, reference: str) -> float:
        """The difference in words; NaN would leave the question out."""
        return float(min(abs(len(answer.split()) - len(reference.split())), self.most))
