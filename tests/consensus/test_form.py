import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semcons_ray.consensus import Consensus, Election, Facts, form_consensus, rules
from semcons_ray.errors import ConfigError
from semcons_ray.parts import BUILT_IN
from tests.consensus import reference

NAN = float("nan")
SELECTING = ["medoid", "plurality", "mode", "weighted_medoid", "geometric_median", "trimmed", "multi_krum"]
EVERY = [*SELECTING, "random_client", "longest", "shortest"]
OPTIONS = {"plurality": ["min_cosine"], "trimmed": ["trim"], "multi_krum": ["num_byzantine"]}


def unit(rows: Any) -> Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(rows, dtype=torch.float64), dim=-1).float()


def random_case(seed: int, prompts: int, clients: int, missing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Answers in a few loose clusters, so that no rule has an easy time."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(prompts, 3, 8))
    which = rng.integers(3, size=(prompts, clients))
    vectors = centres[np.arange(prompts)[:, None], which] + 0.4 * rng.normal(size=(prompts, clients, 8))
    return unit(vectors), torch.from_numpy(rng.random((prompts, clients)) >= missing)


def form(embeddings: Tensor, mask: Tensor | None = None, rule: str = "medoid", **more: Any) -> Consensus:
    """A consensus in which earlier clients go first among equals, unless a priority says otherwise."""
    if mask is None:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    clients = embeddings.shape[1]
    of_clients = {
        "priority": -torch.arange(float(clients)).expand(embeddings.shape[:2]),
        "weights": torch.arange(1.0, clients + 1),
        "lengths": torch.arange(clients).expand(embeddings.shape[:2]),
        "chunk_bytes": None,
        "voters": None,
        "opinions": None,
    }
    given = of_clients | {key: value for key, value in more.items() if key in of_clients}
    options = {key: more[key] for key in OPTIONS.get(rule, ()) if key in more}
    others = {key: more[key] for key in ("threshold", "min_votes") if key in more}
    election = Election(rule, options, **others)
    priority, chunk_bytes = given.pop("priority"), given.pop("chunk_bytes")
    return form_consensus(embeddings, mask, election, priority, Facts(**given), chunk_bytes=chunk_bytes)


# By hand --------------------------------------------------------------------------------------------------------------


def test_medoid_by_hand() -> None:
    """Three answers at 0, 60 and 90 degrees: cosines 1/2, 0 and sqrt(3)/2."""
    third = 3**0.5 / 2
    verdict = form(torch.tensor([[[1.0, 0.0], [0.5, third], [0.0, 1.0]]]))
    torch.testing.assert_close(verdict.similarity, torch.tensor([[0.25, (0.5 + third) / 2, third / 2]]))
    assert verdict.winner.tolist() == [1]
    assert verdict.agreement.item() == pytest.approx((0.5 + third) / 2)


def test_plurality_takes_the_largest_opinion_where_the_medoid_takes_the_middle() -> None:
    """Opinions: two equal answers at 0 degrees; three others at 50, 80 and 110, of which no two agree."""
    angles = torch.deg2rad(torch.tensor([50.0, 80.0, 110.0, 0.0, 0.0]))
    answers = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    assert form(answers).winner.tolist() == [0]
    assert form(answers, rule="plurality", min_cosine=0.95).winner.tolist() == [3]


def test_plurality_without_any_agreement_is_the_medoid() -> None:
    embeddings, mask = random_case(0, 20, 5)
    found = form(embeddings, mask, "plurality", min_cosine=1.0)
    assert torch.equal(found.winner, form(embeddings, mask).winner)


def test_the_mode_is_the_most_common_text_whose_ties_the_medoid_decides_by_hand() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 90.0, 40.0, 50.0, 60.0]))
    answers = torch.stack([angles.cos(), angles.sin()], dim=1)[None].expand(5, 5, 2)
    opinions = torch.tensor(
        [
            [0, 1, 1, 3, 4],  # the second and third say the same; the third is nearer to all
            [0, 0, 2, 2, 4],  # two texts of two each: that of the third and fourth is nearer, the fourth most
            [0, 1, 2, 3, 4],  # all differ: the medoid
            [0, 0, 0, 3, 3],  # one of the three is missing, which leaves two and two
            [0, 1, 2, 2, 4],
        ]
    )
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[3, 2] = False
    found = form(answers, mask, "mode", opinions=opinions.where(mask, -1)).winner.tolist()
    assert found[:3] == [2, 3, 3]
    assert found[3] == 3  # two and two; the fourth is nearer to the rest
    voters = torch.tensor([0, 0, 1, 1, 2])  # of three clients, the second says the same twice, which is one vote
    shared = form(answers[4:], mask[4:], "mode", opinions=opinions[4:], voters=voters)
    assert shared.votes[0].tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    assert shared.winner.item() == 3  # its text and the third client's have a vote each; 0.845 against 0.823 and 0.822
    assert torch.equal(form(answers, mask, "mode").winner, form(answers, mask).winner)  # as if all texts differed


