"""What a run cannot use of its data: counted by reason, said before the work begins, refused where it is over half."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from semcons_ray.errors import DataError

WARNED_ABOVE = 0.01
REFUSED_ABOVE = 0.5


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why something is lost.

    Attributes:
        words: What is lost, to be read after its number; names the setting behind it, if there is one.
        remedy: What the user can do about it; empty where it is part of the data's definition, and so no loss.
    """

    words: str
    remedy: str = ""


class Loss(Reason, frozen=True, kw_only=True):
    """How many are lost for a reason."""

    count: int


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """How many of something are lost, of how many, and why.

    Attributes:
        source: Whose they are, such as `data.source questions.csv`.
        what: What they are and what becomes of them, such as `rows left out`.
        total: How many there are.
        losses: One a reason, the most first; none is counted under two.
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
        """How many are lost, other than by definition."""
        return sum(loss.count for loss in self.losses if loss.remedy)

    @property
    def usable(self) -> int:
        """How many there are by the data's definition."""
        return self.total - sum(loss.count for loss in self.losses if not loss.remedy)

    @property
    def share(self) -> float:
        """Lost ones among the usable, 0 to 1."""
        return self.lost / max(self.usable, 1)

    @property
    def is_warning(self) -> bool:
        """Whether so many are lost that the user should look."""
        return self.share > WARNED_ABOVE

    def check(self) -> None:
        """Refuse to go on where too many are lost.

        Raises:
            DataError: Over half are; says what to do about the commonest reason.
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
REPEATED = Reason(words="with the prompt of an earlier row", remedy="give each prompt once in data.source")


def long_response(max_response_chars: int) -> Reason:
    """A response is over the limit."""
    return Reason(
        words=f"with a response over data.max_response_chars {max_response_chars}",
        remedy="raise data.max_response_chars",
    )
