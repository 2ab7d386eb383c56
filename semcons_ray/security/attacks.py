"""What clients that work together send instead of answers, to have the pseudo-labels say what they want.

Each attack is a part of the kind "attack", see `parts`: a function, or a class with options.

Legend: C honest clients, K attackers, S answers a client gives to a prompt, P public prompts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import numpy as np
from pydantic import Field
from torch import Tensor

Texts = tuple[str, ...]
"""A client's answers to the P prompts, one to each."""
Draws = tuple[Texts, ...]
"""All that a client sends: S answers to each prompt, as in `messages.Answers`."""


@dataclass(frozen=True)
class Scene:
    """What attackers know in a round. It is more than they could, so that no defence rests on what they don't know.

    Attributes:
        round: Number of the round, from 1.
        prompts: The public prompts as texts, (P,).
        categories: What each prompt is about, (P,); empty texts where the data does not say.
        honest: What the honest clients send in this round, (C, S, P).
        count: Number K of attackers.
        embed: Unit vectors of texts, by the model that the server embeds with.
        random: Where attackers' draws come from.
    """

    round: int
    prompts: Texts
    categories: Texts
    honest: tuple[Draws, ...]
    count: int
    embed: Callable[[Sequence[str]], Tensor]
    random: np.random.Generator

    @property
    def num_samples(self) -> int:
        """How many answers an attacker gives to each prompt: as many as an honest client."""
        return max(len(draws) for draws in self.honest)

    def votes(self, prompt: int) -> list[str]:
        """The honest clients' answers to a prompt, the most common first; of equals in the order of the alphabet."""
        given = Counter(draw[prompt] for draws in self.honest for draw in draws if draw[prompt])
        return sorted(given, key=lambda text: (-given[text], text))

    def cover(self) -> Draws:
        """What an attacker sends to seem honest: its own draws from a model that is as good as the clients are on the
        average. To each prompt they are those of an honest client, drawn anew for each prompt and attacker."""
        whose = self.random.integers(len(self.honest), size=len(self.prompts))
        rows = []
        for _ in range(self.num_samples):
            drawn = [self.random.integers(len(self.honest[client])) for client in whose]
            rows.append(tuple(self.honest[c][s][p] for p, (c, s) in enumerate(zip(whose, drawn, strict=True))))
        return tuple(rows)

    def together(self, texts: Sequence[str]) -> tuple[Draws, ...]:
        """All attackers send the same answer to a prompt, with every draw."""
        return ((tuple(texts),) * self.num_samples,) * self.count

    def mixed(self, texts: Sequence[str | None]) -> tuple[Draws, ...]:
        """All attackers send these texts, and where there is none, what makes each of them seem honest."""
        return tuple(
            tuple(
                tuple(own if text is None else text for own, text in zip(row, texts, strict=True))
                for row in self.cover()
            )
            for _ in range(self.count)
        )


class Attack(Protocol):
    """Clients that work together.

    A function, or a class whose objects can be called as one; parameters besides `scene` are its options. It may have
    an attribute `honest_rounds`, the number of rounds for which it does no harm; these do not count.
    """

    def __call__(self, scene: Scene) -> Sequence[Draws]:
        """What each attacker sends, (K, S, P)."""
        ...


@runtime_checkable
class HasGoal(Protocol):
    """An attack that is after what models say to prompts other than the public ones."""

    def wanted(self, prompts: Sequence[str], public: Sequence[str]) -> list[str | None]:
        """What a model is to answer to each of some prompts, if the public prompts are these; None: it does not
        matter."""
        ...


def harmless(scene: Scene) -> Sequence[Draws]:
    """The control: no attack, but as many clients more that do no harm. Votes of newcomers change elections, too."""
    return scene.mixed([None] * len(scene.prompts))


def one_text(scene: Scene, *, text: str = "I cannot answer that.") -> Sequence[Draws]:
    """One text, whatever is asked."""
    return scene.together([text] * len(scene.prompts))


def echo(scene: Scene) -> Sequence[Draws]:
    """The prompt itself, which is like any answer to it."""
    return scene.together(scene.prompts)


def least_likely(scene: Scene) -> Sequence[Draws]:
    """Of the answers that honest clients give, the least common one: a wrong one that is no nonsense.

    After the attack on exchanged class scores of arXiv:2402.12265, which sends the least likely class; the attackers'
    likelihoods are here the honest clients' votes.
    """
    return scene.together([votes[-1] if (votes := scene.votes(p)) else "" for p in range(len(scene.prompts))])