@pytest.mark.parametrize("seed", range(5))
def test_the_mode_is_the_plurality_of_equal_texts(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, 4, (30, 9), generator=random)
    opinions = (texts[:, :, None] == texts[:, None, :]).int().argmax(dim=2)
    vectors = torch.nn.functional.normalize(torch.randn(30, 4, 16, generator=random), dim=2)
    vectors = vectors.gather(1, texts[:, :, None].expand(-1, -1, 16))
    priority = torch.rand(30, 9, generator=random)
    mode = form(vectors, rule="mode", opinions=opinions, priority=priority).winner
    plurality = form(vectors, rule="plurality", min_cosine=1.0, priority=priority).winner
    assert torch.equal(mode, plurality)


def test_a_weight_outvotes() -> None:
    answers = unit([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    assert form(answers, rule="weighted_medoid", weights=torch.tensor([1.0, 1.0, 1.0])).winner.tolist() == [1]
    assert form(answers, rule="weighted_medoid", weights=torch.tensor([1.0, 1.0, 9.0])).winner.tolist() == [2]
    assert form(answers, rule="weighted_medoid", weights=torch.tensor([1.0, 0.0, 0.0])).winner.tolist() == [0]


def test_robust_rules_resist_a_minority_that_pulls_the_mean() -> None:
    """Five honest answers near the x axis; four colluders, all at 80 degrees, which 40% of trimming removes."""
    honest = torch.deg2rad(torch.tensor([-8.0, -4.0, 0.0, 4.0, 8.0]))
    angles = torch.cat([honest, torch.deg2rad(torch.full((4,), 80.0))])
    answers = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    assert form(answers, rule="geometric_median").winner.item() < 5
    assert form(answers, rule="trimmed", trim=0.45).winner.item() < 5
    assert form(answers, rule="plurality", min_cosine=0.98).winner.item() == 2


def test_controls() -> None:
    embeddings, mask = random_case(1, 1, 4)
    lengths = torch.tensor([[5, 9, 9, 5]])
    assert form(embeddings, mask, "longest", lengths=lengths).winner.tolist() == [1]
    assert form(embeddings, mask, "shortest", lengths=lengths).winner.tolist() == [0]


def drawn(prompts: int, clients: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((prompts, clients)))


def assert_uniform(winners: Tensor, among: list[int], clients: int) -> None:
    counts = torch.bincount(winners, minlength=clients).tolist()
    share, each = 1 / len(among), len(winners) / len(among)
    spread = 5 * (len(winners) * share * (1 - share)) ** 0.5
    assert [client for client in range(clients) if counts[client]] == among
    assert all(abs(counts[client] - each) < spread for client in among)


def test_random_client_is_uniform_over_those_present() -> None:
    embeddings, mask = random_case(2, 6000, 4)
    mask[:, 1] = False
    assert_uniform(form(embeddings, mask, "random_client", priority=drawn(6000, 4)).winner, [0, 2, 3], 4)


@pytest.mark.parametrize("rule", EVERY)
def test_no_client_is_favoured_among_equals(rule: str) -> None:
    """Three of five say the same, in other places than the first."""
    vectors = unit([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]]).expand(3000, 5, 2)
    lengths = torch.tensor([5, 9, 9, 5, 9] if rule == "longest" else [9, 5, 5, 9, 5]).expand(3000, 5)
    priority, among = drawn(3000, 5), [1, 2, 4]
    if rule == "random_client":
        among = [0, 1, 2, 3, 4]
    found = form(
        vectors, rule=rule, priority=priority, lengths=lengths, weights=torch.ones(5), trim=0.4, num_byzantine=1
    )
    assert_uniform(found.winner, among, 5)


def test_of_two_clients_neither_is_always_the_medoid() -> None:
    embeddings, _ = random_case(3, 3000, 2)
    assert_uniform(form(embeddings, priority=drawn(3000, 2)).winner, [0, 1], 2)


def test_threshold_and_missing_answers() -> None:
    answers = torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.6, 0.8]]])
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    verdict = form(answers, mask, threshold=0.6)
    assert verdict.winner.tolist() == [0, 1, -1]
    torch.testing.assert_close(verdict.agreement, torch.tensor([0.6, NAN, NAN]), equal_nan=True)
    torch.testing.assert_close(verdict.similarity, torch.tensor([[0.6, 0.6], [NAN, NAN], [NAN, NAN]]), equal_nan=True)
    assert verdict.abstained.tolist() == [False, True, True]
    assert form(answers, mask, threshold=0.61).abstained.tolist() == [True, True, True]


