"""The defence: what colluders have in common and honest clients have not, by hand and against brute force."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from semcons_ray.consensus import Election, defence, form_consensus
from semcons_ray.consensus.defence import Independent, likeness, sure_agreement
from semcons_ray.consensus.evidence import UNKNOWN, Evidence, Ruling

NUM_PROMPTS, DRAWS = 40, 4


def evidence(
    opinions: Tensor, voters: Tensor, vectors: Tensor | None = None, prompts: Tensor | None = None, trust: float = 1.0
) -> Evidence:
    """What a defence sees of these opinions (P, B), -1 where an answer is missing; vectors are one for each opinion."""
    present = opinions >= 0
    num_clients = int(voters.max()) + 1
    counts = torch.zeros(len(opinions), num_clients).index_add_(1, voters, present.float())
    if vectors is None:
        vectors = torch.nn.functional.one_hot(opinions.clamp(min=0), opinions.shape[1]).float()
    return Evidence(
        vectors=vectors,
        present=present,
        voters=voters,
        shares=present / counts[:, voters].clamp(min=1),
        opinions=opinions,
        texts=opinions,
        similarity=torch.zeros(opinions.shape),
        trust=torch.full((num_clients,), trust),
        prompts=prompts,
        confidence=None,
        known=None,
        chunks=[slice(0, len(opinions))],
    )


def numbered(texts: Tensor) -> Tensor:
    """Opinions of equal numbers, each the place of the first ballot that has it."""
    return (texts[:, :, None] == texts[:, None, :]).int().argmax(dim=2)


def crowd(num_honest: int, num_colluders: int, *, targets: int, sureness: int = DRAWS, seed: int = 0) -> Evidence:
    """Honest clients who give the right answer 0 with every other draw, else one of 50; colluders say 99 at the first
    `targets` prompts, with so many of their draws, and else are like honest clients."""
    random = torch.Generator().manual_seed(seed)
    shape = (NUM_PROMPTS, num_honest + num_colluders, DRAWS)
    knows = torch.rand(shape, generator=random) < 0.5
    texts = torch.randint(1, 51, shape, generator=random).where(~knows, 0)
    texts[:targets, num_honest:, :sureness] = 99
    voters = torch.arange(shape[1]).repeat_interleave(DRAWS)
    return evidence(numbered(texts.flatten(1)), voters)


def distrusted(found: Evidence) -> list[int]:
    return (Independent()(found).trust == 0).nonzero().flatten().tolist()


def test_how_often_two_clients_are_sure_of_the_same_answer_by_hand() -> None:
    # Three clients with four draws, at four prompts; the letters of a prompt are opinions.
    said = ["aaaa aaaa aaab", "aaab aaab aaab", "aabb aabb aaaa", "aaaa bbbb aa--"]
    opinions = numbered(torch.tensor([[ord(letter) for letter in row.replace(" ", "")] for row in said]))
    opinions[3, 10:] = -1
    found = evidence(opinions, torch.arange(3).repeat_interleave(4))
    wholly = sure_agreement(found, 1.0) * 4
    assert wholly.tolist() == [[2, 1, 1], [1, 2, 0], [1, 0, 2]]  # at the last prompt the third has two draws, both a
    undoubted = sure_agreement(found, 1.0, undoubted=True) * 4
    assert undoubted.tolist() == [[2, 1, 1], [1, 2, 0], [1, 0, 1]]  # at the third prompt two give a with half of theirs
    mostly = sure_agreement(found, 0.75) * 4
    assert mostly.tolist() == [[3, 2, 3], [2, 3, 2], [3, 2, 4]]


def test_a_sketch_is_near_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found = crowd(8, 3, targets=20)
    exact, alike = sure_agreement(found, 0.75), likeness(found)[0]
    monkeypatch.setattr(defence, "SKETCH", 11 * 400)  # the crowd has 1,760 opinions, and vectors of 44 dimensions
    assert not torch.equal(sure_agreement(found, 0.75), exact)
    torch.testing.assert_close(sure_agreement(found, 0.75), exact, atol=4 * 400**-0.5, rtol=0)
    torch.testing.assert_close(likeness(found)[0], alike, atol=4 * 396**-0.5, rtol=0)


def test_likeness_is_the_correlation_of_what_is_left_without_the_prompt_and_what_all_say() -> None:
    torch.manual_seed(0)
    prompts = torch.nn.functional.normalize(torch.randn(200, 64), dim=1)
    own = torch.nn.functional.normalize(torch.randn(200, 6, 64), dim=2)
    own[:, 5] = own[:, 4]
    vectors = torch.nn.functional.normalize(own + 2 * prompts[:, None], dim=2)  # cosines of 0.8 and more
    opinions = torch.arange(6).expand(200, 6)
    found, echoes = likeness(evidence(opinions, torch.arange(6), vectors, prompts))
    # By brute force: remove, centre, and divide by the mean square of what is left.
    left = vectors - (vectors * prompts[:, None]).sum(dim=2, keepdim=True) * prompts[:, None]
    left -= left.mean(dim=1, keepdim=True)
    expected = torch.einsum("pid,pjd->ij", left, left) / left.square().sum(dim=2).mean(dim=1).sum()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found[4, 5] > 0.6
    assert found[:4, :4].fill_diagonal_(0).abs().max() < 0.4
    assert not echoes.any()


def test_clients_that_say_the_same_in_other_words_are_found_by_their_vectors() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(NUM_PROMPTS, 9, 64)
    vectors[:, 6:] = vectors[:, 6:7] + 0.3 * torch.randn(NUM_PROMPTS, 3, 64)
    different = torch.arange(9).expand(NUM_PROMPTS, 9)
    unit = torch.nn.functional.normalize(vectors, dim=2)
    assert distrusted(evidence(different, torch.arange(9), unit)) == [6, 7, 8]


def test_an_answer_that_is_its_prompt_again_has_no_vote() -> None:
    vectors = torch.eye(4).expand(NUM_PROMPTS, 4, 4)
    prompts = torch.eye(4)[1].expand(NUM_PROMPTS, 4)
    different = torch.arange(4).expand(NUM_PROMPTS, 4)
    ruling = Independent()(evidence(different, torch.arange(4), vectors, prompts))
    assert ruling.votes[0].tolist() == [1, 0, 1, 1]
    together = torch.nn.functional.normalize(vectors + 9 * prompts[:, None], dim=2)  # as if embedded with the prompt
    assert Independent()(evidence(different, torch.arange(4), together, prompts)).votes.all()
    assert ruling.trust.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("targets", [NUM_PROMPTS, NUM_PROMPTS // 4, NUM_PROMPTS // 8])
@pytest.mark.parametrize(("num_honest", "num_colluders"), [(8, 3), (16, 7), (5, 4)])
def test_colluders_lose_their_votes_and_honest_clients_none(num_honest: int, num_colluders: int, targets: int) -> None:
    found = crowd(num_honest, num_colluders, targets=targets)
    theirs = list(range(num_honest, num_honest + num_colluders))
    assert distrusted(found) == theirs
    votes = Independent()(found).votes
    assert torch.equal(votes, (found.voters < num_honest).float().expand_as(votes))


@pytest.mark.parametrize(
    ("targets", "draws", "doubters", "found"),
    [
        (3, 4, 0, True),
        (2, 4, 0, False),
        (3, 4, 1, False),
        (4, 4, 1, False),
        (5, 4, 1, True),
        (9, 3, 0, True),
        (8, 3, 0, False),
        (40, 2, 0, False),
    ],
)
def test_how_much_two_of_six_clients_may_have_in_common_by_hand(
    targets: int, draws: int, doubters: int, found: bool
) -> None:
    """No two draws are the same, but for so many of two clients at so many of 40 prompts. At most 5% of the prompts may
    be answered alike with all draws, 10% if another client gives that answer with one of its draws, and 20% with three
    of four; what clients say less surely is nothing to go by."""
    opinions = torch.arange(6 * DRAWS).repeat(NUM_PROMPTS, 1)
    opinions[:targets, 4 * DRAWS : 4 * DRAWS + draws] = opinions[:targets, 5 * DRAWS : 5 * DRAWS + draws] = 4 * DRAWS
    opinions[:targets, :doubters] = 4 * DRAWS
    assert distrusted(evidence(opinions, torch.arange(6).repeat_interleave(DRAWS))) == ([4, 5] if found else [])


@pytest.mark.parametrize(
    ("sureness", "theirs", "others", "nobodys", "kept"),
    [
        (4, 2, 0, 0, True),  # right at two more than most others, with all draws
        (4, 1, 0, 0, False),
        (4, 5, 3, 9, True),
        (4, 4, 3, 9, False),
        (3, 3, 0, 0, True),  # 3 x 0.75 = 2.25
        (3, 2, 0, 0, False),
        (4, 0, 9, 0, False),
    ],
)
def test_clients_that_alone_know_what_the_server_knows_keep_their_votes(
    sureness: int, theirs: int, others: int, nobodys: int, kept: bool
) -> None:
    """Three of eleven clients say what nobody else says, and the server knows that they are right at so many prompts,
    the most common answer of the others at so many, and nobody at others. One client gave no answers."""
    found = crowd(8, 3, targets=NUM_PROMPTS, sureness=sureness)
    found = found.without((found.voters == 0).expand_as(found.present))
    said = [found.opinions[:, 8 * DRAWS], found.opinions[:, DRAWS : 8 * DRAWS].mode(dim=1).values]
    known = torch.full((NUM_PROMPTS,), UNKNOWN)
    known[:theirs], known[theirs : theirs + others] = said[0][:theirs], said[1][theirs : theirs + others]
    known[theirs + others :][:nobodys] = -1
    assert distrusted(found) == [8, 9, 10]
    assert distrusted(replace(found, known=known)) == ([] if kept else [8, 9, 10])


@pytest.mark.parametrize("seed", range(5))
def test_without_colluders_nobody_is_distrusted(seed: int) -> None:
    assert distrusted(crowd(8, 0, targets=0, seed=seed)) == []


def test_most_clients_may_agree_on_everything() -> None:
    same, voters = torch.zeros(NUM_PROMPTS, 7, dtype=torch.int64), torch.arange(7)
    assert distrusted(evidence(same, voters)) == []
    same[:, 4:] = torch.arange(4, 7)  # four of seven agree, the others each have an answer of their own
    assert distrusted(evidence(same, voters)) == []


def test_whoever_has_which_number_is_judged_alike() -> None:
    found = crowd(8, 3, targets=10)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    columns = (order[:, None] * DRAWS + torch.arange(DRAWS)).flatten()
    renamed = evidence(numbered(found.opinions[:, columns]), found.voters)
    assert torch.equal(Independent()(renamed).trust, Independent()(found).trust[order])


def test_trust_is_lost_at_once_and_grows_back_slowly() -> None:
    ruling = Independent()(crowd(8, 3, targets=20))
    assert ruling.trust.tolist() == [1] * 8 + [0] * 3
    honest = crowd(8, 3, targets=0)
    after = Independent(recovery=0.25)(Evidence(**(vars(honest) | {"trust": ruling.trust})))
    assert after.trust.tolist() == [1] * 8 + [0.25] * 3
    assert after.votes[0, -1] == 0.25


# --- The cap on wins ---


class Capped(Independent):
    """Finds nobody; only the cap is left."""

    def __call__(self, evidence: Evidence) -> Ruling:
        ruling = super().__call__(evidence)
        return Ruling(torch.ones_like(ruling.votes), ruling.trust)


def elected(vectors: Tensor, max_wins: float, present: Tensor | None = None) -> list[int]:
    mask = torch.ones(vectors.shape[:2], dtype=torch.bool) if present is None else present
    priority = torch.arange(vectors.shape[1]).flip(0).expand_as(mask)
    election = Election(defence=f"{__name__}:Capped", defence_options={"max_wins": max_wins})
    return form_consensus(vectors, mask, election, priority, chunk_bytes=1).winner.tolist()


# The first client is between the two others, the nearer the greater x is: it is the medoid, by different margins.
BETWEEN = torch.stack(
    [torch.tensor([[1.0, 0.0], [x, (1 - x**2) ** 0.5], [x, -((1 - x**2) ** 0.5)]]) for x in (0.9, 0.6, 0.8, 0.7)]
)


def test_a_client_keeps_its_clearest_wins_and_others_get_the_rest() -> None:
    assert elected(BETWEEN, 1.0) == [0, 0, 0, 0]
    assert elected(BETWEEN, 0.75) == [0, 1, 0, 0]
    # The second client may win two of four, too: the two where the first agrees least with the others.
    assert elected(BETWEEN, 0.5) == [0, 1, 0, 1]


def test_wins_of_the_next_best_are_capped_as_well() -> None:
    winners = elected(BETWEEN.repeat(3, 1, 1), 0.01)  # no less than an even share
    assert sorted(winners) == [0] * 4 + [1] * 4 + [2] * 4


def test_where_nobody_else_answered_a_win_is_kept() -> None:
    alone = torch.tensor([[True, False, False]] * 3 + [[True, True, True]])
    assert elected(BETWEEN, 0.5, alone) == [0, 0, 0, 1]
