"""How an election goes if some clients attack it: the honest answers are those of a run, and nothing is trained.

Legend: C honest clients, K attackers, S answers a client gives to a prompt, P public prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semcons_ray.consensus import Election
from semcons_ray.errors import ConfigError
from semcons_ray.evaluation.scores import exact_match
from semcons_ray.federation.server import Server, TextEmbedder, opinions_of
from semcons_ray.messages import Answers
from semcons_ray.metering.ledger import Ledger
from semcons_ray.security.attacks import Attack, Draws, Scene, Texts


@dataclass(frozen=True)
class Outcome:
    """What attackers got.

    Attributes:
        num_attackers: Number K of attackers.
        captured: Share of the prompts whose label is an answer of the attackers', not right, and not what would be
            elected without them; mean over the rounds in which they do harm.
        accuracy: Share of the prompts whose label is right, in the same rounds.
    """

    num_attackers: int
    captured: float
    accuracy: float


@dataclass(frozen=True)
class Rehearsal:
    """Elections over the stored answers of a run, with attackers added.

    Attributes:
        embedder: The server's.
        prompts: The public prompts as texts, (P,).
        categories: See `Scene`.
        references: The right answers, (P,).
        rounds: What honest clients sent, round by round, each (C, S, P). Where an attack takes longer, they say in
            further rounds what they said in the last.
        embeds_both: See `Server`.
        seed: The run's seed, of which all draws are made.
    """

    embedder: TextEmbedder
    prompts: Texts
    categories: Texts
    references: Texts
    rounds: Sequence[tuple[Draws, ...]]
    embeds_both: bool
    seed: int

    def play(self, election: Election, attack: Attack, share: float) -> Outcome:
        """Let attackers take part in every round.

        Args:
            election: Rule, competence and defence.
            attack: What attackers send.
            share: Which share of all clients they are, from 0 to under 1; to the nearest whole number of clients.

        Raises:
            ConfigError: The attack gives no answers of so many clients.
        """
        honest_rounds = getattr(attack, "honest_rounds", 0)
        num_rounds = max(len(self.rounds), honest_rounds + 1)
        count = round(share / (1 - share) * len(self.rounds[0]))
        sent = [self._sent(attack, number, count) if count else () for number in range(1, num_rounds + 1)]
        attacked = self._labels(election, sent)
        usual = self._labels(election, [()] * num_rounds) if count else attacked
        outcomes = [
            (self._captured(attacked[place], usual[place], sent[place]), self._are_right(attacked[place]))
            for place in range(honest_rounds, num_rounds)
        ]
        captured, right = np.array(outcomes, dtype=np.float64).mean(axis=(0, 2)).tolist()
        return Outcome(count, captured, right)

    def _honest(self, number: int) -> tuple[Draws, ...]:
        return self.rounds[min(number, len(self.rounds)) - 1]

    def _sent(self, attack: Attack, number: int, count: int) -> tuple[Draws, ...]:
        """What attackers send in a round."""
        scene = Scene(
            round=number,
            prompts=self.prompts,
            categories=self.categories,
            honest=self._honest(number),
            count=count,
            embed=self.embedder.embed,
            random=np.random.default_rng([self.seed, number]),
        )
        sent = tuple(attack(scene))
        shapes = {(len(draws), len(row)) for draws in sent for row in draws}
        if len(sent) != count or shapes != {(scene.num_samples, len(self.prompts))}:
            name = getattr(attack, "__name__", type(attack).__name__)
            raise ConfigError(
                f"attack {name} must give {scene.num_samples} answers of each of {count} attackers to each prompt"
            )
        return sent

    def _labels(self, election: Election, sent: Sequence[Sequence[Draws]]) -> list[list[str]]:
        """The labels of each round, an empty text where a prompt has none, if attackers send this in each."""
        rounds = [(*self._honest(number), *theirs) for number, theirs in enumerate(sent, 1)]
        server = Server(
            self.embedder,
            num_prompts=len(self.prompts),
            election=election,
            num_samples=[len(draws) for draws in rounds[0]],
            prompts=self.prompts,
            embeds_both=self.embeds_both,
            seed=self.seed,
            ledger=Ledger("server", ""),
        )
        kept, labels = b"", []
        for number, clients in enumerate(rounds, 1):
            server.begin(number, range(len(clients)), kept)
            for client, (first, *further) in enumerate(clients):
                message = Answers(
                    round_number=number, client_id=client, num_examples=1, answers=first, further=tuple(further)
                )
                server.collect(client, message.encode())
            verdict = server.conclude()
            kept = verdict.kept
            given = dict(zip(verdict.labels.prompt_ids, verdict.labels.responses, strict=True))
            labels.append([given.get(prompt, "") for prompt in range(len(self.prompts))])
        return labels

    def _are_right(self, labels: Sequence[str]) -> list[bool]:
        return [bool(label) and exact_match(label, right) == 1 for label, right in zip(labels, self.references, strict=True)]

    def _captured(self, labels: Sequence[str], usual: Sequence[str], sent: Sequence[Draws]) -> list[bool]:
        """Which labels are the attackers', not right, and not the usual ones."""
        same = opinions_of([labels, usual, *(draw for draws in sent for draw in draws)]).tolist()
        return [
            bool(label) and not right and label_ != usual_ and label_ in theirs
            for label, right, (label_, usual_, *theirs) in zip(labels, self._are_right(labels), same, strict=True)
        ]