def test_one_answer_is_no_consensus_unless_it_is_to_be() -> None:
    answers = unit([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    one, two = torch.tensor([[False, True, False]]), torch.tensor([[False, True, True]])
    assert form(answers, one).abstained.tolist() == [True]
    assert form(answers, one, min_votes=1).abstained.tolist() == [False]
    # Agreement of one is undefined, which is not over any threshold.
    assert form(answers, one, min_votes=1, threshold=-1.0).abstained.tolist() == [True]
    assert form(answers, two, min_votes=3).abstained.tolist() == [True]
    assert form(answers, two, min_votes=2).abstained.tolist() == [False]


# Clients with several answers -----------------------------------------------------------------------------------------


def test_samples_share_a_vote_by_hand() -> None:
    """Client 0 at 0 and 60 degrees, client 1 at 60 and 90: each answer is compared with the other client's two."""
    third = 3**0.5 / 2
    answers = torch.tensor([[[1.0, 0.0], [0.5, third], [0.5, third], [0.0, 1.0]]])
    found = form(answers, voters=torch.tensor([0, 0, 1, 1]))
    expected = torch.tensor([[0.5, 1 + third, 1.5, third]]) / 2
    torch.testing.assert_close(found.similarity, expected)
    assert found.winner.tolist() == [1]
    assert found.agreement.item() == pytest.approx(expected[0, 1].item())
    # Without its second sample, client 1 has a whole vote for the first.
    here = torch.tensor([[True, True, True, False]])
    found = form(answers, here, voters=torch.tensor([0, 0, 1, 1]))
    expected = torch.tensor([[0.5, 1.0, 0.75, NAN]])
    torch.testing.assert_close(found.similarity, expected, equal_nan=True)


@pytest.mark.parametrize("rule", [rule for rule in SELECTING if rule != "medoid"])
def test_a_client_never_outweighs_others_by_more_samples(rule: str) -> None:
    """Client 0 gives one text six times; three others are near each other elsewhere."""
    angles = torch.deg2rad(torch.tensor([90.0] * 6 + [0.0, 4.0, 8.0]))
    answers = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    more = {"min_cosine": 0.99, "trim": 0.3, "weights": torch.ones(9)}
    assert form(answers, rule=rule, **more).winner.item() < 6  # as six clients
    found = form(answers, rule=rule, voters=torch.tensor([0] * 6 + [1, 2, 3]), **more)
    assert found.winner.item() >= 6


def test_who_answers_alone_agrees_with_nobody() -> None:
    answers = unit([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    here, voters = torch.tensor([[True, True, False]]), torch.tensor([0, 0, 1])
    found = form(answers, here, voters=voters)
    assert found.abstained.tolist() == [True]
    assert bool(found.agreement.isnan()) and bool(found.similarity.isnan().all())
    assert form(answers, here, voters=voters, min_votes=1).abstained.tolist() == [False]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), clients=st.integers(1, 7), missing=st.sampled_from([0.0, 0.4]))
@pytest.mark.parametrize("rule", EVERY)
def test_samples_that_say_the_same_are_as_one(rule: str, seed: int, clients: int, missing: float) -> None:
    embeddings, mask = random_case(seed, 4, clients, missing)
    counts = torch.from_numpy(np.random.default_rng(seed).integers(1, 4, clients))
    voters = torch.arange(clients).repeat_interleave(counts)
    weights, lengths = torch.arange(1.0, clients + 1), torch.arange(clients).expand(4, clients)
    priority = drawn(4, clients, seed)
    ranks = priority.argsort(dim=1).argsort(dim=1)[:, voters] - torch.arange(len(voters)) / len(voters)
    once = form(embeddings, mask, rule, weights=weights, lengths=lengths, priority=priority, num_byzantine=2, trim=0.3)
    often = form(
        embeddings[:, voters], mask[:, voters], rule, voters=voters, weights=weights[voters], priority=ranks,
        lengths=lengths[:, voters], opinions=voters.expand(4, -1), num_byzantine=2, trim=0.3,
    )  # fmt: skip
    elected = [int(voters[winner]) if winner >= 0 else -1 for winner in often.winner]
    for prompt in range(4):
        if rule != "geometric_median" or mask[prompt].sum() != 2:  # of two answers any point between is a median
            assert elected[prompt] == once.winner[prompt]
    assert torch.equal(often.abstained, once.abstained)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("rule", ["geometric_median", "weighted_medoid"])
def test_shares_count_as_if_each_answer_were_there_as_often(rule: str, seed: int) -> None:
    """Clients with 1, 2 and 3 samples: as if there were 6, 3 and 2 copies of each, of so many clients."""
    embeddings, _ = random_case(seed, 4, 6)
    voters = torch.tensor([0, 1, 1, 2, 2, 2])
    copies = torch.arange(6).repeat_interleave(torch.tensor([6, 3, 3, 2, 2, 2]))
    shared = form(embeddings, rule=rule, voters=voters, weights=torch.ones(6)).winner
    copied = form(embeddings[:, copies], rule=rule, weights=torch.ones(18)).winner
    assert shared.tolist() == copies[copied].tolist()


def test_random_client_is_a_client_and_its_first_sample() -> None:
    voters = torch.tensor([0, 0, 0, 0, 1, 2])
    embeddings, mask = random_case(9, 3000, 6)
    priority = drawn(3000, 3).argsort(dim=1).argsort(dim=1)[:, voters] - torch.arange(6) / 6
    assert_uniform(form(embeddings, mask, "random_client", voters=voters, priority=priority).winner, [0, 4, 5], 6)
    mask[:, 0] = False  # as without its later samples
    assert_uniform(form(embeddings, mask, "random_client", voters=voters, priority=priority).winner, [4, 5], 6)
    mask[:, 4:] = False
    nobody = form(embeddings, mask, "random_client", voters=voters, priority=priority)
    assert bool((nobody.winner == -1).all()) and bool(nobody.abstained.all())


# Against the reference, and properties --------------------------------------------------------------------------------


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), clients=st.integers(1, 12), missing=st.sampled_from([0.0, 0.4]))
@pytest.mark.parametrize("rule", SELECTING)
def test_rules_equal_the_float64_reference(rule: str, seed: int, clients: int, missing: float) -> None:
    embeddings, mask = random_case(seed, 3, clients, missing)
    weights = np.random.default_rng(seed).integers(0, 5, clients).astype(float).tolist()
    texts = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, clients))  # the same for all prompts
    opinions = (texts[:, None] == texts).int().argmax(dim=1).expand(3, -1)
    settings_of = {
        "mode": {"texts": texts.tolist()},
        "plurality": {"min_cosine": 0.7},
        "weighted_medoid": {"weights": weights},
        "trimmed": {"trim": 0.3},
        "multi_krum": {"num_byzantine": 2},
    }
    verdict = form(
        embeddings, mask, rule, min_cosine=0.7, trim=0.3, num_byzantine=2, weights=torch.tensor(weights),
        opinions=opinions,
    )  # fmt: skip
    vectors = embeddings.double().numpy()
    for prompt in range(3):
        here = mask[prompt].nonzero().flatten().tolist()
        if not here:
            assert verdict.winner[prompt] == -1
            continue
        cosines = reference.mean_cosines(vectors[prompt], here)
        for client, cosine in cosines.items() if len(here) > 1 else ():
            assert float(verdict.similarity[prompt, client]) == pytest.approx(cosine, abs=2e-6)
        if rule == "geometric_median" and len(here) == 2:
            continue  # all points between them are medians, and rounding decides which one is found
        assert int(verdict.winner[prompt]) == getattr(reference, rule)(
            vectors[prompt], here, **settings_of.get(rule, {})
        )


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), clients=st.integers(1, 9), missing=st.sampled_from([0.0, 0.4]))
@pytest.mark.parametrize("rule", EVERY)
def test_client_order_does_not_matter(rule: str, seed: int, clients: int, missing: float) -> None:
    """What a client says, weighs and has drawn goes with it."""
    embeddings, mask = random_case(seed, 4, clients, missing)
    embeddings[1] = embeddings[1, :1]  # one prompt to which all answer alike
    order = torch.from_numpy(np.random.default_rng(seed).permutation(clients))
    weights, priority = torch.arange(1.0, clients + 1), drawn(4, clients, seed)
    lengths = torch.arange(clients).expand(4, clients) // 2
    straight = form(embeddings, mask, rule, weights=weights, priority=priority, lengths=lengths).winner
    moved = form(
        embeddings[:, order], mask[:, order], rule, weights=weights[order], priority=priority[:, order],
        lengths=lengths[:, order],
    ).winner  # fmt: skip
    assert [int(order[winner]) if winner >= 0 else -1 for winner in moved] == straight.tolist()


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), clients=st.integers(1, 9), chunk=st.sampled_from([1, 300, 2000, 1 << 20]))
@pytest.mark.parametrize("rule", EVERY)
def test_chunks_do_not_matter(rule: str, seed: int, clients: int, chunk: int) -> None:
    embeddings, mask = random_case(seed, 7, clients, 0.3)
    whole, pieces = form(embeddings, mask, rule), form(embeddings, mask, rule, chunk_bytes=chunk)
    assert torch.equal(whole.winner, pieces.winner)
    torch.testing.assert_close(whole.similarity, pieces.similarity, equal_nan=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), clients=st.integers(2, 9))
