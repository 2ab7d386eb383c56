"""What the server weighs votes by: how good a client is at a prompt (competence), and whether it is to be trusted
(defence).

Legend: P prompts, B ballots to each (one of each client, or several samples of each), N clients, D embedding dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

UNKNOWN = -2
"""In `Evidence.known`: the server does not know which opinion is right."""


@dataclass(frozen=True)
class Evidence:
    """A round's answers to all prompts, as competence and defence see them, on one device.

    Attributes:
        vectors: Unit vectors of the answers, (P, B, D), floating point, perhaps memory-mapped; rows of missing answers
            may hold anything.
        present: Which answers are there, (P, B) bool.
        voters: The client of each ballot as a number from 0, (B,) int64; a client's samples are in their order.
        shares: Share of its client's draws that each ballot stands for, (P, B) float32; 0 where it is missing. A
            client's add up to less than 1 where draws are missing or were not sent.
        opinions: Which answers to a prompt are the same text, (P, B) int64: equal numbers, from 0 to B-1, are equal
            texts; -1 where an answer is missing.
        texts: The same for the answers to all prompts together, (P, B) int64, from 0 to P B - 1, or -1.
        similarity: Mean cosine of an answer to the other clients' answers, (P, B); NaN where it is missing.
        trust: How far each client was trusted after the round before, (N,) float32 from 0 to 1; 1 for new ones.
        prompts: Unit vectors of the prompts, (P, D); None where they are not embedded.
        confidence: How sure each client says that it is of each of its answers, (P, B) float32: mean log-likelihood
            (nats a token, at most 0); NaN where it does not say. None: nobody was asked.
        known: Number of the opinion that is right, (P,) int64, at prompts whose answer the server knows; -1: it knows
            it, and nobody gave it; `UNKNOWN`: it does not know. None: it knows none.
        chunks: Prompts to take together where something of the size of `vectors` would be made.
    """

    vectors: Tensor
    present: Tensor
    voters: Tensor
    shares: Tensor
    opinions: Tensor
    texts: Tensor
    similarity: Tensor
    trust: Tensor
    prompts: Tensor | None
    confidence: Tensor | None
    known: Tensor | None
    chunks: Sequence[slice]

    @property
    def num_clients(self) -> int:
        """Number N of clients."""
        return len(self.trust)

    @property
    def has_one_ballot_each(self) -> bool:
        """Whether each client has one ballot."""
        return len(self.voters) == self.num_clients

    @cached_property
    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """What clients say, each three of K: an answer to a prompt, as a number from 0 to P B - 1; a client that gives
        it; and the share of its draws that are for it. Missing answers have a share of 0."""
        num_prompts, num_ballots = self.present.shape
        rows = torch.arange(num_prompts, device=self.opinions.device)[:, None]
        answers = (self.opinions.clamp(min=0) + num_ballots * rows).flatten()
        voters, shares = self.voters.expand_as(self.present).flatten(), self.shares.flatten()
        if self.has_one_ballot_each:
            return answers, voters, shares
        keys, places = torch.unique(answers * self.num_clients + voters, return_inverse=True)
        shares = torch.zeros(len(keys), device=shares.device).index_add_(0, places, shares)
        return keys // self.num_clients, keys % self.num_clients, shares

    def rates_where_known(self) -> tuple[Tensor, Tensor]:
        """The prompts whose answer the server knows, (K,) int64, and the share of each client's draws that are right
        there, (K, N); none if it knows no answers."""
        if self.known is None:
            return self.present.new_zeros(0, dtype=torch.int64), self.shares.new_zeros(0, self.num_clients)
        at = (self.known != UNKNOWN).nonzero()[:, 0]
        right = self.opinions[at] == self.known[at, None]
        return at, self.of_clients(self.shares[at] * right)

    def without(self, ballots: Tensor) -> Evidence:
        """The same where some ballots, (P, B) bool, are missing."""
        return dataclasses.replace(
            self,
            present=self.present & ~ballots,
            shares=self.shares.masked_fill(ballots, 0.0),
            opinions=self.opinions.masked_fill(ballots, -1),
            texts=self.texts.masked_fill(ballots, -1),
            similarity=self.similarity.masked_fill(ballots, torch.nan),
        )

    def of_clients(self, values: Tensor) -> Tensor:
        """Sums over each client's ballots, (P, N), of values by ballot, (P, B)."""
        sums = values.new_zeros(len(values), self.num_clients)
        return sums.index_add_(1, self.voters, values)


class Competence(Protocol):
    """How much a client's vote weighs, by how good it seems to be at a prompt; without labels.

    A function, or a class whose objects can be called as one; parameters besides `evidence` are its options.
    """

    def __call__(self, evidence: Evidence) -> Tensor:
        """Weight of each ballot, (P, B), finite and not negative; its client's vote is multiplied by it."""
        ...


@dataclass(frozen=True)
class Ruling:
    """What a defence decides.

    Attributes:
        votes: What is left of each ballot's vote, (P, B), from 0, for one that counts for nothing and cannot be
            elected, to 1.
        trust: How far each client is trusted from now on, (N,) float32 from 0 to 1; see `Evidence.trust`.
    """

    votes: Tensor
    trust: Tensor


class Defence(Protocol):
    """Takes votes away from clients that seem to work together, or answers that are no answers.

    A function, or a class whose objects can be called as one; parameters besides `evidence` are its options. It may
    have an attribute `max_wins`, the largest share of the prompts that one client's answers may win; the rest go to
    the next best of other clients.
    """

    def __call__(self, evidence: Evidence) -> Ruling:
        """Judge the answers of a round."""
        ...


def equal(evidence: Evidence) -> Tensor:
    """Competence: every client's vote counts the same."""
    return torch.ones_like(evidence.shares)


def no_defence(evidence: Evidence) -> Ruling:
    """Defence: every vote counts, and everybody is trusted as before."""
    return Ruling(torch.ones_like(evidence.shares), evidence.trust)