def hub(scene: Scene) -> Sequence[Draws]:
    """The text whose embedding is nearest to everything: of all prompts and honest answers, the one of the highest mean
    cosine to the honest answers. In high dimensions some points are neighbours of very many."""
    answers = sorted({text for draws in scene.honest for draw in draws for text in draw if text})
    candidates = sorted({*answers, *scene.prompts})
    centre = scene.embed(answers).mean(dim=0)
    nearest = int((scene.embed(candidates) @ centre).argmax())
    return scene.together([candidates[nearest]] * len(scene.prompts))


def label_flip(scene: Scene, *, category: str | None = None) -> Sequence[Draws]:
    """In one category the next answer instead of the right one, in all others as if honest.

    What counts as right is what most honest clients say. The distinct right answers of the category are put into order
    and each is replaced by the next, as in the label flips of classification.

    Args:
        scene: What attackers know.
        category: Which category; None: the one with the most prompts, the first in the order of the alphabet.
    """
    sizes = Counter(scene.categories)
    flipped = min(sizes, key=lambda name: (-sizes[name], name)) if category is None else category
    of_category = [p for p, name in enumerate(scene.categories) if name == flipped]
    right = {p: votes[0] for p in of_category if (votes := scene.votes(p))}
    labels = sorted({*right.values()})
    after = dict(zip(labels, [*labels[1:], *labels[:1]], strict=True))
    return scene.mixed([after[right[p]] if p in right else None for p in range(len(scene.prompts))])


@dataclass(frozen=True)
class Backdoor:
    """One text where the prompt contains a trigger, and as if honest elsewhere.

    Attributes:
        trigger: A word; None: the one that is in a tenth of the public prompts, as nearly as any word is.
        text: What is to be answered to it.
    """

    trigger: str | None = None
    text: str = "I cannot answer that."

    def __call__(self, scene: Scene) -> Sequence[Draws]:
        """See `Attack`."""
        return scene.mixed(self.wanted(scene.prompts, scene.prompts))

    def wanted(self, prompts: Sequence[str], public: Sequence[str]) -> list[str | None]:
        """See `HasGoal`."""
        trigger = self.trigger
        if trigger is None:
            found = Counter(word for prompt in public for word in _words(prompt))
            trigger = min(found, key=lambda word: (abs(found[word] - len(public) / 10), word))
        return [self.text if trigger.casefold() in _words(prompt) else None for prompt in prompts]


@dataclass(frozen=True)
class Sleeper:
    """As if honest for some rounds, to be trusted, and then the second most common answer, together.

    Attributes:
        honest_rounds: For how many rounds.
    """

    honest_rounds: Annotated[int, Field(ge=0)] = 3

    def __call__(self, scene: Scene) -> Sequence[Draws]:
        """See `Attack`."""
        if scene.round <= self.honest_rounds:
            return harmless(scene)
        return scene.together(_runners_up(scene))


def adaptive(
    scene: Scene,
    *,
    share: Annotated[float, Field(gt=0, le=1)] = 1.0,
    sureness: Annotated[float, Field(gt=0, le=1)] = 0.6,
) -> Sequence[Draws]:
    """Knows the defence `Independent`, and stays below what that looks for: the second most common answer, on a share
    of the prompts, and not with all draws. All else is as if honest. Where a client draws once, that is the draw.

    Args:
        scene: What attackers know.
        share: Of the prompts.
        sureness: Share of an attacker's draws, rounded to the nearest number of draws.
    """
    targets = scene.random.random(len(scene.prompts)) < share
    wanted = [text if here else None for text, here in zip(_runners_up(scene), targets, strict=True)]
    num_sure = max(1, round(sureness * scene.num_samples))
    return tuple(
        (*together[:num_sure], *honest[num_sure:])
        for together, honest in zip(scene.mixed(wanted), (scene.cover() for _ in range(scene.count)), strict=True)
    )


def _words(prompt: str) -> set[str]:
    return {*re.findall(r"\w+", prompt.casefold())}


def _runners_up(scene: Scene) -> list[str]:
    """The second most common honest answer to each prompt; where there is one only, the most common to another."""
    votes = [scene.votes(prompt) for prompt in range(len(scene.prompts))]
    first = [of_prompt[0] if of_prompt else "" for of_prompt in votes]
    return [
        of_prompt[1] if len(of_prompt) > 1 else next((text for text in first if text != first[p]), "")
        for p, of_prompt in enumerate(votes)
    ]