@pytest.mark.parametrize("rule", SELECTING)
def test_a_missing_client_is_as_if_it_were_not_there(rule: str, seed: int, clients: int) -> None:
    embeddings, mask = random_case(seed, 4, clients)
    gone = seed % clients
    mask[:, gone] = False
    embeddings[:, gone] = NAN
    kept = [client for client in range(clients) if client != gone]
    weights = torch.arange(1.0, clients + 1)
    with_it = form(embeddings, mask, rule, weights=weights).winner
    without = form(embeddings[:, kept], mask[:, kept], rule, weights=weights[kept]).winner
    assert with_it.tolist() == [kept[winner] for winner in without]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), copies=st.integers(2, 7))
@pytest.mark.parametrize("rule", [*SELECTING, "longest", "shortest"])
def test_equal_answers_tie_to_the_highest_priority(rule: str, seed: int, copies: int) -> None:
    vector = unit(np.random.default_rng(seed).normal(size=(1, 1, 384)))
    same = torch.ones(copies)
    found = form(vector.expand(3, copies, 384), rule=rule, weights=same, lengths=same.expand(3, copies))
    assert found.winner.tolist() == [0, 0, 0]
    torch.testing.assert_close(found.agreement, torch.ones(3))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("rule", ["medoid", "plurality", "geometric_median"])
