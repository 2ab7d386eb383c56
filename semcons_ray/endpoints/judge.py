"""An LLM as a judge: it compares an answer with the reference, in both orders, since judges prefer a place.

Pairwise comparison with swapped positions as in Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot
Arena" (arXiv:2306.05685). There a win must be confirmed in the other order to count; here each order counts half.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from semcons_ray.config import JudgeConfig
from semcons_ray.endpoints.endpoint import Endpoint, Missing, Request, cap_of
from semcons_ray.endpoints.kept_calls import Call
from semcons_ray.errors import UnansweredError
from semcons_ray.messages import Prompt, Turn, text_of
from semcons_ray.metering.ledger import Ledger, LedgerRow

logger = logging.getLogger(__name__)

SETTING = "evaluation.judge"
JUDGE = "judge"
"""Its name in the ledger."""

REPLY = "Reply with one word: A if answer A is better, B if answer B is better, TIE if neither is."

_VERDICT = re.compile(r"\b(A|B|TIE|Tie|tie)\b")


class Opinion(NamedTuple):
    """What the judge thinks of an answer.

    Attributes:
        score: Mean over both orders, of which a win counts 1, a tie 0.5 and a loss 0; NaN if a verdict is missing.
        agreement: Whether both orders had the same verdict, 0 or 1; NaN if one is missing.
    """

    score: float
    agreement: float


class Judge:
    """Compares answers with references.

    Args:
        options: Its settings.
        folder: Where its verdicts are kept, so that none is asked for twice, in whatever round.
        node: Name of this machine, for the ledger.

    Raises:
        ConfigError: The model, the address or the key is missing.
    """

    def __init__(self, options: JudgeConfig, folder: Path, node: str) -> None:
        self._options = options
        self._endpoint = Endpoint(options, folder, SETTING)
        self._ledger = Ledger(JUDGE, node)

    def compare(
        self, round: int, prompts: Sequence[Prompt], answers: Sequence[str], references: Sequence[str]
    ) -> list[Opinion]:
        """An opinion of each answer; an empty one has lost against any reference.

        Nothing that goes wrong with the judge ends the run: what it gives no verdict on is NaN.

        Args:
            round: The round, for the ledger and messages.
            prompts: What was asked, (A,).
            answers: The answers, (A,).
            references: What they are compared with, (A,).
        """
        given = [place for place, answer in enumerate(answers) if answer]
        requests = [
            self._request(prompts[place], *pair)
            for place in given
            for pair in ((answers[place], references[place]), (references[place], answers[place]))
        ]
        what = f"the judge, round {round}"
        with self._ledger.stage("evaluate", round=round) as work:
            try:
                replies = self._endpoint.ask(requests, what)
            except UnansweredError as error:
                logger.warning("%s; the metric judge is NaN", error)
                return [Opinion(math.nan, math.nan) if answer else LOST for answer in answers]
            calls = {reply.key: reply for reply in replies if isinstance(reply, Call) and reply.task == what}.values()
            work.tokens = sum(call.tokens for call in calls)
            work.cost_usd = sum(call.usd for call in calls)
            work.note = cap_of(replies)
        opinions = [LOST] * len(answers)
        for number, place in enumerate(given):
            opinions[place] = _opinion(_points(replies[2 * number], "A"), _points(replies[2 * number + 1], "B"))
        if unread := sum(math.isnan(opinion.score) for opinion in opinions):
            logger.warning("%s: no verdict on %d of %d answers", what, unread, len(answers))
        return opinions

    def take_rows(self) -> list[LedgerRow]:
        """Ledger rows of work since the last call."""
        return self._ledger.take()

    def close(self) -> None:
        """Close connections."""
        self._endpoint.close()

    def _request(self, prompt: Prompt, first: str, second: str) -> Request:
        asked = f"Question:\n{text_of(prompt)}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n{REPLY}"
        turns = (Turn("system", self._options.instructions), Turn("user", asked))
        return Request(task=JUDGE, turns=turns, max_tokens=self._options.max_tokens)


LOST = Opinion(0.0, math.nan)
"""The opinion of an empty answer, for which nobody is asked."""


def _points(reply: Call | Missing, mine: str) -> float:
    """1 if the answer in this place won, 0.5 for a tie, 0 if it lost; NaN if the verdict is missing or unreadable."""
    found = {verdict.upper() for verdict in _VERDICT.findall(reply.answer)} if isinstance(reply, Call) else set()
    if len(found) != 1:
        return math.nan
    (verdict,) = found
    return 0.5 if verdict == "TIE" else float(verdict == mine)


def _opinion(first: float, second: float) -> Opinion:
    if math.isnan(first) or math.isnan(second):
        return Opinion(math.nan, math.nan)
    return Opinion((first + second) / 2, float(first == second))
