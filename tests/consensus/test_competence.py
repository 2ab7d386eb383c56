"""Competence from answers alone: a case by hand, the definition in loops, and what may make no difference."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from semcons_ray.consensus import Election, Facts, form_consensus
from semcons_ray.consensus.competence import expertise, sentinels
from semcons_ray.consensus.evidence import UNKNOWN, Evidence
from semcons_ray.errors import ConfigError


def evidence(answers: list[list[str]], voters: list[int] | None = None, prompts: Tensor | None = None) -> Evidence:
    """Evidence of answers by ballot and prompt, where an empty text is missing; prompts are all alike unless given."""
    num_ballots, num_prompts = len(answers), len(answers[0])
    numbers: dict[str, int] = {}
    texts = torch.tensor([[numbers.setdefault(text, len(numbers)) for text in ballot] for ballot in answers]).T
    present = torch.tensor([[bool(text) for text in ballot] for ballot in answers]).T
    of_clients = torch.arange(num_ballots) if voters is None else torch.tensor(voters)
    opinions = (texts[:, :, None] == texts[:, None, :]).int().argmax(dim=2)
    num_clients = int(of_clients.max()) + 1
    counts = torch.zeros(num_prompts, num_clients).index_add_(1, of_clients, present.float())
    return Evidence(
        vectors=torch.zeros(num_prompts, num_ballots, 1),
        present=present,
        voters=of_clients,
        shares=present / counts[:, of_clients].clamp(min=1),
        opinions=opinions.where(present, -1),
        texts=texts.where(present, -1),
        similarity=torch.zeros(num_prompts, num_ballots),
        trust=torch.ones(num_clients),
        prompts=torch.eye(1).expand(num_prompts, 1) if prompts is None else prompts,
        confidence=None,
        known=None,
        chunks=[slice(None)],
    )


TWO_KNOW = [["a", "b", "c"], ["a", "b", "c"], ["q", "q", "q"], ["q", "q", "q"]]
"""Two clients that agree by what they know, and two that say the same whatever they are asked."""


def test_those_who_agree_by_what_they_know_get_the_weight_of_those_who_agree_by_habit() -> None:
    # At each prompt a client has one of three others with it. The first two have nobody with them at other prompts, so
    # x = 1/3; the last two are as much agreed with at any other prompt, so x = 0. Half of 1, and half of x over 1/6.
    weights = expertise(evidence(TWO_KNOW))
    torch.testing.assert_close(weights, torch.tensor([[1.5, 1.5, 0.5, 0.5]]).expand(3, 4))
    torch.testing.assert_close(expertise(evidence(TWO_KNOW), even=0.25)[0], torch.tensor([1.75, 1.75, 0.25, 0.25]))


def test_agreement_beyond_chance_over_several_samples() -> None:
    # Client 0 draws a and b for the first prompt; half of its vote is with client 1's, which says a. Nobody says the
    # same at the other prompt. Neighbours of a prompt are the other: at the first x = 0, so all are alike.
    weights = expertise(evidence([["a", "c"], ["b", "d"], ["a", "e"]], [0, 0, 1]))
    torch.testing.assert_close(weights[0], torch.full((3,), 0.5))
    # At the second: agreement at the first is 1/2 for client 0 and 1/2 for client 1, twice the mean of both prompts.
    torch.testing.assert_close(weights[1], torch.full((3,), 1.5))
    # With a third client that agrees with nobody these are 1/4 and the mean is 1/12.
    weights = expertise(evidence([["a", "c"], ["b", "d"], ["a", "e"], ["x", "y"]], [0, 0, 1, 2]))
    torch.testing.assert_close(weights[1], torch.tensor([2.0, 2.0, 2.0, 0.5]))


def test_a_client_is_expert_in_a_part() -> None:
    prompts = torch.eye(2).repeat_interleave(4, dim=0)
    knows = [[f"{part}{number}" for number in range(4)] for part in "xy"]
    odd = [[f"{client}{number}" for number in range(4)] for client in "abcd"]
    answers = [knows[0] + odd[0], knows[0] + odd[1], odd[2] + knows[1], odd[3] + knows[1]]
    weights = expertise(evidence(answers, prompts=prompts), neighbours=3)
    torch.testing.assert_close(weights[0], torch.tensor([1.5, 1.5, 0.5, 0.5]))
    torch.testing.assert_close(weights[7], torch.tensor([0.5, 0.5, 1.5, 1.5]))
    # With all other prompts as neighbours nobody is better than another anywhere.
    everywhere = expertise(evidence(answers, prompts=prompts), neighbours=7)
    assert bool((everywhere[0] - everywhere[0].flip(0)).abs().max() < 0.3)


@pytest.mark.parametrize(
    "answers", [[["a"], ["a"], ["b"]], [["a", "b"], ["c", "d"]], [["a", "b"]], [["", ""], ["", ""]]]
)
def test_where_nothing_can_be_told_all_weigh_the_same(answers: list[list[str]]) -> None:
    torch.testing.assert_close(expertise(evidence(answers)), torch.ones(len(answers[0]), len(answers)))


def random_case(seed: int) -> Evidence:
    """Five clients with up to three samples, 12 prompts, some answers missing."""
    drawn = torch.Generator().manual_seed(seed)
    voters = [0, 0, 0, 1, 2, 2, 3, 4, 4, 4]
    words = torch.randint(-1, 4, (len(voters), 12), generator=drawn).tolist()
    prompts = torch.nn.functional.normalize(torch.randn(12, 4, generator=drawn), dim=1)
    return evidence([["" if word < 0 else f"{word}" for word in ballot] for ballot in words], voters, prompts)


def in_loops(given: Evidence, neighbours: int, even: float) -> Tensor:
    """The definition, as it is written."""
    num_prompts, num_ballots = given.texts.shape
    clients = range(given.num_clients)
    votes = torch.zeros(num_prompts, given.num_clients, int(given.texts.max()) + 1, dtype=torch.float64)
    for prompt in range(num_prompts):
        for ballot in range(num_ballots):
            if given.present[prompt, ballot]:
                votes[prompt, given.voters[ballot], given.texts[prompt, ballot]] += given.shares[prompt, ballot]
    answered = votes.sum(dim=2) > 0
    pairs: dict[tuple[int, int], tuple[float, float]] = {}
    for prompt in range(num_prompts):
        for client in clients:

            def with_it(other_prompt: int, prompt: int = prompt, client: int = client) -> list[float]:
                others = [other for other in clients if other != client and answered[other_prompt, other]]
                return [float(votes[prompt, client] @ votes[other_prompt, other]) for other in others]

            here = with_it(prompt)
            there = [each for other in range(num_prompts) if other != prompt for each in with_it(other)]
            pairs[prompt, client] = (sum(here) / max(len(here), 1), sum(there) / max(len(there), 1))
    beyond = torch.zeros(num_prompts, given.num_clients)
    assert given.prompts is not None
    for prompt in range(num_prompts):
        cosines = given.prompts @ given.prompts[prompt]
        cosines[prompt] = -2
        near = cosines.topk(neighbours).indices.tolist()
        for client in clients:
            known = [pairs[other, client] for other in near if answered[other, client]]
            if known and answered[prompt, client]:
                agreement, chance = (sum(part) / len(known) for part in zip(*known, strict=True))
                beyond[prompt, client] = max((agreement - chance) / (1 - chance), 0)
    mean = beyond[answered].mean()
    return (even + (1 - even) * beyond / mean)[:, given.voters]


@pytest.mark.parametrize("seed", range(4))
def test_it_is_what_its_definition_says(seed: int) -> None:
    given = random_case(seed)
    found = expertise(given, neighbours=5, even=0.4)
    torch.testing.assert_close(found[given.present], in_loops(given, 5, 0.4)[given.present])


@pytest.mark.parametrize("seed", range(4))
def test_neither_names_nor_the_order_of_prompts_or_ballots_matter(seed: int) -> None:
    given = random_case(seed)
    weights = expertise(given, neighbours=5)
    drawn = torch.Generator().manual_seed(seed)
    names = torch.randperm(given.num_clients, generator=drawn)
    torch.testing.assert_close(expertise(replace(given, voters=names[given.voters]), neighbours=5), weights)
    ballots = torch.randperm(len(given.voters), generator=drawn)
    by_ballot = ("present", "shares", "texts", "similarity")
    moved = {name: getattr(given, name)[:, ballots] for name in by_ballot}
    places = torch.randperm(len(ballots), generator=drawn)  # which text has which number says nothing, either
    opinions = places[given.opinions[:, ballots].clamp(min=0)].where(moved["present"], -1)
    found = expertise(replace(given, **moved, voters=given.voters[ballots], opinions=opinions), neighbours=5)
    torch.testing.assert_close(found, weights[:, ballots])
    prompts = torch.randperm(len(given.texts), generator=drawn)
    by_prompt = ("vectors", "prompts", "opinions", *by_ballot)
    found = expertise(replace(given, **{name: getattr(given, name)[prompts] for name in by_prompt}), neighbours=5)
    torch.testing.assert_close(found, weights[prompts])


def test_prompts_that_are_equally_near_are_all_neighbours() -> None:
    given = evidence(TWO_KNOW)  # all are alike
    torch.testing.assert_close(expertise(given, neighbours=1), expertise(given, neighbours=2))


def test_those_who_know_win_against_more_who_do_not() -> None:
    """Two clients that know against three that always say the same: plurality elects the three's, unless weighed."""
    answers = [*TWO_KNOW, ["q", "q", "q"]]
    given = evidence(answers)
    letters = torch.tensor([[ord(text) - ord("a") for text in ballot] for ballot in answers]).T
    vectors = torch.eye(26)[letters]
    facts = Facts(opinions=given.opinions, texts=given.texts, prompts=given.prompts)
    mask, priority = torch.ones(3, 5, dtype=torch.bool), torch.arange(5.0).flip(0).expand(3, 5)
    alike = form_consensus(vectors, mask, Election("plurality"), priority, facts)
    assert alike.winner.tolist() == [2, 2, 2]
    weighed = form_consensus(vectors, mask, Election("plurality", competence="expertise"), priority, facts)
    assert weighed.winner.tolist() == [0, 0, 0]