def test_doubling_every_client_changes_no_winning_text(rule: str, seed: int) -> None:
    embeddings, _ = random_case(seed, 4, 5)
    once, twice = form(embeddings, rule=rule), form(torch.cat([embeddings, embeddings], dim=1), rule=rule)
    if rule == "medoid":  # with its double beside it, an answer's own opinion counts: only the sum with it is unchanged
        totals = torch.einsum("pcd,pd->pc", embeddings, embeddings.sum(dim=1))
        assert torch.equal(twice.winner, totals.argmax(dim=1))
    else:
        assert torch.equal(once.winner, twice.winner)


@pytest.mark.parametrize("rule", EVERY)
def test_half_precision_and_no_prompts(rule: str) -> None:
    embeddings, mask = random_case(3, 5, 6)
    assert form(embeddings[:0], mask[:0], rule).winner.shape == (0,)
    assert form(embeddings.half(), mask, rule).winner.shape == (5,)


def test_a_memory_mapped_file_gives_the_same(tmp_path: Any) -> None:
    embeddings, mask = random_case(4, 9, 7)
    embeddings.numpy().tofile(tmp_path / "e.bin")
    mapped = torch.from_file(str(tmp_path / "e.bin"), shared=False, size=embeddings.numel()).view_as(embeddings)
    assert torch.equal(form(mapped, mask, chunk_bytes=500).winner, form(embeddings, mask, chunk_bytes=500).winner)


