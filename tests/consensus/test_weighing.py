"""Votes that do not all count the same: competence gives them weights, a defence takes some away."""

from typing import Any

import pytest
import torch
from torch import Tensor

from semcons_ray.consensus import Consensus, Election, Facts, form_consensus
from semcons_ray.consensus.evidence import Evidence, Ruling
from semcons_ray.errors import ConfigError

UP, RIGHT, LEFT = [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]
GIVEN = torch.tensor([[1.0, 1.0, 5.0], [1.0, 1.0, 1.0]])


def given(evidence: Evidence) -> Tensor:
    """Competence: weights that are written above."""
    return GIVEN


def negative(evidence: Evidence) -> Tensor:
    return -torch.ones_like(evidence.shares)


def of_clients(evidence: Evidence) -> Tensor:
    return evidence.shares[:, :1]


def bars_the_last(evidence: Evidence) -> Ruling:
    """Defence: the last ballot has no vote, and its client's trust is halved."""
    votes = torch.ones_like(evidence.shares)
    votes[:, -1] = 0
    trust = evidence.trust.clone()
    trust[evidence.voters[-1]] /= 2
    return Ruling(votes, trust)


def bars_all(evidence: Evidence) -> Ruling:
    return Ruling(torch.zeros_like(evidence.shares), evidence.trust)


def own(name: Any) -> str:
    return f"{__name__}:{name.__name__}"


def form(election: Election, vectors: Tensor, **more: Any) -> Consensus:
    mask = torch.ones(vectors.shape[:2], dtype=torch.bool)
    priority = torch.arange(vectors.shape[1]).flip(0).expand_as(mask)  # the first of equals wins
    return form_consensus(vectors, mask, election, priority, Facts(**more))


TWO_AGAINST_ONE = torch.tensor([[UP, UP, RIGHT], [UP, UP, RIGHT]])


@pytest.mark.parametrize("rule", ["plurality", "geometric_median", "weighted_medoid"])
def test_a_vote_of_great_weight_outvotes_two(rule: str) -> None:
    weights = {"weights": torch.ones(3)} if rule == "weighted_medoid" else {}
    alike = form(Election(rule), TWO_AGAINST_ONE, **weights)
    assert alike.winner.tolist() == [0, 0]
    weighed = form(Election(rule, competence=own(given)), TWO_AGAINST_ONE, **weights)
    assert weighed.winner.tolist() == [2, 0]
    # 3 votes in all: 5 parts of 7 are the third client's.
    torch.testing.assert_close(weighed.votes, torch.tensor([[3 / 7, 3 / 7, 15 / 7], [1, 1, 1]]))
    # What is told of agreement is of the answers as they are, whatever votes weigh.
    assert torch.equal(weighed.similarity, alike.similarity)
    assert weighed.agreement.tolist() == [0, 0.5]


def test_the_medoid_is_that_of_weighted_votes() -> None:
    """e_0 = up, e_1 = right, e_2 = left, with weights 1, 1, 5: the mean cosine of up to the others is 0, of right
    -5/6, of left -1/2; but with the first client's vote at 1 and those of the others alike, up stays in the middle."""
    vectors = torch.tensor([[UP, RIGHT, LEFT], [UP, RIGHT, LEFT]])
    assert form(Election(competence=own(given)), vectors).winner.tolist() == [0, 0]
    near = torch.tensor([[UP, RIGHT, [0.6, 0.8]], [UP, RIGHT, [0.6, 0.8]]])
    # Second prompt, all alike: (0 + .8) / 2, (0 + .6) / 2, (.8 + .6) / 2. First: the third's cosines count 5 times for
    # the others: (0 + 5 * .8) / 6 = .667, (0 + 5 * .6) / 6 = .5, (.8 + .6) / 2 = .7.
    assert form(Election(competence=own(given)), near).winner.tolist() == [2, 2]


def test_weights_that_are_all_alike_change_no_bit() -> None:
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(50, 6, 8), dim=2)
    for rule in ("medoid", "plurality", "geometric_median", "trimmed", "multi_krum"):
        alike, weighed = (form(Election(rule, defence=name), vectors) for name in ("none", own(bars_none)))
        assert torch.equal(alike.winner, weighed.winner), rule


def bars_none(evidence: Evidence) -> Ruling:
    return Ruling(torch.full_like(evidence.shares, 0.5), evidence.trust)


@pytest.mark.parametrize("rule", ["medoid", "plurality", "random_client", "longest"])
def test_an_answer_whose_vote_was_taken_away_is_not_elected_and_does_not_count(rule: str) -> None:
    vectors, facts = torch.tensor([[UP, RIGHT, RIGHT]] * 2), Facts(lengths=torch.tensor([[1, 1, 9]] * 2))
    priority = torch.tensor([[1, 2, 3]] * 2)  # the last is drawn
    election = Election(rule, defence=own(bars_the_last))
    consensus = form_consensus(vectors, torch.ones(2, 3, dtype=torch.bool), election, priority, facts)
    assert consensus.winner.tolist() == [1, 1]
    assert consensus.votes.tolist() == [[1, 1, 0]] * 2
    assert consensus.trust.tolist() == [1, 1, 0.5]
    assert consensus.abstained.tolist() == [False, False]
    election = Election(rule, defence=own(bars_the_last), min_votes=3)
    consensus = form_consensus(vectors, torch.ones(2, 3, dtype=torch.bool), election, priority, facts)
    assert consensus.abstained.tolist() == [True, True]  # only two votes count


def second_without_the_last(evidence: Evidence) -> Tensor:
    """Competence: the second client's weight, if nothing of the last one's answers is there."""
    unheard = not evidence.present[:, -1].any() and evidence.shares[:, -1].sum() == 0 and bool(
        (evidence.opinions[:, -1] == -1).all()
    )
    return torch.tensor([1.0, 5.0 if unheard else 1.0, 1.0]).expand_as(evidence.shares)


def test_competence_goes_by_answers_that_have_a_vote() -> None:
    vectors = torch.tensor([[UP, RIGHT, LEFT]])
    competence = own(second_without_the_last)
    assert form(Election("plurality", competence=competence), vectors).winner.tolist() == [0]
    barred = form(Election("plurality", competence=competence, defence=own(bars_the_last)), vectors)
    assert barred.winner.tolist() == [1]
    torch.testing.assert_close(barred.votes, torch.tensor([[1 / 3, 5 / 3, 0]]))


def test_where_no_vote_is_left_nothing_is_elected() -> None:
    consensus = form(Election("plurality", defence=own(bars_all)), TWO_AGAINST_ONE)
    assert consensus.winner.tolist() == [-1, -1]
    assert consensus.abstained.tolist() == [True, True]


@pytest.mark.parametrize(
    ("competence", "says"),
    [
        (negative, "test_weighing:negative gives weights that are negative or not finite"),
        (of_clients, r"test_weighing:of_clients gives \(2, 1\) float32, not weights of shape \(2, 3\)"),
    ],
)
def test_what_are_no_weights_is_refused(competence: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        form(Election(competence=own(competence)), TWO_AGAINST_ONE)