def test_prompts_without_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the vectors of the prompts"):
        expertise(replace(evidence(TWO_KNOW), prompts=None))


def test_who_is_right_at_the_known_prompts_most_like_this_one_has_the_weight() -> None:
    """Prompts 0 and 1 are known; 2 is like 0, 3 like 1, and 4 like both. Client 0 is right at 0 in one of two draws,
    client 1 at 1; nobody says what is right at 1 but client 1."""
    prompts = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1], [0.5**0.5, 0.5**0.5]])
    given = evidence([["a", *"xxxx"], ["b", *"xxxx"], ["c", "y", *"xxx"]], [0, 0, 1], prompts)
    told = replace(given, known=torch.tensor([0, 2, UNKNOWN, UNKNOWN, UNKNOWN]))
    weights = sentinels(told, neighbours=1, even=0.2)
    expected = [[0.6, 0.6, 0.2], [0.2, 0.2, 1.0]]
    torch.testing.assert_close(weights, torch.tensor([*expected, *expected, [0.4, 0.4, 0.6]]))
    torch.testing.assert_close(sentinels(told, neighbours=9, even=0.2), torch.tensor([0.4, 0.4, 0.6]).expand(5, 3))
    nobody = replace(given, known=torch.tensor([-1, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]))
    torch.testing.assert_close(sentinels(nobody), torch.full((5, 3), 0.1))
    with pytest.raises(ConfigError, match=r"sentinels needs prompts\.sentinels over 0"):
        sentinels(given)