@pytest.mark.parametrize("rule", SELECTING)
def test_equal_answers_tie_to_the_highest_priority_among_many(rule: str) -> None:
    """Six texts, each given by every sixth of 600 clients: the first client with the winning text is elected."""
    texts = unit(np.random.default_rng(5).normal(size=(20, 6, 64)) + 0.5)
    embeddings, weights = texts.repeat(1, 100, 1), torch.ones(600)
    found = form(embeddings, rule=rule, weights=weights, num_byzantine=150, trim=0.3)
    assert bool((found.winner < 6).all())
    for chunk in (1, 5_000_000):
        again = form(embeddings, rule=rule, weights=weights, num_byzantine=150, trim=0.3, chunk_bytes=chunk)
        assert torch.equal(again.winner, found.winner)


def test_trimmed_keeps_those_of_highest_priority_among_equals() -> None:
    """Of four equal answers and one other, 40% is that other and one of the equal ones: the last."""
    vector = unit(np.random.default_rng(6).normal(size=(1, 2, 384)))
    assert form(vector[:, [0, 0, 1, 0, 0]], rule="trimmed", trim=0.4).winner.tolist() == [0]
    assert form(vector[:, [1, 0, 0, 0, 0]], rule="trimmed", trim=0.4).winner.tolist() == [1]


def test_an_opinion_and_a_threshold_include_their_border() -> None:
    """Cosines of exactly 0.8, which float32 rounds to either side."""
    answers = torch.tensor([[[0.6, 0.8], [1.0, 0.0], [0.6, -0.8], [0.8, 0.6], [-1.0, 0.0]]])
    found = form(answers[:, 1:4], rule="plurality", min_cosine=0.8)
    assert found.winner.tolist() == [0]
    assert form(answers[:, [1, 3]], threshold=0.8).abstained.tolist() == [False]
    assert form(answers[:, [1, 3]], threshold=0.80001).abstained.tolist() == [True]


def test_multi_krum_by_hand() -> None:
    """At 0, 10, 20 and 90 degrees with f = 1: the score is the nearest neighbour's cosine, the first of equals wins."""
    angles = torch.deg2rad(torch.tensor([90.0, 0.0, 10.0, 20.0, 22.0]))
    answers = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    assert form(answers[:, :4], rule="multi_krum", num_byzantine=1).winner.tolist() == [1]
    # Five answers: the two nearest count, and 20 degrees has 2 and 10 degrees to go.
    assert form(answers, rule="multi_krum", num_byzantine=1).winner.tolist() == [3]
    # More bad clients than answers: still the nearest neighbour.
    assert form(answers, rule="multi_krum", num_byzantine=40).winner.tolist() == [3]


