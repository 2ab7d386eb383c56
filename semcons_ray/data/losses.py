"""Counts of the data that a run cannot use, by reason: shown before work begins, and refused if it is over half."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from semcons_ray.errors import DataError

WARNED_ABOVE = 0.01
REFUSED_ABOVE = 0.5


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why something is left out or cut.

    Attributes:
        words: What is lost, as read after a number ("with an empty prompt"); names the setting behind it, if any.
        remedy: What the user can do about it; empty if it is left out by the data's definition, which counts as no
            loss.
    """

    words: str
    remedy: str = ""


class Loss(Reason, frozen=True, kw_only=True):
    """A reason with the number of things lost for it."""

    count: int


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """How many things of a kind are lost, out of how many, and why.

    Attributes:
        source: Where they come from, such as `data.source questions.csv`.
        what: What they are and what happens to them, such as `rows left out`.
        total: How many there are, lost ones included.
        losses: A count for each reason, the largest first; nothing is counted under two reasons.
    """

    source: str
    what: str
    total: int
    losses: tuple[Loss, ...] = ()

    @classmethod
    def of(cls, source: str, what: str, total: int, counts: Mapping[Reason, int]) -> Tally:
        """A tally of counts by reason."""
        losses = [Loss(words=why.words, remedy=why.remedy, count=count) for why, count in counts.items() if count]
        ordered = sorted(losses, key=lambda loss: -loss.count)
        return cls(source=source, what=what, total=total, losses=tuple(ordered))

    @property
    def lost(self) -> int:
        """How many are lost, not counting what is left out by definition."""
        return sum(loss.count for loss in self.losses if loss.remedy)

    @property
    def usable(self) -> int:
        """How many there are, without what is left out by definition."""
        return self.total - sum(loss.count for loss in self.losses if not loss.remedy)

    @property
    def share(self) -> float:
        """Share of the usable ones that is lost, 0 to 1."""
        return self.lost / max(self.usable, 1)

    @property
    def is_warning(self) -> bool:
        """Whether so many are lost that the user should be warned."""
        return self.share > WARNED_ABOVE

    def check(self) -> None:
        """Check that not too many are lost.

        Raises:
            DataError: Over half are; the message says what to do about the most frequent reason.
        """
        if self.share > REFUSED_ABOVE:
            commonest = next(loss for loss in self.losses if loss.remedy)
            raise DataError(f"{self}. That is over half: {commonest.remedy}")

    def __str__(self) -> str:
        reasons = ", ".join(f"{loss.count:,} {loss.words}" for loss in self.losses if loss.remedy)
        by_design = ", ".join(f"{loss.count:,} {loss.words}" for loss in self.losses if not loss.remedy)
        said = f"{self.source}: {self.lost:,} of {self.usable:,} {self.what}"
        return said + (f" ({reasons})" if reasons else "") + (f"; by design {by_design}" if by_design else "")


NO_PROMPT = Reason(words="with an empty prompt", remedy="mend the prompts of data.source")
NO_RESPONSE = Reason(words="with an empty response", remedy="mend the responses of data.source")
TESTED = Reason(words="with a prompt of the test set", remedy="leave out of data.source what data.test_source holds")
REPEATED = Reason(words="with the prompt of an earlier row", remedy="give each prompt once in data.source")


def long_response(max_response_chars: int) -> Reason:
    """The reason that a response is longer than the limit, in characters."""
    return Reason(
        words=f"with a response over data.max_response_chars {max_response_chars}",
        remedy="raise data.max_response_chars",
    )