def test_every_rule_of_the_config_is_known() -> None:
    embeddings, mask = random_case(7, 1, 4)
    assert {*EVERY, "reference", "own_answer"} == set(BUILT_IN["rule"])
    assert all(form(embeddings, mask, rule).winner.shape == (1,) for rule in EVERY)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"rule": "median"},
            "there is no rule median (did you mean medoid?); there are medoid, plurality, mode, weighted_medoid, "
            "geometric_median, trimmed, multi_krum, random_client, longest, shortest, reference, own_answer, and any "
            "module:object",
        ),
        ({"threshold": 1.01}, "algorithm.agreement_threshold must be in [-1, 1], not 1.01"),
        ({"threshold": -1.01}, "algorithm.agreement_threshold must be in [-1, 1], not -1.01"),
        ({"min_votes": 0}, "algorithm.min_votes must be at least 1, not 0"),
        *[
            ({"rule": rule, "options": {name: value}}, f"algorithm.rule_options.{name}: Input should be {says}")
            for rule, name, value, says in [
                ("plurality", "min_cosine", 1.01, "less than or equal to 1 (got 1.01)"),
                ("plurality", "min_cosine", -1.01, "greater than or equal to -1 (got -1.01)"),
                ("trimmed", "trim", 0.5, "less than 0.5 (got 0.5)"),
                ("trimmed", "trim", -0.01, "greater than or equal to 0 (got -0.01)"),
                ("multi_krum", "num_byzantine", -1, "greater than or equal to 0 (got -1)"),
            ]
        ],
    ],
)
def test_settings_out_of_range_name_the_setting(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(says)}$"):
        Election(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 1.0},
        {"threshold": -1.0},
        {"rule": "plurality", "options": {"min_cosine": 1.0}},
        {"rule": "plurality", "options": {"min_cosine": -1.0}},
        {"rule": "trimmed", "options": {"trim": 0.0}},
        {"rule": "multi_krum", "options": {"num_byzantine": 0}},
        {"min_votes": 1},
    ],
)
def test_settings_at_the_end_of_their_range_are_in_it(changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        assert getattr(Election(**changes), key) == value


ONES, THERE, MISSING = torch.ones(1, 2, 1), torch.ones(1, 2) > 0, {"weights": None, "lengths": None}


@pytest.mark.parametrize(
    ("embeddings", "mask", "changes", "says"),
    [
        (torch.zeros(2, 3), THERE, {}, "embeddings must be (P, C, D) and floating point, not (2, 3) float32"),
        (ONES.long(), THERE, {}, "embeddings must be (P, C, D) and floating point, not (1, 2, 1) int64"),
        (ONES, torch.ones(1, 3) > 0, {}, "mask must be bool of shape (1, 2), not (1, 3) bool"),
        (ONES, torch.ones(1, 2), {}, "mask must be bool of shape (1, 2), not (1, 2) float32"),
        (ONES, THERE, {"priority": torch.ones(1, 3)}, "priority must be of shape (1, 2), not (1, 3) float32"),
        (ONES, THERE, {"voters": torch.zeros(2)}, "voters must be int64 of shape (2,), not (2,) float32"),
        (ONES, THERE, {"voters": torch.tensor([0])}, "voters must be int64 of shape (2,), not (1,) int64"),
        *(
            (ONES, THERE, {"voters": torch.tensor([0, bad])}, "voters must be numbers from 0, and less than there are")
            for bad in (-1, 2)
        ),
        (3 * ONES, THERE, {}, "embedding of prompt 0, answer 0 has length 3, not 1"),
        (NAN * ONES, THERE, {}, "embedding of prompt 0, answer 0 has length nan, not 1"),
        (
            ONES,
            THERE,
            {"rule": "weighted_medoid"} | MISSING,
            "rule weighted_medoid needs weights of shape (2,), not None",
        ),
        (
            ONES,
            THERE,
            {"rule": "weighted_medoid", "weights": torch.ones(3)},
            "rule weighted_medoid needs weights of shape (2,), not (3,) float32",
        ),
        *(
            (ONES, THERE, {"rule": "weighted_medoid", "weights": torch.tensor([1.0, bad])}, says)
            for bad in (-1.0, NAN, float("inf"))
            for says in ["weights must be finite and not negative"]
        ),
        *(
            (ONES, THERE, {"rule": rule, "lengths": lengths}, f"rule {rule} needs lengths of shape (1, 2), not {which}")
            for rule in ("longest", "shortest")
            for lengths, which in ((None, "None"), (torch.ones(2, dtype=torch.int32), "(2,) int32"))
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    embeddings: Tensor, mask: Tensor, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        form(embeddings, mask, **{"priority": torch.ones(1, 2), **changes})


def test_weights_count_in_relation_to_each_other() -> None:
    """However small they are, and though scores within 1e-6 of each other are a tie."""
    embeddings, mask = random_case(8, 20, 5, 0.2)
    weights = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    usual = form(embeddings, mask, "weighted_medoid", weights=weights)
    for scale in (1e-9, 1e9):
        assert torch.equal(form(embeddings, mask, "weighted_medoid", weights=scale * weights).winner, usual.winner)


def test_a_rule_says_what_it_lacks() -> None:
    nothing = torch.zeros(1, 1)
    whole = nothing.long()
    ballots = rules.Ballots(nothing[..., None], nothing > 0, nothing, nothing, whole[0], None, None, nothing, whole)
    with pytest.raises(ValueError, match=r"^rule weighted_medoid needs the weights of the clients$"):
        rules.weighted_medoid(ballots)
    for rule in (rules.longest, rules.shortest):
        with pytest.raises(ValueError, match=r"^rules longest and shortest need the lengths of the answers$"):
            rule(ballots)
